"""Editing an exported program: a copy of its graph, its constants as tensors, and new nodes with their values."""

import contextlib
import contextvars
import copy
import dataclasses
import itertools
import operator
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, TensorArgument
from torch.fx._lazy_graph_module import _LazyGraphModule, _make_graph_module
from torch.utils import _pytree as pytree

from mobilemix.passes.base import PassResult, arguments

Op = Callable[..., Any]

WIDE = "wide_"
"""What the name of a node begins with if float16 artifacts, too, have to compute it in float32.

Names are what converters keep.
"""

EXACT = ("dft_", "ssd_mask")
"""What the names of matrices begin with that passes made, and that are not to be quantised: those of Fourier
transforms, and those that sum decays of scans."""

_ORIGIN = ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node")  # metadata that names a place


@dataclasses.dataclass
class _Constant:
    """A tensor behind a placeholder: its name in the state dict, and its spec if the original program had it."""

    name: str
    tensor: Tensor
    spec: InputSpec | None


class _Chain:
    """Rewrites one after another; what stands between them is nobody's but the next rewrite's.

    Copying a graph, generating its Python code and validating it takes longer than most rewrites. In a chain the first
    edit copies, the others take over that copy, and `completed` validates what comes out.
    """

    def __init__(self) -> None:
        self.draft: ExportedProgram | None = None
        self.spare: tuple[ExportedProgram, fx.Graph] | None = None
        """A program that is not ours, and a copy of its graph in which the last edit changed nothing."""

    def drafted(self, old: ExportedProgram, graph: fx.Graph, **fields: Any) -> ExportedProgram:
        """The program `old` with another graph and other fields, not validated."""
        draft = ExportedProgram.__new__(ExportedProgram)
        draft.__dict__.update(old.__dict__)
        draft.__dict__.update({f"_{name}": value for name, value in fields.items()})
        if graph is not old.graph:
            draft._graph_module = _make_graph_module(old.graph_module, graph, graph_module_cls=_LazyGraphModule)
        self.draft = draft
        return draft

    def completed(self, program: ExportedProgram) -> ExportedProgram:
        """`program` as one that was made by its constructor.

        Raises:
            torch.export's SpecViolationError: its graph is not well-formed.
        """
        if program is not self.draft:
            return program
        return ExportedProgram(
            root=program.graph_module,
            graph=program.graph,
            graph_signature=program.graph_signature,
            state_dict=program.state_dict,
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        )


_CHAIN: contextvars.ContextVar[_Chain | None] = contextvars.ContextVar("chain", default=None)


@contextlib.contextmanager
def chain() -> Iterator[_Chain]:
    """Inside, a program that an `Edit` made is used up by the next one; `completed` makes the last one whole."""
    made = _Chain()
    token = _CHAIN.set(made)
    try:
        yield made
    finally:
        _CHAIN.reset(token)


