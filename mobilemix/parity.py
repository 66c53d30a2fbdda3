"""Does the artifact compute what the PyTorch model computes? Run it, and compare with the float64 source.

The reference is the model as its author wrote it, in float64, before any pass: whatever the capture, the passes or the
target's compiler got wrong shows up as a difference from it.
"""

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mobilemix.signature import Input
from mobilemix.targets.base import Array, Check, Inputs, Runner
from mobilemix.threads import spread


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What an artifact may differ by and still pass.

    Attributes:
        relative_l2: largest ‖output − reference‖ / ‖reference‖ of any sample.
        cosine: smallest cosine between output and reference of any sample.
    """

    relative_l2: float
    cosine: float


TIERS: Mapping[str, Tolerance] = {
    # Float32 with another order of summation. The four families measure 2e-7 to 6e-6 (docs/exports.md).
    "fp32": Tolerance(relative_l2=1e-5, cosine=1 - 1e-9),
    # Every value rounded to 11 bits of significand, through 50 to 200 layers: 2e-4 to 2e-3 on photographs. On noise, of
    # which a trained network makes next to nothing, small logits are what large activations leave, and the same
    # rounding is a larger share of them: up to 3e-2. Too loose to find a fault, which is not its task: the targets that
    # offer fp16 prove the program and its weights equal to the float32 ones, exactly.
    "fp16": Tolerance(relative_l2=5e-2, cosine=1 - 2e-3),
    # As fp16, with 8 bits of significand: 4e-3 to 1e-2 on photographs, 4e-2 where weights are fresh; 5e-2 on noise.
    "bf16": Tolerance(relative_l2=2e-1, cosine=1 - 2e-2),
    # Values rounded to 8 bits of the range that photographs show, compared on photographs alone: 1e-2 to 2e-1, the most
    # for untrained weights. Too loose to find a fault, as fp16's: the float32 build is proven to be right, and the
    # weights to be its own to half a step. What the file is worth says its accuracy on pictures of the user's.
    "int8": Tolerance(relative_l2=3e-1, cosine=1 - 5e-2),
    # Ranges of each sample's own, no worse than those of photographs.
    "int8-dynamic": Tolerance(relative_l2=3e-1, cosine=1 - 5e-2),
    # Weights alone in fewer numbers, on photographs; the file's weights are proven to be the nearest of them.
    "w8": Tolerance(relative_l2=1e-1, cosine=1 - 1e-2),
    "palette8": Tolerance(relative_l2=1e-1, cosine=1 - 1e-2),
    "palette6": Tolerance(relative_l2=5e-1, cosine=1 - 1e-1),
    "palette4": Tolerance(relative_l2=1.0, cosine=0.5),
    "w4": Tolerance(relative_l2=1.0, cosine=0.5),
    # Products of numbers with 4 bits of significand, on photographs: 3e-2 to 8e-2, 4e-1 where weights are fresh.
    "fp8": Tolerance(relative_l2=5e-1, cosine=1 - 1e-1),
}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How close two sets of outputs are; the worst sample and the worst output count.

    Attributes:
        samples: how many inputs were compared.
        max_abs: largest absolute difference of any element.
        mean_abs: mean absolute difference.
        relative_l2: largest ‖output − reference‖ / ‖reference‖ of a sample.
        cosine: smallest cosine of a sample.
        top1: share of the samples whose largest element of the first output is the same.
    """

    samples: int
    max_abs: float
    mean_abs: float
    relative_l2: float
    cosine: float
    top1: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the tolerance holds; not a number never does."""
        return self.relative_l2 <= tolerance.relative_l2 and self.cosine >= tolerance.cosine


@dataclasses.dataclass(frozen=True)
class Parity:
    """The verdict on one artifact.

    Attributes:
        agreement: by set of inputs ("noise", "photographs").
        tolerance: what decided.
        checks: the target's own verification steps.
        reference: dtype of the source model that was compared with.
        departs: where the outputs disagree, the first value of the graph that does; else None.
    """

    agreement: Mapping[str, Agreement]
    reference: str
    tolerance: Tolerance
    checks: tuple[Check, ...]
    departs: str | None

    @property
    def passed(self) -> bool:
        """Every set of inputs within the tolerance, and no check failed (one that could not run here has not)."""
        return all(one.within(self.tolerance) for one in self.agreement.values()) and all(
            check.passed is not False for check in self.checks
        )


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the source model answers.

    Attributes:
        outputs: [sample][output], flattened in the order of the module's output structure.
        dtype: "float64", or "float32" where the module's own code insists on float32.
    """

    outputs: Sequence[Sequence[Array]]
    dtype: str


def reference(module: nn.Module, samples: Sequence[Inputs], complex_inputs: Collection[str] = ()) -> Reference:
    """Run the module as its author wrote it, in float64 and complex128; the module itself is not changed.

    Args:
        module: takes one tensor per array of a sample.
        samples: what the artifact takes.
        complex_inputs: names of the inputs that the module takes complex; in a sample their last axis is [re, im].
    """
    tensors = [
        [
            torch.view_as_complex(torch.from_numpy(value)) if name in complex_inputs else torch.from_numpy(value)
            for name, value in sample.items()
        ]
        for sample in samples
    ]
    try:
        return Reference(_evaluate(_in_float64(module), tensors, torch.float64), "float64")
    except RuntimeError:
        # Code that writes out float32 somewhere meets float64 elsewhere; float32 throughout is what it was made for.
        return Reference(_evaluate(module, tensors, torch.float32), "float32")


