"""Rewrites of an ExportedProgram: `SHARED` by all targets, and those for scans that each target chooses among.

`lower` runs `PASSES`, that is both, so that nothing but plain operators is left.
"""

from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import mobilemix.ops  # noqa: F401, registers the scans
from mobilemix.errors import UnsupportedOpError
from mobilemix.passes.base import Pass, PassError, PassResult, source
from mobilemix.passes.complex_to_real import ComplexToReal
from mobilemix.passes.compose_linear import ComposeLinear
from mobilemix.passes.editing import chain
from mobilemix.passes.fold_affine import FoldAffine
from mobilemix.passes.fold_batch_norm import FoldBatchNorm
from mobilemix.passes.fold_constants import FoldConstants
from mobilemix.passes.fold_scales import FoldScales
from mobilemix.passes.lower_einsum import LowerEinsum
from mobilemix.passes.lower_linear_scan import LowerLinearScan
from mobilemix.passes.lower_scatter import LowerScatter
from mobilemix.passes.lower_selective_scan import LowerSelectiveScan
from mobilemix.passes.lower_softshrink import LowerSoftshrink
from mobilemix.passes.lower_ssd_chunk_scan import LowerSsdChunkScan
from mobilemix.passes.make_functional import MakeFunctional
from mobilemix.passes.merge_linear import MergeLinear
from mobilemix.passes.merge_reshapes import MergeReshapes
from mobilemix.passes.merge_skips import MergeSkips
from mobilemix.passes.merge_slices import MergeSlices
from mobilemix.passes.remove_no_ops import RemoveNoOps
from mobilemix.passes.reroll_loops import RerollLoops
from mobilemix.passes.scale_filters import ScaleFilters
from mobilemix.passes.share_constants import ShareConstants
from mobilemix.passes.unstack import Unstack

__all__ = ["PASSES", "SHARED", "Pass", "PassError", "PassResult", "lower", "lower_scans"]

SHARED: tuple[Pass, ...] = (
    # First: to every other pass a value is one value, and `lower` takes programs that nobody made functional.
    MakeFunctional(),
    # So that no later pattern has to look through a dropout or a copy.
    RemoveNoOps(),
    # While every step of a loop looks like every other: constants are folded for one step and not for another.
    RerollLoops(),
    # Before the complex pass, so that the spectrum of a weight is computed by torch.fft in float64.
    FoldConstants(),
    FoldBatchNorm(),
    # Where a static spectrum is a constant, and a transform still one operator.
    ScaleFilters(),
    # After the constants, which it splits into real and imaginary parts.
    ComplexToReal(),
    # For the stacks, assignments and products of complex tensors that it leaves, besides the model's own.
    Unstack(),
    LowerScatter(),
    LowerEinsum(),
    # Again: the passes above compute with weights, and leave copies of what was a view.
    RemoveNoOps(),
    MergeReshapes(),
    FoldConstants(),
    # Where batch norm is folded (each of two averaged heads may have one), and every bias and scale is a constant.
    MergeLinear(),
    # Around it, so that the slices of one merged map meet the concatenation of the next map.
    MergeReshapes(),
    MergeSlices(),
    MergeReshapes(),
    # Once a branch is one convolution with its scale, which may have been on the other side of a reshape.
    MergeSkips(),
    # After the skips: the sums that are left, and what reads them alone.
    FoldScales(),
    # The scales and shifts that no map before them could take.
    FoldAffine(),
    # When nothing is left between two maps that can go into one of them.
    ComposeLinear(),
    # Late: until here each constant belongs to the layer whose weights are merged.
    ShareConstants(),
    # Last: until here it is one elementwise operator among others.
    LowerSoftshrink(),
)


def lower_scans(stays: Callable[[fx.Node], bool] = lambda node: False) -> tuple[Pass, ...]:  # noqa: ARG005
    """Passes that write scans in plain operators, but for those calls that a target has a better form for."""
    return (
        LowerSelectiveScan(stays),
        LowerSsdChunkScan(),
        # After the selective scans, which leave one recurrence each: that over their chunks.
        LowerLinearScan(stays),
        # What they do to weights and between reshapes of the model's own.
        RemoveNoOps(),
        MergeReshapes(),
        FoldConstants(),
    )


PASSES: tuple[Pass, ...] = SHARED + lower_scans()


def lower(
    program: ExportedProgram, passes: Sequence[Pass] = PASSES, *, log: Callable[[str], None] | None = None
) -> ExportedProgram:
    """Rewrite a captured program into plain operators: no complex tensor, no Fourier transform.

    Args:
        program: as `mobilemix.capture.capture` or `torch.export.export` returns it; it is not changed.
        passes: what to run, in order.
        log: told the name of each pass that changed something.

    Returns:
        The rewritten program, of the same inputs and outputs, except that complex ones are real, as
        `torch.view_as_real` makes them; the very same one if there was nothing to rewrite.

    Raises:
        UnsupportedOpError: the model does something with complex tensors for which there is no rule, or the program was
            exported with dynamic shapes.
        PassError: a pass broke its contract, which is a defect of mobilemix.
    """
    if program.range_constraints:
        sizes = ", ".join(map(str, program.range_constraints))
        raise UnsupportedOpError(f"the program has dynamic shapes ({sizes}{_first_dynamic(program)}); use fixed ones")
    with chain() as edits:
        for step in passes:
            result = step(program)
            program = result.program
            if result.modified and log is not None:
                log(step.name)
        return edits.completed(program)


def _first_dynamic(program: ExportedProgram) -> str:
    """What makes the first value whose shape is not fixed, and where."""
    for node in program.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
                return f", input {node.name}" if node.op == "placeholder" else f", {node.target} at {source(node)}"
    return ""
