"""mobilemix's passes before `torch.onnx.export`: lower, export, run in ONNX Runtime, compare with PyTorch."""

import onnxruntime
import torch

import mobilemix
from mobilemix.passes import lower


def main() -> None:
    """Print the relative L2 error of ONNX Runtime against PyTorch."""
    model = mobilemix.create_model("affnet_et_flowers").eval()
    image = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(image)

    program = lower(torch.export.export(model, (image,)))
    exported = torch.onnx.export(program, (image,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())

    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    error = float((torch.from_numpy(logits) - expected).norm() / expected.norm())
    print(f"ONNX Runtime: relative error {error:.1e} against PyTorch")


if __name__ == "__main__":
    main()
