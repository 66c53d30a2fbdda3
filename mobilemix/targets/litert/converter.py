"""From a lowered program to the bytes of a `.tflite` file, by what litert-torch is made of.

`litert_torch.convert` would capture the program's module once more, and lose the names of its values.
"""

import contextlib
import copy
import operator
from collections.abc import Iterator, Sequence

import torch
from litert_converter.mlir import passmanager
from litert_converter.mlir._mlir_libs import converter_api_ext
from litert_torch import backend, fx_infra
from litert_torch._convert import core
from litert_torch._convert.fx_passes import BuildAtenCompositePass
from litert_torch.backend.inline_consts import InlineConstsContext
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.elementwise import BINARY, UNARY
from mobilemix.targets.litert.passes.channels_last import SPATIAL
from mobilemix.targets.litert.quiet import silent
from mobilemix.targets.litert.runtime import SIGNATURE

_PLAIN = (
    UNARY
    | BINARY
    | {"div", "maximum", "minimum", "mean", "sum", "amax", "softmax", "linear", "bmm", "matmul", "mm", "addmm"}
    | {"permute", "transpose", "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "clone"}
    | {"cat", "slice", "split", "split_with_sizes", "chunk", "select", "constant_pad_nd", "to", "layer_norm"}
)
"""Operators whose lowering is the same in every layout."""


def to_flatbuffer(program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]) -> bytes:
    """The program as a LiteRT model of one signature, `serving_default`; values are named after their nodes.

    Args:
        program: plain operators, fixed shapes.
        input_names: of its user inputs, in order: those of the signature.
        output_names: likewise of its outputs.

    Raises:
        whatever litert-torch and its MLIR passes raise for an operator that they do not have.
    """
    context = backend.export_utils.create_ir_context()
    lowered = backend.export.exported_program_to_mlir(
        _prepared(program),
        ir_context=context,
        lowering_context_plugins=[InlineConstsContext(enable_resource_constants=False)],
    )
    converter_api_ext.set_signature(
        lowered.module.operation,
        signature_name=SIGNATURE,
        input_names=list(input_names),
        output_names=list(output_names),
    )
    module = converter_api_ext.merge_modules([lowered.module])
    config = converter_api_ext.ConvertToTFLConfig()
    config.model_origin_framework = "PYTORCH"
    config.canonicalizing_inf_as_min_max_float = False  # masks are infinite, and stay so
    config.enable_x64 = False  # kernels of phones have 32-bit integers
    with context, silent():
        converter_api_ext.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        return bytes(converter_api_ext.export_flatbuffer_to_bytes(module.operation))


def _prepared(program: ExportedProgram) -> ExportedProgram:
    """The program after litert-torch's own passes, as far as it needs any.

    They trace it three times. The lowering traces once more by itself, which is all that a graph needs whose layout is
    settled: `channels_last` leaves each convolution between permutations that vanish, and the only operators that
    still have to be kept whole are composites, such as GELU.
    """
    if not _is_settled(program):
        decompositions = fx_infra.decomp.pre_convert_decomp()
        with _labelled(program):
            program = fx_infra.safe_run_decompositions(program, decompositions, can_skip=False)
        traced: ExportedProgram = core._run_convert_passes(program)
        return traced
    graph = copy.deepcopy(program.graph)
    for ours, theirs in zip(graph.nodes, program.graph.nodes, strict=True):
        ours.name = theirs.name  # a copy renames what is called like a builtin
        ours.meta["nn_module_stack"] = _label(theirs)
    module = fx.GraphModule(program.graph_module, graph)
    settled: ExportedProgram = fx_infra.run_passes(
        program._update(module, program.graph_signature), [BuildAtenCompositePass()]
    )
    return settled


def _is_settled(program: ExportedProgram) -> bool:
    """Whether the layout of images matters to nothing but convolutions and pools that stand between permutations."""
    permute = torch.ops.aten.permute.default
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if node.target in SPATIAL:
            ends = [node.args[0], *node.users]
            if not all(isinstance(end, fx.Node) and end.target is permute for end in ends):
                return False
        elif not isinstance(node.target, torch._ops.OpOverload) or node.target._opname not in _PLAIN:
            return False
    return True


def _label(node: fx.Node) -> dict[str, tuple[str, str]]:
    """A module of the node's own name, after which the converter names its values."""
    return {"": ("", node.name)}


@contextlib.contextmanager
def _labelled(program: ExportedProgram) -> Iterator[ExportedProgram]:
    """The program with each node in a module of its own name, after which the converter names its values."""
    stacks = {node: node.meta.get("nn_module_stack") for node in program.graph.nodes}
    try:
        for node in stacks:
            node.meta["nn_module_stack"] = _label(node)
        yield program
    finally:
        for node, stack in stacks.items():
            if stack is None:
                del node.meta["nn_module_stack"]
            else:
                node.meta["nn_module_stack"] = stack
