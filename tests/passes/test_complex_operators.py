"""Every operator of torch that takes complex numbers, on the arguments that torch itself is tested with.

Each call must come out right, or be refused in one line; nothing else. `REFUSED` is what is refused always.
"""

import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mobilemix.capture import capture
from mobilemix.errors import CaptureError, UnsupportedOpError
from mobilemix.passes import lower

op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db

TOLERANCE = 1e-4
"""Largest error relative to the largest number of the result; arguments reach ±9, where float32 sums cancel."""
LARGEST = 1e6
"""Torch's extreme arguments, whose squares overflow, are left out."""
SAMPLES = 10

UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize")
REFUSED = """
    acos acosh asin asinh atan atanh
    as_strided as_strided.partial_views as_strided_copy as_strided_scatter
    logcumsumexp masked_select nonzero nonzero_static argwhere nn.functional.rms_norm combinations
    allclose corrcoef cov equal item normal.in_place uniform randn_like rand_like to_sparse
    cholesky cholesky_inverse cholesky_solve geqrf lu lu_solve lu_unpack matrix_exp ormqr pca_lowrank pinverse qr svd
    svd_lowrank triangular_solve logdet norm.nuc
    linalg.cholesky linalg.cholesky_ex linalg.cond linalg.det linalg.eig linalg.eigh linalg.eigvals linalg.eigvalsh
    linalg.householder_product linalg.inv linalg.inv_ex linalg.ldl_factor linalg.ldl_factor_ex linalg.ldl_solve
    linalg.lstsq linalg.lstsq.grad_oriented linalg.lu linalg.lu_factor linalg.lu_factor_ex linalg.lu_solve
    linalg.pinv linalg.pinv.hermitian linalg.pinv.singular linalg.qr linalg.slogdet linalg.solve
    linalg.solve_ex linalg.solve_triangular linalg.svd linalg.svdvals linalg.tensorinv linalg.tensorsolve
"""
FAST = """
    abs add addcmul baddbmm cat cumprod cumsum div.no_rounding_mode einsum exp eq fft.fft2 fft.hfft fft.irfftn gather
    index_add index_put isnan istft linalg.vector_norm log matmul masked_fill mean nn.functional.conv_transpose2d
    nn.functional.linear nn.functional.pad.circular pow prod roll scatter sigmoid sqrt std stft sum tanh where
"""


class Hole:
    """Where a tensor stands among the arguments of a call."""


class Call(nn.Module):
    """An operator on the tensors given and the other arguments as they are."""

    def __init__(self, operator: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.operator, self.spec = operator, spec
        self.leaves = [Hole if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(given) if leaf is Hole else leaf for leaf in self.leaves], self.spec)
        return self.operator(*args, **kwargs)


def samples(operator: Any, count: int) -> list[tuple[Call, list[Tensor]]]:
    torch.manual_seed(0)
    random.seed(0)
    calls = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(operator.sample_inputs("cpu", torch.complex64))
    for sample in found[:: max(1, len(found) // count)][:count]:
        leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        if tensors and all(tensor.layout == torch.strided and not _is_extreme(tensor) for tensor in tensors):
            calls.append((Call(operator.op, leaves, spec), tensors))
    return calls


def _is_extreme(tensor: Tensor) -> bool:
    return tensor.is_complex() and not bool((tensor.abs() <= LARGEST).all())


def outcome(module: Call, tensors: list[Tensor]) -> str:
    """ "exact" or "refused"; anything else fails."""
    try:
        program = lower(capture(module, tuple(tensors)))
    except (CaptureError, UnsupportedOpError) as error:
        return "refused" if "\n" not in str(error) else "refused at length"
    with torch.no_grad():
        expected = [as_real(leaf) for leaf in tensor_leaves(module(*map(widened, tensors)))]
        found = tensor_leaves(program.module()(*(narrowed(as_real(tensor)) for tensor in tensors)))
    assert [value.shape for value in found] == [value.shape for value in expected]
    for one, other in zip(found, expected, strict=True):
        one, other = one.double(), other.double()
        defined = other.isfinite()
        scale = float(other[defined].abs().max()) if defined.any() else 0.0
        torch.testing.assert_close(one[defined], other[defined], rtol=0, atol=TOLERANCE * max(scale, 1e-3))
    return "exact"


def tensor_leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def as_real(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_neg()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def widened(tensor: Tensor) -> Tensor:
    is_number = tensor.is_complex() or tensor.is_floating_point()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64)) if is_number else tensor


def narrowed(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


OPERATORS = {
    operator.full_name: operator
    for operator in op_db
    if operator.supports_dtype(torch.complex64, "cpu") and not operator.full_name.startswith(("jiterator", *UNDEFINED))
}


@pytest.mark.parametrize("name", FAST.split())
@pytest.mark.filterwarnings("ignore")
def test_operators_that_models_use(name: str) -> None:
    for call in samples(OPERATORS[name], 2):
        assert outcome(*call) == "exact"


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.filterwarnings("ignore")
def test_every_operator_is_exact_or_refused(name: str) -> None:
    found = Counter(outcome(*call) for call in samples(OPERATORS[name], SAMPLES))
    if found:
        assert ("exact" in found) is (name not in REFUSED.split())
