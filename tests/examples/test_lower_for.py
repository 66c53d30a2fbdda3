import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {
    "onnx": "onnxruntime",
    "coreml": "coremltools",
    "executorch": "executorch",
    "litert": "litert_torch",
    "openvino": "openvino",
}
TOLERANCE = 2e-5
"""Relative L2 error in float32 of a trained network on noise, which amplifies rounding about tenfold."""


def test_every_example_is_run() -> None:
    assert {path.stem.removeprefix("lower_for_") for path in EXAMPLES.glob("lower_for_*.py")} == PACKAGES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_a_lowered_program_through_another_exporter(name: str) -> None:
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    # In a process of its own: what crashes in another's native code must not take the suite with it.
    command = [sys.executable, str(EXAMPLES / f"lower_for_{name}.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    found = re.search(r"relative error (\S+) against PyTorch", run.stdout)
    assert found is not None, run.stdout
    assert float(found[1]) < TOLERANCE
