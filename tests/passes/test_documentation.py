import re
from pathlib import Path
from typing import Any

import torch
from passes_checks import TOLERANCE, operators, relative_error
from torch import nn

from mobilemix.passes import PASSES

PAGE = (Path(__file__).parents[2] / "docs" / "passes.md").read_text(encoding="utf-8")


def test_every_pass_is_on_the_page_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert set(rows) == {step.name for step in PASSES}
    assert len(rows) == len(set(rows))


def test_the_pass_that_the_page_writes_works() -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[-1]
    module, x = nn.Hardswish(), torch.randn(3, 4)
    names: dict[str, Any] = {"program": torch.export.export(module, (x,))}
    exec(code, names)
    assert "hardswish" not in operators(names["program"])
    assert relative_error(names["program"], module, x) < TOLERANCE