class Edit:
    """One rewrite of a program, which itself stays as it is (but for what an earlier edit of a `chain` made).

    New nodes are made inside `with edit.at(node)`: they come before `node` and inherit its place in the user's source.
    """

    def __init__(self, program: ExportedProgram, *, tentative: bool = False) -> None:
        """Copy the graph of `program`, or take it over in a `chain`; tensors are shared.

        What is `tentative` always copies: only then are changes of other nodes forgotten if nothing counts as changed.
        """
        self._program = program
        self._chain = None if tentative else _CHAIN.get()
        if self._chain is not None and self._chain.draft is program:
            self.graph = program.graph
        elif self._chain is not None and self._chain.spare is not None and self._chain.spare[0] is program:
            self.graph = self._chain.spare[1]
        else:
            self.graph = copy.deepcopy(program.graph)
            for ours, theirs in zip(self.graph.nodes, program.graph.nodes, strict=True):
                ours.name = theirs.name  # a copy renames what is called like a builtin, such as `input`
        self._found = set(self.graph.nodes)
        self.changed = self._views_examples = False
        self._origin: dict[str, Any] = {}
        self._wide = False
        self._constants = _constants(program, self.graph)
        self._added: dict[tuple[object, ...], list[fx.Node]] = {}
        self._placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self._fake_mode = (
            next(
                (
                    value.fake_mode
                    for node in self.graph.nodes
                    for value in pytree.tree_leaves(node.meta.get("val"))
                    if isinstance(value, FakeTensor)
                ),
                None,
            )
            or FakeTensorMode()
        )

    def constant(self, node: object) -> Tensor | None:
        """The parameter, buffer or constant tensor that `node` stands for; None for any other value."""
        found = self._constants.get(node) if isinstance(node, fx.Node) else None
        return found.tensor if found else None

    def is_static(self, node: fx.Node) -> bool:
        """Whether a value depends on parameters and buffers alone, so that it can become a constant."""
        if self.constant(node) is not None:
            return True
        inputs = node.all_input_nodes
        return node.op == "call_function" and bool(inputs) and all(map(self.is_static, inputs))

    def name(self, node: fx.Node) -> str:
        """The name in the state dict of a constant, that of the node for any other value."""
        found = self._constants.get(node)
        return found.name if found else node.name

    def add_constant(self, name: str, tensor: Tensor) -> fx.Node:
        """A buffer that holds `tensor`; the existing one where the same tensor was added before.

        `name` is its name in the state dict, numbered if another constant that remains has it. It must not lie below
        the name of another tensor ("weight.part" beside "weight"), where no module could hold it.
        """
        tensor = tensor.detach().contiguous()
        alike = self._added.setdefault((tensor.dtype, tuple(tensor.shape)), [])
        for known in alike:
            if torch.equal(self._constants[known].tensor, tensor):
                return known
        first_input = next(node for node in self._placeholders if node not in self._constants)
        with self.graph.inserting_before(first_input):
            node: fx.Node = self.graph.placeholder("b_" + "".join(c if c.isalnum() else "_" for c in name))
        node.target = node.name  # the argument's name, which has to be unique too
        node.meta["val"] = self._fake_mode.from_tensor(tensor, static_shapes=True)
        self._constants[node] = _Constant(name, tensor, None)
        alike.append(node)
        return node

    def view_as_real(self, node: fx.Node) -> fx.Node:
        """Let a complex input of the program be real: (…, 2), the parts along the last axis."""
        value = node.meta["val"]
        node.meta["val"] = self.empty((*value.shape, 2), value.dtype.to_real())
        self.changed = self._views_examples = True
        return node

    @contextlib.contextmanager
    def at(self, node: fx.Node, origin: fx.Node | None = None, wide: bool = False) -> Iterator[None]:
        """Insert before `node`, with its place in the user's source, or that of `origin`.

        What is inserted is `wide`, that is computed in float32 always, if that is asked for or `node` is.
        """
        meta = (origin or node).meta
        outer = self._origin, self._wide
        self._origin = {key: meta[key] for key in _ORIGIN if key in meta}
        self._wide = wide or node.name.startswith(WIDE)
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._origin, self._wide = outer

    def emit(self, op: Op | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of an ATen operator and compute its shape and dtype."""
        assert not isinstance(op, str)  # the type of a node's target allows one, for other kinds of node
        name = WIDE + getattr(op, "_opname", "item") if self._wide else None
        node: fx.Node = self.graph.create_node("call_function", op, args, kwargs, name)
        values_of = lambda item: item.meta["val"] if isinstance(item, fx.Node) else item  # noqa: E731
        with self._fake_mode, torch.no_grad():
            node.meta["val"] = op(*pytree.tree_map(values_of, args), **pytree.tree_map(values_of, kwargs))
        node.meta.update(self._origin)
        return node

    def widen(self, node: fx.Node) -> None:
        """Let a node be `WIDE`."""
        if not node.name.startswith(WIDE):
            node._rename(WIDE + node.name)
            self.changed = True

    def emit_like(self, node: fx.Node, /, **changes: Any) -> fx.Node:
        """The call of `node` again, with some arguments, by their schema names, changed."""
        assert isinstance(node.target, torch._ops.OpOverload)
        values = {**arguments(node), **changes}
        schema = node.target._schema.arguments
        positional = [values[item.name] for item in schema if not item.kwarg_only]
        return self.emit(
            node.target, *positional, **{item.name: values[item.name] for item in schema if item.kwarg_only}
        )

    def items(self, node: fx.Node) -> list[fx.Node]:
        """One node for each tensor that `node` returns."""
        return [self.emit(operator.getitem, node, index) for index in range(len(node.meta["val"]))]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A fake tensor, to trace with."""
        with self._fake_mode:
            return torch.empty(tuple(shape), dtype=dtype)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` use `new` instead."""
        old.replace_all_uses_with(new)
        self.changed = True

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nothing uses."""
        self.graph.erase_node(node)
        self.changed = True

    def exchange(self, old: fx.Node, new: fx.Node) -> None:
        """Replace a node and remove it, so that it no longer counts among the users of its inputs."""
        self.replace(old, new)
        self.erase(old)

    def finish(self) -> PassResult:
        """The edited program without dead nodes and unused constants, or the original if nothing was changed.

        Raises:
            torch.export's SpecViolationError: the edited graph is not well-formed (in a `chain`, at its end).
        """
        if not self.changed:
            if self._chain is not None:
                for node in reversed(self.graph.nodes):
                    if node not in self._found:
                        self.graph.erase_node(node)
                self._chain.spare = (self._program, self.graph)
            return PassResult(self._program, False)
        self.graph.eliminate_dead_code()
        for node in [node for node in self._constants if not node.users]:
            del self._constants[node]
            self.graph.erase_node(node)
        old = self._program
        state_dict, constants = dict(old.state_dict), dict(old.constants)
        given = {spec.arg.name: spec for spec in old.graph_signature.input_specs}
        specs = []
        taken = {item.spec.target for item in self._constants.values() if item.spec}
        for node in self.graph.find_nodes(op="placeholder"):
            item = self._constants.get(node)
            if item is None or item.spec:
                specs.append(given[node.name])
                continue
            name = _unused(item.name, taken)
            taken.add(name)
            state_dict[name] = item.tensor
            specs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
        (output,) = self.graph.find_nodes(op="output")
        results = [
            dataclasses.replace(spec, arg=TensorArgument(value.name)) if isinstance(value, fx.Node) else spec
            for spec, value in zip(old.graph_signature.output_specs, pytree.tree_leaves(output.args[0]), strict=True)
        ]
        example = old.example_inputs
        if self._views_examples:
            example = pytree.tree_map_only(Tensor, _paired, example)
        edited = self._chain or _Chain()
        program = edited.drafted(
            old,
            self.graph,
            graph_signature=ExportGraphSignature(specs, results),
            state_dict={name: tensor for name, tensor in state_dict.items() if name in taken},
            example_inputs=example,
            constants={name: value for name, value in constants.items() if name in taken},
        )
        return PassResult(program if self._chain else edited.completed(program), True)


def _paired(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def bias_name(weight: str) -> str:
    """The name of the bias that goes with a weight."""
    return weight.removesuffix("weight") + "bias" if weight.endswith("weight") else weight + "_bias"


def _constants(program: ExportedProgram, graph: fx.Graph) -> dict[fx.Node, _Constant]:
    written = {spec.target for spec in program.graph_signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT}
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    found = {}
    for spec in program.graph_signature.input_specs:
        name = spec.target
        if name is None or name in written:
            continue
        tensor = program.state_dict.get(name, program.constants.get(name))
        if isinstance(tensor, Tensor):
            found[nodes[spec.arg.name]] = _Constant(name, tensor.detach(), spec)
    return found


def _unused(name: str, taken: Container[str | None]) -> str:
    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(candidate for candidate in candidates if candidate not in taken)
