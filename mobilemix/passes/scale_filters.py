"""The scale of an inverse Fourier transform, moved into the static filter before it."""

import math
from collections.abc import Iterable

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments
from mobilemix.passes.editing import Edit

aten = torch.ops.aten

_INVERSES = {getattr(aten, f"fft_{kind}{form}").default for kind in ("ifft", "irfft") for form in ("", "2", "n")}


class ScaleFilters(Pass):
    """Multiply constant spectra by 1/n, so that the inverse transform behind them need not.

        before:  x → rfft → z → mul k → irfft → y
        after:   x → rfft → z → mul k/n → irfft (norm "forward", which has no scale) → y

    An unscaled transform adds n numbers up, and a product of two of them has n times what comes back: beyond float16
    for a convolution over a thousand steps. `norm="ortho"` has its balance already and stays.
    """

    name = "scale_filters"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with the scales of "backward" transforms in their filters."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            if node.target not in _INVERSES or arguments(node)["norm"] not in (None, "backward"):
                continue
            product = node.args[0]
            if product.target is not aten.mul.Tensor or len(product.users) > 1:
                continue
            for name, factor in arguments(product).items():
                spectrum = edit.constant(factor)
                if spectrum is None:
                    continue
                scaled = spectrum.to(torch.promote_types(spectrum.dtype, torch.float64)) / _numbers(node)
                constant = edit.add_constant(f"{edit.name(factor)}_scaled", scaled.to(spectrum.dtype))
                with edit.at(product):
                    filtered = edit.emit_like(product, **{name: constant})
                with edit.at(node):
                    edit.replace(node, edit.emit_like(node, self=filtered, norm="forward"))
                break
        return edit.finish()


def _numbers(node: fx.Node) -> int:
    """How many numbers one transform returns."""
    given, shape = arguments(node), node.meta["val"].shape
    axes, sizes = given["dim"], given.get("s")
    if axes is None:
        axes = range(len(shape)) if sizes is None else range(-len(sizes), 0)
    return math.prod(shape[axis] for axis in (axes if isinstance(axes, Iterable) else [axes]))
