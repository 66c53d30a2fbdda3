"""mobilemix's passes before coremltools: lower, convert, run the package, compare with PyTorch.

Off a Mac, where Core ML itself is missing, mobilemix's interpreter runs the saved package.
"""

import tempfile
from pathlib import Path

import coremltools as ct
import torch

import mobilemix
from mobilemix.passes import lower
from mobilemix.targets import find_target


def main() -> None:
    """Print the relative L2 error of the package against PyTorch."""
    model = mobilemix.create_model("affnet_et_flowers").eval()
    image = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(image)

    program = lower(torch.export.export(model, (image,)))
    package = ct.convert(
        program.run_decompositions({}),  # coremltools reads programs of the ATen dialect
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.mlpackage")
        package.save(str(path))
        (name,) = program.graph_signature.user_inputs
        (logits,) = find_target("coreml").load(path).run({name: image.numpy()}).values()

    error = float((torch.from_numpy(logits) - expected).norm() / expected.norm())
    print(f"Core ML package: relative error {error:.1e} against PyTorch")


if __name__ == "__main__":
    main()
