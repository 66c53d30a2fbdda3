import dataclasses

import coreml_lowered as case
import numpy as np
import torch
from torch import Tensor, nn

from mobilemix import ops
from mobilemix.capture import capture
from mobilemix.passes import lower
from mobilemix.targets.base import Lowered
from mobilemix.targets.coreml import CoreMLTarget
from mobilemix.targets.coreml.package import read_package

FP16 = dataclasses.replace(case.FP32, precision="fp16")


class Slow(nn.Module):
    """Decays that float16 would round to 1, between operators that may be float16."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * ops.linear_scan(1 - 1e-4 * torch.sigmoid(x), x)


def test_recurrences_of_fp16_packages_are_float32(tmp_path):
    x = torch.ones(400, 2)
    program = lower(capture(Slow(), (x,)), CoreMLTarget.passes)
    lowered = Lowered("slow", program, ("x",), ("y",), None, None, None, {})
    path = tmp_path / "slow.mlpackage"
    CoreMLTarget().compile(lowered, FP16, path)
    expected = Slow()(x.double()).numpy()
    found = CoreMLTarget().load(path).run({"x": x.numpy()})["y"]
    assert np.abs(found / expected - 1).max() < 2e-3
    types = {each.type: each.outputs[0].dtype for each in read_package(path).operations}
    assert (types["reduce_prod"], types["sigmoid"], types["split"]) == ("fp32", "fp32", "fp32")
    assert all(check.passed is not False for check in CoreMLTarget().checks(lowered, FP16, path, [{"x": x.numpy()}]))
