"""mobilemix's own passes over coremltools' program, and where they stand among the stock ones."""

from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813, its name everywhere
from coremltools.converters.mil.mil import Block
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

PROBABILITIES = "probabilities"
"""Name of the value that a classifier's classes and probabilities are read from."""


def pass_pipeline(classifier: bool) -> ct.PassPipeline:
    """The stock passes and ours."""
    pipeline = ct.PassPipeline()
    # It writes x·a + b as a batch norm of variance 1 and epsilon 1e-5, which scales x by 5e-6 too little each time.
    pipeline.remove_passes({"common::fuse_elementwise_to_batchnorm"})
    # The casts to fp16 are named after operations, which until then have to be distinct.
    pipeline.insert_pass(pipeline.passes.index("common::dedup_op_and_var_names"), "mobilemix::name_operations")
    if classifier:
        pipeline.append_pass("mobilemix::append_softmax")
    return pipeline


@register_pass(namespace="mobilemix")
class name_operations(AbstractGraphPass):  # type: ignore[misc]  # noqa: N801, the name is the pass's
    """Name operations after their outputs, because some of coremltools' rules name only the latter after the node."""

    def apply(self, prog: Any) -> None:
        """Rename in place."""
        for operation in prog.functions["main"].operations:
            if operation.op_type != "const" and len(operation.outputs) == 1:
                operation.name = operation.outputs[0].name


@register_pass(namespace="mobilemix")
class append_softmax(AbstractGraphPass):  # type: ignore[misc]  # noqa: N801, the name is the pass's
    """Give a classifier a last output, `probabilities`: the softmax of its first output, in float32.

    It comes after the fp16 casts, so that the small probabilities of many classes are not flushed to zero.
    """

    def apply(self, prog: Any) -> None:
        """Extend `prog` in place."""
        main = prog.functions["main"]
        logits = main.outputs[0]
        with main:
            probabilities = mb.softmax(x=logits, axis=-1, name=PROBABILITIES)
        Block._copy_scope_info(logits, probabilities)
        main.set_outputs([*main.outputs, probabilities])
        # `classify` puts two outputs in the place of this one, and coremltools then indexes the list by position.
        main.set_output_types([*main.output_types, *[ct.TensorType(dtype=np.float32)] * 2])
