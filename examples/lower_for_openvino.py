"""mobilemix's passes before OpenVINO: lower, convert, run on the CPU, compare with PyTorch.

Needs `pip install 'mobilemix[peers]'`.
"""

import openvino
import torch

import mobilemix
from mobilemix.passes import lower


def main() -> None:
    """Print the relative L2 error of OpenVINO against PyTorch."""
    model = mobilemix.create_model("affnet_et_flowers").eval()
    image = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(image)

    program = lower(torch.export.export(model, (image,)))
    # Without the hint, a CPU that has bfloat16 uses it.
    compiled = openvino.compile_model(openvino.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    logits = torch.from_numpy(compiled(image.numpy())[0])
    error = float((logits - expected).norm() / expected.norm())
    print(f"OpenVINO: relative error {error:.1e} against PyTorch")


if __name__ == "__main__":
    main()
