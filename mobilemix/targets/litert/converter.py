"""From a lowered program to the bytes of a `.tflite` file, by what litert-torch is made of.

`litert_torch.convert` would capture the program's module once more, and lose the names of its values.
"""

import contextlib
from collections.abc import Iterator, Sequence

from litert_converter.mlir import passmanager
from litert_converter.mlir._mlir_libs import converter_api_ext
from litert_torch import backend, fx_infra
from litert_torch._convert import core
from litert_torch.backend.inline_consts import InlineConstsContext
from torch.export import ExportedProgram

from mobilemix.targets.litert.quiet import silent
from mobilemix.targets.litert.runtime import SIGNATURE


def to_flatbuffer(program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]) -> bytes:
    """The program as a LiteRT model of one signature, `serving_default`; values are named after their nodes.

    Args:
        program: plain operators, fixed shapes.
        input_names: of its user inputs, in order: those of the signature.
        output_names: likewise of its outputs.

    Raises:
        whatever litert-torch and its MLIR passes raise for an operator that they do not have.
    """
    decompositions = fx_infra.decomp.pre_convert_decomp()
    with _labelled(program):
        program = fx_infra.safe_run_decompositions(program, decompositions, can_skip=False)
    program = core._run_convert_passes(program)
    context = backend.export_utils.create_ir_context()
    lowered = backend.export.exported_program_to_mlir(
        program, ir_context=context, lowering_context_plugins=[InlineConstsContext(enable_resource_constants=False)]
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


@contextlib.contextmanager
def _labelled(program: ExportedProgram) -> Iterator[ExportedProgram]:
    """The program with each node in a module of its own name, after which the converter names its values."""
    stacks = {node: node.meta.get("nn_module_stack") for node in program.graph.nodes}
    try:
        for node in stacks:
            node.meta["nn_module_stack"] = {"": ("", node.name)}
        yield program
    finally:
        for node, stack in stacks.items():
            if stack is None:
                del node.meta["nn_module_stack"]
            else:
                node.meta["nn_module_stack"] = stack
