"""A chain of matrix products of which each can be rounded to a grid of its own."""

from collections.abc import Collection, Sequence

import numpy as np

from mobilemix.quantization.sensitivity import Layer, Run
from mobilemix.targets.base import Inputs


class Chain:
    """y = … W₂ · tanh(W₁ x), with outputs of layer i in steps of `steps[i]` where it is quantised."""

    def __init__(self, steps: Sequence[float], measured: int = 64, seconds: float | None = None) -> None:
        random = np.random.default_rng(0)
        self.steps, self.measured = steps, measured
        self.weights = [random.standard_normal((6, 6)) for _ in steps]
        self.layers = [
            Layer(f"net.{index}/out_{index}", f"net.{index}", f"out_{index}", 36, 144, seconds)
            for index in range(len(steps))
        ]
        self.asked: list[frozenset[str]] = []

    def reference(self, watched: Sequence[str] = ()) -> Run:
        return self._run([layer.name for layer in self.layers], watched)

    def runner(self, float_layers: Collection[str], watched: Sequence[str] = ()) -> Run:
        self.asked.append(frozenset(float_layers))
        return self._run(float_layers, watched)

    def _run(self, float_layers: Collection[str], watched: Sequence[str]) -> Run:
        def run(inputs: Inputs) -> dict[str, np.ndarray]:
            x, values = inputs["x"], {}
            for layer, weight, step in zip(self.layers, self.weights, self.steps, strict=True):
                x = x @ weight
                x = x if layer.name in float_layers or not step else np.rint(x / step) * step
                values[layer.output] = x
                x = np.tanh(x)
            return {"y": x, **{name: values[name] for name in watched}}

        return run


def samples(count: int) -> list[Inputs]:
    random = np.random.default_rng(1)
    return [{"x": random.standard_normal((1, 6))} for _ in range(count)]
