"""A batch that the artifact leaves open: which inputs have it, at which sizes it is tried, and with what.

A model is captured for a pair of batches, of whose graphs a target makes one (`targets.onnx.batch`). What it answers
to a sample must depend neither on the other samples nor on their number; then what the float64 source answers to that
sample is what every batch is held against.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch.export import ExportedProgram

from mobilemix.errors import BatchError, first_line
from mobilemix.parity import Reference, relative_l2
from mobilemix.signature import inputs_of, outputs_of
from mobilemix.targets.base import Array, Inputs, Lowered

BATCH = "batch"
"""Name of the open axis, the first of inputs and outputs."""

PAIRS = ((2, 3), (5, 6), (8, 9))
"""What models are captured for; the next where passes choose different forms for the two of one.

Never 1, which many operators take for no axis; without a common divisor, so that multiples tell them apart.
"""

INDEPENDENCE = {"float64": 1e-9, "float32": 1e-4}
"""Largest relative L2 difference that another batch may make to a sample's answer, by dtype: order of summation."""

FIXED = "leave out --dynamic-batch"

NEAR = 8
"""How far above the smallest batch the odd one is looked for."""


def resized(shapes: Sequence[tuple[int, ...]], batch: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a model's inputs for another batch: it is the first axis of each that has the first one's size."""
    return tuple((batch, *shape[1:]) if has_batch(shape, shapes) else shape for shape in shapes)


def has_batch(shape: tuple[int, ...], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a shape among those of a model's inputs begins with the batch."""
    return shape[:1] == shapes[0][:1]


def check_outputs(program: ExportedProgram, larger: ExportedProgram) -> None:
    """Make sure that every output has the batch as its first axis.

    Args:
        program: for one batch.
        larger: for another.

    Raises:
        BatchError: one has not.
    """
    for one in (program, larger):
        batch = inputs_of(one)[0].shape[0]
        for index, (shape, _) in enumerate(outputs_of(one)):
            if shape[:1] != (batch,):
                raise BatchError(
                    f"output {index} has the shape {shape} for a batch of {batch}: the batch is not its first axis;"
                    f" {FIXED}"
                )


def is_one_graph(lowered: Lowered) -> bool:
    """Whether the programs for both batches are of the same operators."""
    programs = [each for each in (lowered.program, lowered.larger) if each is not None]
    operators = [[node.target for node in each.graph.nodes if node.op == "call_function"] for each in programs]
    return all(each == operators[0] for each in operators)


@dataclasses.dataclass(frozen=True)
class Trials:
    """What an artifact is tried on at every size.

    Attributes:
        rows: kind of inputs → an even number of samples of batch 1.
        sizes: of the batches that are made of them.
        batched: names of the inputs that have a batch; the others are the same in all samples of a kind.
        captured: batch of the program.
    """

    rows: Mapping[str, Sequence[Inputs]]
    sizes: tuple[int, ...]
    batched: frozenset[str]
    captured: int

    def samples(self) -> dict[str, list[Inputs]]:
        """One batch of each size of each kind, by a name that states both."""
        return {
            f"{kind} × {size}": [self._stack([rows[index] for index in _order(size, len(rows))])]
            for kind, rows in self.rows.items()
            for size in self.sizes
        }

    def probes(self) -> dict[str, Inputs]:
        """By the same names, one batch of the kind as the program has it."""
        probes = {
            kind: self._stack([rows[index] for index in _order(self.captured, len(rows))])
            for kind, rows in self.rows.items()
        }
        return {f"{kind} × {size}": probe for kind, probe in probes.items() for size in self.sizes}

    def references(self, ask: Callable[[Sequence[Inputs]], Reference]) -> dict[str, Reference]:
        """By the same names, what the source answers to each sample of the batch.

        Args:
            ask: runs the source.

        Raises:
            BatchError: it does not run at another batch, or its answer to a sample depends on the others.
        """
        rows = [row for each in self.rows.values() for row in each]
        two, three = PAIRS[0]
        pairs = [[index, index + 1] for index in range(0, len(rows), two)]
        # More samples, and as few as there may be, with others beside each.
        again = [[(index - 1) % len(rows) for index in range(size)] for size in sorted({self.sizes[0], three})]
        try:
            answered = ask([self._stack([rows[index] for index in order]) for order in (*pairs, *again)])
        except Exception as error:  # whatever the user's forward raises
            sizes = ", ".join(map(str, sorted({two, three, self.sizes[0]})))
            raise BatchError(f"the model cannot take batches of {sizes}: {first_line(error)}") from error
        answers = unstacked(answered.outputs[: len(pairs)])
        for order, batch in zip(again, answered.outputs[len(pairs) :], strict=True):
            expected = [np.concatenate(each) for each in zip(*(answers[index] for index in order), strict=True)]
            for index, (one, other) in enumerate(zip(batch, expected, strict=True)):
                if one.shape != other.shape:
                    difference = f"has the shape {one.shape} instead of {other.shape} for a batch of {len(order)}"
                elif not relative_l2(one, other) <= INDEPENDENCE[answered.dtype]:
                    difference = f"is another for the same sample in batches of {two} and {len(order)}, beside others"
                else:
                    continue
                raise BatchError(f"output {index} {difference}: samples must not affect one another; {FIXED}")
        found: dict[str, Reference] = {}
        for kind, each in self.rows.items():
            own, answers = answers[: len(each)], answers[len(each) :]
            for size in self.sizes:
                chosen = [own[index] for index in _order(size, len(each))]
                found[f"{kind} × {size}"] = Reference(chosen, answered.dtype)
        return found

    def _stack(self, rows: Sequence[Inputs]) -> Inputs:
        return {
            name: np.concatenate([row[name] for row in rows]) if name in self.batched else value
            for name, value in rows[0].items()
        }


def unstacked(batches: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """[batch][output], each of some samples → [sample][output], each of one."""
    return [[output[index : index + 1] for output in batch] for batch in batches for index in range(len(batch[0]))]


def _order(size: int, count: int) -> list[int]:
    """Which of `count` samples are in a batch: all of them before one comes again, in an order without a period."""
    generator = np.random.Generator(np.random.PCG64(size))
    order = [int(index) for _ in range(-(-size // count)) for index in generator.permutation(count)]
    return order[:size]


def sizes_to_try(smallest: int, optimum: int, largest: int) -> tuple[int, ...]:
    """The three, and an odd one in between that the model was not captured for, if there is one."""
    stated = {smallest, optimum, largest}
    between = range(smallest + 1, min(largest, smallest + NEAR))
    odd = [size for size in between if size % 2 and size not in {*stated, *PAIRS[0]}]
    return tuple(sorted(stated.union(odd[:1])))
