"""Values whose numbers lie in memory in another order than that of their axes, without a copy until one is needed.

A value's axes are factored into *atoms*, so that reshapes and permutations are bookkeeping: the stored tensor stays.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from mobilemix.passes.base import node_shape
from mobilemix.passes.editing import Edit

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class View:
    """A value and where its numbers are.

    Attributes:
        node: the tensor that is stored; its shape is the atoms in some grouping, with axes of one element anywhere.
        atoms: sizes, none of them 1, whose nesting in this order is that of the stored tensor.
        axes: for every axis of the value the indices of the atoms that it is made of, the outermost first.
    """

    node: fx.Node
    atoms: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return tuple(math.prod(self.atoms[atom] for atom in axis) for axis in self.axes)

    def sizes(self, axis: int) -> tuple[int, ...]:
        """Of the atoms of an axis."""
        return tuple(self.atoms[atom] for atom in self.axes[axis])

    def is_stored(self, order: Iterable[int]) -> bool:
        """Whether the atoms lie in this order."""
        return list(order) == list(range(len(self.atoms)))

    def split(self, axis: int, sizes: Sequence[int]) -> "View | None":
        """The same value with one axis factored into `sizes` at least; None if they do not nest with its atoms."""
        found = refine(self.sizes(axis), sizes)
        if found is None:
            return None
        atoms: list[int] = []
        places: dict[int, list[int]] = {}
        pieces = iter(found)
        parts = {}
        for atom in self.axes[axis]:
            parts[atom] = list(_take(pieces, self.atoms[atom]))
        for atom, size in enumerate(self.atoms):
            new = parts.get(atom, [size])
            places[atom] = list(range(len(atoms), len(atoms) + len(new)))
            atoms += new
        axes = tuple(tuple(itertools.chain.from_iterable(places[atom] for atom in each)) for each in self.axes)
        return View(self.node, tuple(atoms), axes)

    def reshaped(self, shape: Sequence[int]) -> "View | None":
        """The value in another shape; None if its atoms do not allow that without a copy."""
        view: View = self
        order = [atom for axis in view.axes for atom in axis]
        found = refine([view.atoms[atom] for atom in order], [size for size in shape if size != 1])
        if found is None:
            return None
        for axis in range(len(view.axes)):
            sizes = list(view.sizes(axis))
            pieces: list[int] = []
            while math.prod(pieces) < math.prod(sizes):
                pieces.append(found.pop(0))
            finer = view.split(axis, pieces)
            assert finer is not None
            view = finer
        remaining = [atom for axis in view.axes for atom in axis]
        axes = []
        for size in shape:
            axis_atoms: list[int] = []
            while math.prod(view.atoms[atom] for atom in axis_atoms) < size:
                axis_atoms.append(remaining.pop(0))
            axes.append(tuple(axis_atoms))
        return View(view.node, view.atoms, tuple(axes))

    def permuted(self, order: Sequence[int]) -> "View":
        """The value with its axes in another order."""
        return View(self.node, self.atoms, tuple(self.axes[axis] for axis in order))

    def blocks(self) -> list[list[int]]:
        """The atoms of each axis of the stored tensor, as far as an axis is made of atoms."""
        found: list[list[int]] = []
        atom = 0
        for size in node_shape(self.node):
            block: list[int] = []
            while math.prod(self.atoms[each] for each in block) < size:
                block.append(atom)
                atom += 1
            found.append(block)
        return found


def plain(node: fx.Node) -> View:
    """A value as it is."""
    shape = node_shape(node)
    atoms = tuple(size for size in shape if size != 1)
    numbers = itertools.count()
    return View(node, atoms, tuple(() if size == 1 else (next(numbers),) for size in shape))


def stored_as(node: fx.Node, view: View, blocks: Sequence[Sequence[int]]) -> View:
    """The value of `view` in a new tensor that holds its atoms in the order of `blocks`."""
    order = [atom for block in blocks for atom in block]
    place = {atom: position for position, atom in enumerate(order)}
    axes = tuple(tuple(place[atom] for atom in axis) for axis in view.axes)
    return View(node, tuple(view.atoms[atom] for atom in order), axes)


def request(edit: Edit, view: View, blocks: Sequence[Sequence[int]]) -> fx.Node:
    """A tensor of one axis per block of atoms (none: one element), copied only if the atoms lie in another order."""
    shape = [math.prod(view.atoms[atom] for atom in block) for block in blocks]
    order = [atom for block in blocks for atom in block]
    constant = edit.constant(view.node)
    if constant is None and view.is_stored(order):
        return reshape(edit, view.node, shape)
    runs = _runs(order)
    stored = sorted(range(len(runs)), key=lambda run: runs[run][0])
    sizes = [math.prod(view.atoms[atom] for atom in runs[run]) for run in stored]
    permutation = [stored.index(run) for run in range(len(runs))]
    if constant is not None:
        if view.is_stored(order) and list(constant.shape) == shape:
            return view.node
        tensor = constant.reshape(sizes).permute(permutation).reshape(shape)
        return edit.add_constant(f"{edit.name(view.node)}_stored", tensor)
    if (direct := _permutation(view.blocks(), blocks)) is not None:
        return edit.emit(aten.permute.default, view.node, direct)
    node = reshape(edit, view.node, sizes)
    return reshape(edit, edit.emit(aten.permute.default, node, permutation), shape)


def _permutation(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> list[int] | None:
    """The order of the first blocks that makes the second, if they are the same."""
    left = [list(block) for block in before]
    if sorted(left) != sorted(map(list, after)):
        return None
    found: list[int] = []
    for block in after:
        found.append(next(k for k, mine in enumerate(left) if mine == list(block) and k not in found))
    return found


def reshape(edit: Edit, node: fx.Node, shape: Sequence[int]) -> fx.Node:
    """`node` in this shape."""
    return node if node_shape(node) == tuple(shape) else edit.emit(aten.reshape.default, node, list(shape))


def materialize(edit: Edit, view: View) -> fx.Node:
    """The value as a tensor of its own axes."""
    return request(edit, view, view.axes)


def refine(a: Sequence[int], b: Sequence[int]) -> list[int] | None:
    """The coarsest nesting of sizes that is a refinement of both; None if there is none."""
    strides = {1}
    for sizes in (a, b):
        stride = 1
        for size in reversed(sizes):
            stride *= size
            strides.add(stride)
    ordered = sorted(strides)
    if any(large % small for small, large in itertools.pairwise(ordered)):
        return None
    return [large // small for small, large in itertools.pairwise(ordered)][::-1]


def _runs(order: Sequence[int]) -> list[list[int]]:
    """Atoms that follow each other in both orders belong together."""
    runs: list[list[int]] = []
    for atom in order:
        if runs and runs[-1][-1] + 1 == atom:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    return runs


def _take(pieces: Iterable[int], size: int) -> Iterable[int]:
    total = 1
    while total < size:
        piece = next(pieces)  # type: ignore[call-overload]
        total *= piece
        yield piece
