"""From a lowered program to the bytes of a `.tflite` file, by litert-torch."""

from collections.abc import Sequence

import litert_torch
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram


class _Named(nn.Module):
    """A program's module whose results have names, which litert-torch takes for those of the file's outputs."""

    def __init__(self, program: ExportedProgram, names: Sequence[str]) -> None:
        super().__init__()
        self.module = program.module()
        self.names = names

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the program."""
        results = self.module(*inputs.values())
        return dict(zip(self.names, (results,) if isinstance(results, Tensor) else results, strict=True))


def to_flatbuffer(program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]) -> bytes:
    """The program as a LiteRT model of one signature, `serving_default`.

    Args:
        program: plain operators, fixed shapes.
        input_names: of its user inputs, in order: those of the signature.
        output_names: likewise of its outputs.

    Raises:
        whatever litert-torch and its MLIR passes raise for an operator that they do not have.
    """
    samples = {
        name: torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
        for name, node in zip(input_names, _inputs(program), strict=True)
    }
    module = _Named(program, output_names)
    return bytes(litert_torch.convert(module, sample_kwargs=samples).model_content())


def _inputs(program: ExportedProgram) -> list[torch.fx.Node]:
    taken = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.find_nodes(op="placeholder") if node.name in taken]
