"""The process in which NVIDIA's code parses and builds: `python -m mobilemix.targets.tensorrt.worker ANSWER`.

It reads one JSON object from standard input ("flavour", "model", "engine" or null, "options", "profile") and writes one
to the file ANSWER: "builder", "refusals" and, of a build, "seconds" and "layers"; or "error". Standard output and
standard error are for what native code prints.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

from mobilemix.errors import InputError, MobilemixError, first_line
from mobilemix.targets.tensorrt import bindings

# TensorRT's names of data types, by ours.
_DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
_MULTIPLIERS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
_MOVERS = ("SHUFFLE", "IDENTITY")


def main() -> None:
    """Answer the one request."""
    request = json.load(sys.stdin)
    try:
        result = _work(**request)
    except MobilemixError as error:
        result = {"error": str(error)}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {first_line(error)}"}
    Path(sys.argv[1]).write_text(json.dumps(result), encoding="utf-8")
    os._exit(0)  # destructors of a network that was refused can crash


def _work(
    flavour: bindings.Flavour,
    model: str,
    engine: str | None,
    options: dict[str, Any],
    profile: dict[str, list[list[int]]],
) -> dict[str, Any]:
    found = bindings.load(flavour)
    trt = found.module
    logger = trt.Logger(trt.Logger.INFO)
    trt.init_libnvinfer_plugins(logger, "")  # the parser falls back on them
    builder = trt.Builder(logger)
    # Version 11 knows nothing but strongly typed networks, and may one day have no such flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    result: dict[str, Any] = {"builder": f"{found.name} {found.version}", "refusals": []}
    if not parser.parse_from_file(model):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        refusals = [[each.node_name(), each.node_operator(), _reason(each.desc())] for each in errors]
        result["refusals"] = refusals or [["", "", "the parser gives no reason"]]
    elif engine is not None:
        config = builder.create_builder_config()
        _configure(trt, config, options)
        cache = _timing_cache(config, options["timing_cache"])  # has to outlive the build
        if profile:
            shapes = builder.create_optimization_profile()
            for name, bounds in profile.items():
                shapes.set_shape(name, *bounds)
            config.add_optimization_profile(shapes)
        began = time.perf_counter()
        plan = builder.build_serialized_network(network, config)
        result["seconds"] = time.perf_counter() - began
        if plan is None:
            return {"error": ""}
        Path(engine).write_bytes(memoryview(plan))
        if cache is not None:
            Path(options["timing_cache"]).write_bytes(memoryview(cache.serialize()))
        result["layers"] = _layers(network)
    return result


def _reason(description: str) -> str:
    """What a parser's error means: an operator that it does not know it takes for that of a plugin."""
    return "it has no such operator" if "Plugin not found" in description else " ".join(description.split())


def _configure(trt: Any, config: Any, options: dict[str, Any]) -> None:
    """Set what was asked for; `mobilemix.targets.tensorrt.builder` has checked that the flavour has it."""
    # TensorFloat-32 rounds float32 operands to 10 bits of fraction. What the graph says is float32 stays it.
    config.clear_flag(trt.BuilderFlag.TF32)
    if megabytes := options["workspace_mb"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, megabytes << 20)
    if (level := options["hardware_compatibility"]) != "none":
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level.upper())
    if options["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if capabilities := options["compute_capabilities"]:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper()), index)


def _timing_cache(config: Any, path: str | None) -> Any:
    """The cache that the builder is to read and fill, or None."""
    if path is None:
        return None
    cache = config.create_timing_cache(Path(path).read_bytes() if Path(path).exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise InputError(f"the timing cache {path} is of another GPU or version, or corrupt; delete it")
    return cache


def _layers(network: Any) -> list[tuple[str, str, str]]:
    """Name, type and precision of every layer that computes values, rather than shapes.

    A network that is strongly typed runs in the types that it declares. A product of two dequantised tensors is one of
    their quantised types: the builder fuses the dequantisation into it.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
        if layer.get_output(index) is not None
    }

    def source(tensor: Any) -> Any:
        """What made a tensor, seen through layers that only move it."""
        layer = makers.get(tensor.name)
        while layer is not None and layer.type.name in _MOVERS:
            layer = makers.get(layer.get_input(0).name)
        return layer

    def precision(layer: Any) -> str:
        dtype = layer.get_output(0).dtype
        if layer.type.name in _MULTIPLIERS:
            operands = [source(layer.get_input(index)) for index in range(min(2, layer.num_inputs))]
            if all(operand is not None and operand.type.name == "DEQUANTIZE" for operand in operands):
                dtype = operands[0].get_input(0).dtype
        return _DTYPES.get(dtype.name, cast(str, dtype.name.lower()))

    return [
        (layer.name, layer.type.name.lower(), precision(layer))
        for layer in layers
        if layer.num_outputs and layer.type.name != "CONSTANT" and not layer.get_output(0).is_shape_tensor
    ]


if __name__ == "__main__":
    main()
