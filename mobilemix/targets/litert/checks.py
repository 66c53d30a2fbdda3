"""Verification of a LiteRT file beyond its outputs."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobilemix.parity import relative_l2
from mobilemix.recipe import Recipe
from mobilemix.targets.base import LARGEST_HALF, Array, Check, Inputs, Lowered
from mobilemix.targets.litert import flatbuffer
from mobilemix.targets.litert.convert import float_build, layers_of
from mobilemix.targets.litert.flatbuffer import Model
from mobilemix.targets.litert.quantize import HALF_SUFFIX, kept
from mobilemix.targets.litert.runtime import LiteRTRunner

TWIN_TOLERANCE = 1e-5
"""Largest relative L2 distance between the float32 build and the lowered program in PyTorch."""


def run(lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs]) -> list[Check]:
    """All of them for one file."""
    runner = LiteRTRunner.from_file(path)
    found = [builtin(runner.model), delegated(runner)]
    if recipe.precision in ("fp16", "int8"):
        twin = LiteRTRunner(float_build(lowered.program, lowered.input_names, lowered.output_names))
        found.append(_twin(lowered, twin, samples))
        if recipe.precision == "fp16":
            found += halves(twin, runner.model, samples)
        else:
            found.append(integers(twin.model, runner.model))
            if names := kept(twin.model, recipe.quantization, layers_of(lowered)):
                found.append(floats(runner.model, names))
    return found


def builtin(model: Model) -> Check:
    """The file needs nothing but LiteRT's own operators."""
    operators = [each for graph in model.subgraphs for each in graph.operators]
    custom = sorted({flatbuffer.operator(model, each) for each in operators if flatbuffer.is_custom(model, each)})
    detail = f"custom operators {', '.join(custom)}" if custom else f"{len(operators)} operators, all LiteRT's own"
    return Check("builtin operators", not custom, detail)


def delegated(runner: LiteRTRunner) -> Check:
    """How many operators XNNPACK runs; a fact about speed that no file fails by."""
    left, total = Counter(runner.left_to_litert()), len(runner.model.subgraphs[0].operators)
    others = ", ".join(f"{count} {name}" for name, count in left.most_common())
    return Check(
        "XNNPACK", True, f"runs {total - left.total()} of {total} operators" + (f"; LiteRT {others}" if left else "")
    )


def halves(twin: LiteRTRunner, model: Model, samples: Sequence[Inputs]) -> list[Check]:
    """A float16 file is its float32 twin with rounded weights, and float16 can hold what it computes.

    A tolerance that float16 arithmetic can meet would let real faults pass, so the file itself is compared.
    """
    difference = first_difference(twin.model, model)
    peaks = [(_peak(value), name) for sample in samples for name, value in twin.values(sample)]
    peak, where = max(peaks, default=(0.0, "no value"))
    return [
        Check(
            "float16 file is the twin, rounded",
            difference is None,
            difference or "operator for operator, weight for weight",
        ),
        Check("float16 range", peak <= LARGEST_HALF, f"largest magnitude {peak:.3g} of {LARGEST_HALF:.0f}, {where}"),
    ]


def first_difference(full: Model, half: Model) -> str | None:
    """What in a float16 model is not its float32 one with rounded weights; None if nothing."""
    ours, theirs = list(_steps(full)), list(_steps(half))
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            return f"operator {other[0]} {other[2]} is not {one[0]} {one[2]}"
    if len(ours) != len(theirs):
        return "the numbers of operators differ"
    weights, rounded = _constants(full), _constants(half)
    for name, expected in weights.items():
        narrow = rounded.get(name + HALF_SUFFIX)
        found = rounded.get(name) if narrow is None else narrow
        expected = expected.astype(np.float16) if narrow is not None else expected
        if found is None or not np.array_equal(found, expected, equal_nan=expected.dtype.kind == "f"):
            return f"weight {name} is not the rounded one"
    return None