def program_reference(program: ExportedProgram, samples: Sequence[Inputs]) -> Reference:
    """Run a lowered program likewise, node by node, without first making a module of it.

    Args:
        program: its outputs are the user's alone.
        samples: one array for each of its inputs, in order.
    """
    held = {**program.constants, **program.state_dict}

    def evaluate(dtype: torch.dtype) -> list[list[Array]]:
        constants = [None if spec.target is None else _widen(held[spec.target], dtype) for spec in specs]

        def answer(sample: Inputs) -> list[Array]:
            given = (_widen(torch.from_numpy(value), dtype) for value in sample.values())
            arguments = [next(given) if constant is None else constant for constant in constants]
            with torch.no_grad():
                outputs = fx.Interpreter(program.graph_module).run(*arguments, enable_io_processing=False)
            return [leaf.numpy() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]

        with _default_dtype(dtype):
            return spread(answer, samples)

    specs = program.graph_signature.input_specs
    try:
        return Reference(evaluate(torch.float64), "float64")
    except RuntimeError:
        return Reference(evaluate(torch.float32), "float32")


def compare(outputs: Sequence[Sequence[Array]], expected: Sequence[Sequence[Array]]) -> Agreement:
    """Agreement of [sample][output] arrays with their references."""
    pairs = [pair for sample in zip(outputs, expected, strict=True) for pair in zip(*sample, strict=True)]
    difference = np.concatenate([np.abs(np.ravel(one - other)) for one, other in pairs])
    agree = [np.argmax(one[0]) == np.argmax(other[0]) for one, other in zip(outputs, expected, strict=True)]
    return Agreement(
        samples=len(outputs),
        max_abs=float(np.max(difference)),
        mean_abs=float(np.mean(difference)),
        relative_l2=float(np.max([relative_l2(one, other) for one, other in pairs])),
        cosine=float(np.min([cosine(one, other) for one, other in pairs])),
        top1=float(np.mean(agree)),
    )


def relative_l2(value: Array, expected: Array) -> float:
    """‖value − expected‖ / ‖expected‖ in float64; the absolute norm where the reference is all zeros."""
    norm = float(np.linalg.norm(np.ravel(expected).astype(np.float64)))
    error = float(np.linalg.norm(np.ravel(value).astype(np.float64) - np.ravel(expected)))
    return error / norm if norm else error


def cosine(value: Array, expected: Array) -> float:
    """Cosine of the angle between the two as vectors, in float64; 1 where both are all zeros."""
    one, other = np.ravel(value).astype(np.float64), np.ravel(expected).astype(np.float64)
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / norms if norms else float(np.array_equal(one, other))


def noise(inputs: Sequence[Input], count: int) -> list[Inputs]:
    """`count` samples: standard normal floats, integers below each input's bound; the same ones every time."""
    generator = np.random.Generator(np.random.PCG64(0))

    def draw(each: Input) -> Array:
        if each.dtype in ("float32", "float64"):
            return generator.standard_normal(each.shape, dtype=np.dtype(each.dtype).type)
        return generator.integers(0, each.below, each.shape).astype(each.dtype)

    return [{each.name: draw(each) for each in inputs} for _ in range(count)]


def first_departure(program: ExportedProgram, runner: Runner, sample: Inputs, tolerance: float) -> str | None:
    """Name the first value of the artifact that differs from the lowered program's by more than the tolerance.

    The lowered program is evaluated in float64 and matched with the artifact by the names of its values, which the
    targets keep where a value survives their own fusions.

    Returns:
        The name with its error and, where known, the module it belongs to; None where every matched value agrees.
    """
    expected = _Recorder(program).record(sample)
    for name, value in runner.values(sample):
        entry = expected.get(name.removesuffix("_cast_fp16"))
        if entry is None or entry[0].size != value.size:
            continue
        error = relative_l2(value, entry[0])
        if not error <= tolerance:
            return f"{name}: relative error {error:.1e}" + (f", in {entry[1]}" if entry[1] else "")
    return None


class _Recorder(torch.fx.Interpreter):
    """Runs a program in float64 and keeps every tensor by the name of its node, with its module path."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(_in_float64(program.module()))
        self.values: dict[str, tuple[Array, str]] = {}

    def record(self, sample: Inputs) -> dict[str, tuple[Array, str]]:
        with torch.no_grad(), _default_dtype(torch.float64):
            self.run(*(_widen(torch.from_numpy(value)) for value in sample.values()))
        return self.values

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            path = [entry[0] for entry in n.meta.get("nn_module_stack", {}).values()]
            self.values[n.name] = (result.numpy(), path[-1] if path else "")
        return result


def _evaluate(module: nn.Module, samples: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[list[Array]]:
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    thread = threading.local()

    def answer(sample: Sequence[Tensor]) -> list[Array]:
        if not hasattr(thread, "module"):  # a user's module may keep something while it runs
            thread.module = copy.deepcopy(module, dict(shared))
        with torch.no_grad():
            leaves = pytree.tree_leaves(thread.module(*(_widen(value, dtype) for value in sample)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return [
            (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).numpy() for tensor in tensors
        ]

    with _default_dtype(dtype):
        return spread(answer, samples)


def _in_float64(module: nn.Module) -> nn.Module:
    """A copy with float64 and complex128 parameters and buffers (`.double()` leaves complex ones as they are)."""
    wide = {
        id(tensor): nn.Parameter(_widen(tensor.detach()), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else _widen(tensor)
        for tensor in (*module.parameters(), *module.buffers())
    }
    return copy.deepcopy(module, wide)


def _widen(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Floats in `dtype`, complex numbers in its complex one, integers and booleans as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
