"""Equal parameters and buffers, stored once."""

import hashlib

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult
from mobilemix.passes.editing import Edit


class ShareConstants(Pass):
    """Let constants of the same numbers be one.

        before:  layers.0.grid, layers.1.grid (buffers, equal)
        after:   layers.0.grid, used by both

    Equal calls stay: ONNX's simplifier and Core ML's converter remove them themselves.
    """

    name = "share_constants"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without duplicates among its constants."""
        edit = Edit(program)
        known: dict[tuple[object, ...], fx.Node] = {}
        for node in edit.graph.find_nodes(op="placeholder"):
            tensor = edit.constant(node)
            first = node if tensor is None else known.setdefault(_content(tensor), node)
            if first is not node and node.users:
                edit.replace(node, first)
        return edit.finish()


def _content(tensor: Tensor) -> tuple[object, ...]:
    data = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    packed = data.clone(memory_format=torch.contiguous_format).flatten()  # contiguous() leaves odd strides of size 1
    digest = hashlib.sha256(packed.view(torch.uint8).numpy().data).digest()
    return tensor.dtype, tuple(tensor.shape), digest