def integers(full: Model, quantised: Model) -> Check:
    """Every 8-bit weight is the float32 one to half a step, but for what its scale cannot reach."""
    weights = _constants(full)
    worst, count, where = 0.0, 0, "no weight"
    for tensor in quantised.subgraphs[0].tensors:
        value, name = flatbuffer.constant(quantised, tensor), flatbuffer.text(tensor.name)
        expected = weights.get(name.removesuffix("_quantized"))
        if value is None or value.dtype != np.int8 or expected is None or expected.shape != value.shape:
            continue
        step = np.max(np.asarray(tensor.quantization.scale))
        axes = [1] * value.ndim
        if len(tensor.quantization.scale) > 1:
            axes[tensor.quantization.quantizedDimension] = -1
            step = np.asarray(tensor.quantization.scale, np.float32).reshape(axes)
        error = float(np.max(np.abs(flatbuffer.dequantised(tensor, value) - expected) / step))
        count += 1
        if error > worst:
            worst, where = error, name
    return Check(
        "weights within half a step",
        count > 0 and worst <= 0.5 + 1e-3,
        f"{count} weights, worst {worst:.3f} steps, {where}",
    )


def floats(model: Model, names: Collection[str]) -> Check:
    """Operators that should stay in float compute in it; their results may be rounded for the next one."""
    integers = sorted(
        name
        for graph in model.subgraphs
        for each in graph.operators
        for name in [flatbuffer.text(graph.tensors[each.outputs[0]].name).removesuffix("_quantized")]
        if name in names
        and flatbuffer.operator(model, each) != "QUANTIZE"
        and flatbuffer.dtype(graph.tensors[each.outputs[0]]) == "int8"
    )
    detail = f"{integers[0]} is not" if integers else f"operators that do: {len(names)}"
    return Check("layers that stay in float", not integers, detail)


def _twin(lowered: Lowered, twin: LiteRTRunner, samples: Sequence[Inputs]) -> Check:
    module = lowered.program.module()
    errors = [
        relative_l2(value, expected)
        for sample in samples
        for value, expected in zip(_ordered(twin.run(sample), lowered), _evaluate(module, lowered, sample), strict=True)
    ]
    worst = float(np.max(errors, initial=0))
    return Check(
        "float32 twin against PyTorch", worst <= TWIN_TOLERANCE, f"relative L2 {worst:.1e} of {TWIN_TOLERANCE:.0e}"
    )


def _evaluate(module: torch.nn.Module, lowered: Lowered, sample: Inputs) -> list[Array]:
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(sample[name]) for name in lowered.input_names))
    return [leaf.numpy() for leaf in torch.utils._pytree.tree_leaves(outputs)]


def _ordered(outputs: dict[str, Array], lowered: Lowered) -> list[Array]:
    return [outputs[name] for name in lowered.output_names]


def _steps(model: Model) -> Iterator[tuple[Any, ...]]:
    """Operators with their options and the names of what they read and write, but for those that widen weights."""
    graph = model.subgraphs[0]

    def names(indices: Sequence[int]) -> list[str]:
        return [flatbuffer.text(graph.tensors[index].name) if index >= 0 else "" for index in map(int, indices)]

    for each in graph.operators:
        inputs, outputs = names(each.inputs), names(each.outputs)
        if inputs != [f"{name}{HALF_SUFFIX}" for name in outputs]:
            options = {} if each.builtinOptions is None else _plain(vars(each.builtinOptions))
            yield flatbuffer.operator(model, each), inputs, outputs, options


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in options.items()}


def _constants(model: Model) -> dict[str, Array]:
    tensors = model.subgraphs[0].tensors
    values = ((flatbuffer.text(tensor.name), flatbuffer.constant(model, tensor)) for tensor in tensors)
    return {name: value for name, value in values if value is not None}


def _peak(value: Array) -> float:
    """Infinities are the model's own, such as masks, and float16 holds them."""
    return float(np.abs(value[~np.isinf(value)]).max(initial=0))
