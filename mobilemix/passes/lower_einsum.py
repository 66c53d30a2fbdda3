"""Einstein sums of one or two tensors as convolutions, linear maps and matrix products."""

import dataclasses
import math
import string
from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments, node_shape
from mobilemix.passes.editing import Edit

aten = torch.ops.aten


class LowerEinsum(Pass):
    """Write an Einstein sum of two tensors in the operator that runtimes are fastest at.

    A block-diagonal map of channels is a grouped 1×1 convolution (ONNX Runtime: a tenth of the time of Einsum):

        before:  x (B, G, I, H, W), w (G, I, O) → einsum "bgihw,gio->bgohw" → y (B, G, O, H, W)
        after:   x → reshape (B, G·I, H, W) → conv2d w (G·O, I, 1, 1), groups G → reshape → y

    Any other sum of products is one matrix product between permutations, none where axes are in order already:

        before:  x (B, N, G, I), w (G, I, O) → einsum "bngi,gio->bngo" → y (B, N, G, O)
        after:   x → (G, B·N, I) → matmul (G, I, O) → (G, B·N, O) → y

    No tensor gets more axes than the operands and the result have. Sums with repeated indices in one tensor, or of more
    than two tensors, stay.
    """

    name = "lower_einsum"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with its two-operand Einstein sums lowered."""
        edit = Edit(program)
        for node in edit.graph.find_nodes(op="call_function", target=aten.einsum.default):
            values = arguments(node)
            terms = _parse(values["equation"], values["tensors"])
            if terms is not None:
                with edit.at(node):
                    edit.replace(node, _Sum(edit, *terms).emit())
        return edit.finish()


@dataclasses.dataclass(frozen=True)
class _Term:
    """An operand and the label of each of its axes."""

    node: fx.Node
    labels: str

    @property
    def sizes(self) -> dict[str, int]:
        """Size of the axis of each label."""
        return dict(zip(self.labels, node_shape(self.node), strict=True))


def _parse(equation: str, operands: Sequence[fx.Node]) -> tuple[_Term, _Term, str] | None:
    """Both operands and the labels of the result, with letters for an ellipsis; None for a sum that stays."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    labels = left.split(",")
    if len(operands) != 2:
        return None
    hidden = [len(node_shape(node)) - len(term.replace("...", "")) for node, term in zip(operands, labels, strict=True)]
    letters = "".join(letter for letter in string.ascii_letters if letter not in equation)[: max(hidden)]
    a, b = (
        _Term(operand, term.replace("...", letters[len(letters) - missing :]))
        for operand, term, missing in zip(operands, labels, hidden, strict=True)
    )
    if not arrow:  # the ellipsis, then every label that occurs once, in alphabetical order
        once = sorted(label for label in left if label.isalpha() and left.count(label) == 1)
        result = "..." + "".join(once)
    if any(len(set(term.labels)) < len(term.labels) for term in (a, b)):
        return None
    if not a.sizes.items() <= {**a.sizes, **b.sizes}.items():
        return None  # an axis of size 1 is broadcast
    return a, b, result.replace("...", letters)


