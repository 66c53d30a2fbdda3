"""Activations, arithmetic, comparisons: one output value from the values at one position."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.targets.coreml.mil_ops.base import always, channelwise, like, rule

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "identity": lambda x: x,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "relu6": F.relu6,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros(())),
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "floor_div": torch.floor_divide,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "pow": torch.pow,
    "real_div": torch.true_divide,
    "sub": torch.sub,
}
COMPARISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "equal": torch.eq,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "not_equal": torch.ne,
}


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        return function(x)

    return compute


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def compute(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return compute


for _type, _unary_function in UNARY.items():
    rule(_type)(_unary(_unary_function))
for _type, _binary_function in BINARY.items():
    rule(_type)(_binary(_binary_function))
for _type, _binary_function in COMPARISONS.items():
    rule(_type, result=always("bool"))(_binary(_binary_function))


@rule("select", result=like("a"))
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` where `cond` holds, else `b`."""
    return torch.where(cond, a, b)


@rule("clip")
def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """min(max(x, α), β)."""
    return x.clamp(alpha, beta)


@rule("threshold")
def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    """max(x, α)."""
    return x.clamp(min=alpha)


@rule("inverse")
def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    """1 / (x + ε)."""
    return 1 / (x + epsilon)


@rule("log")
def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    """log(x + ε)."""
    return (x + epsilon).log()


@rule("rsqrt")
def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    """1 / √(x + ε)."""
    return (x + epsilon).rsqrt()


@rule("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """x Φ(x), or its approximation by tanh or by σ(1.702 x)."""
    match mode:
        case "EXACT":
            return F.gelu(x)
        case "TANH_APPROXIMATION":
            return F.gelu(x, approximate="tanh")
        case "SIGMOID_APPROXIMATION":
            return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"unknown mode '{mode}'")


@rule("softmax")
def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
    """exp(x) / Σ exp(x) along `axis`."""
    return x.softmax(int(axis))


@rule("elu")
def elu(x: Tensor, alpha: Tensor) -> Tensor:
    """α (eˣ − 1) below zero."""
    return torch.where(x < 0, alpha * x.expm1(), x)


@rule("leaky_relu")
def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    """α x below zero."""
    return torch.where(x < 0, alpha * x, x)


@rule("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """α x below zero, α per channel."""
    return torch.where(x < 0, channelwise(alpha, x.ndim) * x, x)


@rule("clamped_relu")
def clamped_relu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """min(β, x) from zero on, min(β, α x) below."""
    return torch.where(x < 0, alpha * x, x).clamp(max=beta)


@rule("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    """x where x ≥ α, else 0."""
    return torch.where(x < alpha, torch.zeros(()), x)


@rule("linear_activation")
def linear_activation(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """α x + β."""
    return alpha * x + beta


@rule("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """α tanh(β x)."""
    return alpha * torch.tanh(beta * x)


@rule("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """α x + β, clipped to [0, 1]."""
    return (alpha * x + beta).clamp(0, 1)


@rule("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """α log(1 + exp(β x)), α and β per channel."""
    scaled = channelwise(beta, x.ndim) * x
    return channelwise(alpha, x.ndim) * torch.logaddexp(scaled, torch.zeros(()))
