"""mobilemix's passes before ExecuTorch: lower, partition to XNNPACK, run, compare with PyTorch.

Needs `pip install 'mobilemix[peers]'`.
"""

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

import mobilemix
from mobilemix.passes import lower


def main() -> None:
    """Print the relative L2 error of ExecuTorch against PyTorch."""
    model = mobilemix.create_model("affnet_et_flowers").eval()
    image = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(image)

    program = lower(torch.export.export(model, (image,)))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    buffer = edge.to_executorch().buffer  # in a variable: the loaded program reads from it without keeping it alive
    method = Runtime.get().load_program(buffer).load_method("forward")

    (logits,) = method.execute([image])
    error = float((logits - expected).norm() / expected.norm())
    print(f"ExecuTorch with XNNPACK: relative error {error:.1e} against PyTorch")


if __name__ == "__main__":
    main()