class _Sum:
    """One Einstein sum, and the choice of its form."""

    def __init__(self, edit: Edit, a: _Term, b: _Term, result: str) -> None:
        self._edit, self._result = edit, result
        self._sizes = {**a.sizes, **b.sizes}
        a, b = self._reduce(a, b), self._reduce(b, a)
        self._a, self._b = (b, a) if edit.is_static(a.node) else (a, b)
        self._batch = self._pick(result, lambda label: label in a.labels and label in b.labels)
        self._summed = self._pick(self._a.labels, lambda label: label not in result)
        self._only_a = self._pick(result, lambda label: label not in self._b.labels)
        self._only_b = self._pick(result, lambda label: label not in self._a.labels)

    def emit(self) -> fx.Node:
        if not self._summed:
            return self._elementwise()
        if self._edit.is_static(self._b.node):
            before, found, after = self._a.labels.partition(self._batch + self._summed)
            if found and self._result == before + self._batch + self._only_b + after and self._only_b:
                if after:
                    return self._convolution(before, after)
                if not self._batch:
                    return self._linear(before)
        return self._matmul()

    def _convolution(self, before: str, after: str) -> fx.Node:
        groups, spatial = self._size(self._batch), [self._sizes[label] for label in after]
        spatial = spatial if len(spatial) < 3 else [spatial[0], math.prod(spatial[1:])]
        x = self._reshape(self._a.node, [self._size(before), groups * self._size(self._summed), *spatial])
        w = self._arrange(self._b, self._batch + self._only_b + self._summed)
        w = self._reshape(w, [groups * self._size(self._only_b), self._size(self._summed), *[1] * len(spatial)])
        conv = aten.conv1d.default if len(spatial) == 1 else aten.conv2d.default
        ones, zeros = [1] * len(spatial), [0] * len(spatial)
        y = self._edit.emit(conv, x, w, None, ones, zeros, ones, groups)
        return self._reshape(y, [self._sizes[label] for label in self._result])

    def _linear(self, before: str) -> fx.Node:
        x = self._reshape(self._a.node, [*(self._sizes[label] for label in before), self._size(self._summed)])
        w = self._reshape(self._arrange(self._b, self._only_b + self._summed), [-1, self._size(self._summed)])
        return self._reshape(self._edit.emit(aten.linear.default, x, w), [self._sizes[label] for label in self._result])

    def _matmul(self) -> fx.Node:
        """(batch, left, summed) @ (batch, summed, right); which operand is on the left saves permutations."""
        forms = (
            (self._a, self._b, self._only_a, self._only_b),
            (self._b, self._a, self._only_b, self._only_a),
        )
        a, b, rows, columns = min(forms, key=lambda form: self._permutations(*form))
        left = self._reshape(self._arrange(a, self._batch + rows + self._summed), self._block(rows, self._summed))
        right = self._reshape(
            self._arrange(b, self._batch + self._summed + columns), self._block(self._summed, columns)
        )
        product = self._edit.emit(aten.matmul.default, left, right)
        labels = self._batch + rows + columns
        whole = self._reshape(product, [self._sizes[label] for label in labels])
        return self._reshape(
            self._arrange(_Term(whole, labels), self._result), [self._sizes[label] for label in self._result]
        )

    def _permutations(self, a: _Term, b: _Term, rows: str, columns: str) -> int:
        orders = (
            (a.labels, self._batch + rows + self._summed, a.node),
            (b.labels, self._batch + self._summed + columns, b.node),
            (self._batch + rows + columns, self._result, None),
        )
        return sum(
            self._squeeze(now) != self._squeeze(wanted)
            for now, wanted, node in orders
            if node is None or not self._edit.is_static(node)
        )

    def _elementwise(self) -> fx.Node:
        factors = []
        for term in (self._a, self._b):
            order = self._pick(self._result, term.labels.__contains__)
            shape = [self._sizes[label] if label in order else 1 for label in self._result]
            factors.append(self._reshape(self._arrange(term, order), shape))
        return self._edit.emit(aten.mul.Tensor, *factors)

    def _reduce(self, term: _Term, other: _Term) -> _Term:
        """Sum over the axes that neither the other operand nor the result has."""
        axes = [i for i, label in enumerate(term.labels) if label not in self._result + other.labels]
        if not axes:
            return term
        kept = self._pick(term.labels, (self._result + other.labels).__contains__)
        return _Term(self._edit.emit(aten.sum.dim_IntList, term.node, axes), kept)

    def _arrange(self, term: _Term, order: str) -> fx.Node:
        """The operand with its axes in this order; as it is if only axes of size 1 move, for a reshape follows."""
        if self._squeeze(term.labels) == self._squeeze(order):
            return term.node
        return self._edit.emit(aten.permute.default, term.node, [term.labels.index(label) for label in order])

    def _reshape(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        return node if node_shape(node) == tuple(shape) else self._edit.emit(aten.reshape.default, node, list(shape))

    def _block(self, rows: str, columns: str) -> list[int]:
        sizes = [self._size(self._batch), self._size(rows), self._size(columns)]
        return sizes if self._batch else sizes[1:]

    def _pick(self, labels: str, condition: Callable[[str], bool]) -> str:
        return "".join(filter(condition, labels))

    def _squeeze(self, labels: str) -> str:
        return self._pick(labels, lambda label: self._sizes[label] > 1)

    def _size(self, labels: str) -> int:
        return math.prod(self._sizes[label] for label in labels)
