"""mobilemix's passes before LiteRT: lower, convert with litert-torch, run, compare with PyTorch.

Needs `pip install 'mobilemix[litert]'`. `mobilemix export --target litert` does more: passes for XNNPACK, float16 and
int8, metadata and labels, and verification of the file.
"""

import litert_torch
import torch

import mobilemix
from mobilemix.passes import lower


def main() -> None:
    """Print the relative L2 error of LiteRT against PyTorch."""
    model = mobilemix.create_model("affnet_et_flowers").eval()
    image = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(image)

    program = lower(torch.export.export(model, (image,)))
    # It captures modules itself: a lowered program is one, and stays lowered. It is in inference mode already.
    converted = litert_torch.convert(program.module(), (image,))

    logits = torch.from_numpy(converted(image))
    error = float((logits - expected).norm() / expected.norm())
    print(f"LiteRT: relative error {error:.1e} against PyTorch")


if __name__ == "__main__":
    main()
