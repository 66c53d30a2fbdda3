import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx_cases
import pytest
from torch import Tensor, nn
from torch.onnx._internal._lazy_import import onnxscript_apis

from mobilemix.parity import relative_l2
from mobilemix.recipe import Recipe
from mobilemix.targets.onnx import OnnxTarget


@pytest.fixture(scope="session", autouse=True)
def _torchlib_once() -> Iterator[None]:
    """torch.onnx parses its operators' sources again for every export, which is most of the time of a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxscript_apis, "get_torchlib_ops", functools.cache(onnxscript_apis.get_torchlib_ops))
        yield


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Path]:
    """Compile a module, hold the file against it on the example, and return the path."""

    def compile_and_compare(module: nn.Module, *inputs: Tensor, opset: int = 18, **fields: object) -> Path:
        lowered = onnx_cases.lower(module, *inputs, **fields)
        path = tmp_path / "small.onnx"
        OnnxTarget().compile(lowered, Recipe(target="onnx", opset=opset), path)
        sample = {name: value.numpy() for name, value in zip(lowered.input_names, inputs, strict=True)}
        outputs = OnnxTarget().load(path).run(sample)
        assert list(outputs) == list(lowered.output_names)
        for value, reference in zip(outputs.values(), onnx_cases.expected(module, *inputs), strict=True):
            assert value.shape == reference.shape
            assert relative_l2(value, reference) < onnx_cases.ROUNDING
        return path

    return compile_and_compare


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`SmallBackbone`, compiled once; tests that change the file take `backbone`."""
    path = tmp_path_factory.mktemp("backbone") / "small.onnx"
    onnx_cases.compile_backbone(path)
    return path


@pytest.fixture
def backbone(backbone_file: Path, tmp_path: Path) -> Path:
    """A copy of `backbone_file`."""
    return Path(shutil.copy(backbone_file, tmp_path))


@pytest.fixture
def operators(compiled: Callable[..., Path]) -> Callable[..., list[str]]:
    """Operator types of a compiled module's graph, sorted."""

    def of(module: nn.Module, *inputs: Tensor, **fields: object) -> list[str]:
        return sorted(node.op_type for node in onnx.load(compiled(module, *inputs, **fields)).graph.node)

    return of
