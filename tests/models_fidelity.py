"""Checks a model against figures measured on its authors' own implementation.

Each JSON file in tests/models/fidelity describes one published variant: the names and shapes of its state dict,
in order, its number of parameters, and the logits that the authors' code gives for the weights and the input
generated below. Weights and input follow from names and shapes alone, so none are stored.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "models" / "fidelity"
BATCH = 2
LOGITS_RTOL = 1e-4  # of the row's norm: float32 rounding over some fifty layers stays well below


@dataclass(frozen=True)
class Fixture:
    name: str
    source: str
    note: str
    input_size: int
    gain: float
    parameters: int
    state_dict: Mapping[str, Sequence[int]]
    logits_first8: Sequence[Sequence[float]]
    logits_l2: Sequence[float]
    argmax: Sequence[int]


def load(name: str) -> Fixture:
    """The fixture tests/models/fidelity/`name`.json."""
    facts = json.loads((FOLDER / f"{name}.json").read_text())
    return Fixture(**{"note": "", **facts})


def weight(name: str, shape: Sequence[int], gain: float) -> Tensor:
    """The tensor that stands for `name`, made from its name and shape alone."""
    shape = tuple(shape)
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith("running_var"):
        return _tensor(0.5 + random.uniform(size=shape))
    if name.endswith("running_mean"):
        return _tensor(0.1 * random.standard_normal(shape))
    z = np.asarray(random.standard_normal(shape))
    vector_like = sum(n != 1 for n in shape) <= 1 and len(shape) != 2 and not (len(shape) == 4 and shape[0] != 1)
    if vector_like:
        return _tensor(0.1 * z + (1.0 if name.endswith("weight") and shape else 0.0))
    if len(shape) == 4 and shape[0] == 2:
        return _tensor(gain * z / math.sqrt(shape[2]))
    if len(shape) == 3 and shape[0] == 2:
        return _tensor(0.1 * z)
    return _tensor(gain * z / math.sqrt(math.prod(shape[1:])))


def weights(state_dict_shapes: Mapping[str, Sequence[int]], gain: float) -> dict[str, Tensor]:
    """A full state dict for these names and shapes, in their order."""
    return {name: weight(name, shape, gain) for name, shape in state_dict_shapes.items()}


def image(fixture: Fixture) -> Tensor:
    """The input of the measurement: (2, 3, input_size, input_size), float32."""
    return _tensor(np.random.RandomState(0).standard_normal((BATCH, 3, fixture.input_size, fixture.input_size)))


def check(model: nn.Module, fixture: Fixture | str) -> None:
    """Asserts that `model` is the published variant: state dict, parameter count, logits and argmax."""
    fixture = load(fixture) if isinstance(fixture, str) else fixture
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(shapes.items()) == [(name, list(shape)) for name, shape in fixture.state_dict.items()]
    assert sum(parameter.numel() for parameter in model.parameters()) == fixture.parameters
    model.load_state_dict(weights(fixture.state_dict, fixture.gain), strict=True)
    with torch.no_grad():
        logits = model.eval()(image(fixture))
    assert logits.shape[0] == BATCH
    for row, first8, l2, argmax in zip(logits, fixture.logits_first8, fixture.logits_l2, fixture.argmax, strict=True):
        rms = l2 / math.sqrt(row.numel())
        torch.testing.assert_close(row[:8], torch.tensor(first8), rtol=LOGITS_RTOL, atol=LOGITS_RTOL * rms)
        torch.testing.assert_close(row.norm(), torch.tensor(l2), rtol=LOGITS_RTOL, atol=0.0)
        assert int(row.argmax()) == argmax


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float32))
