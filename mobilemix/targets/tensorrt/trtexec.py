"""`trtexec`, the program that comes with TensorRT (and with JetPack, where there may be no Python package).

Its arguments are those of NVIDIA's reference for versions 10 and 11. They are tested with a stand-in that records them;
the program itself needs a GPU, and has not been run.
"""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobilemix.targets.tensorrt.builder import BuildOptions, Profile

_COMPATIBILITY = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}


def find() -> str | None:
    """Its path, if it is on the PATH."""
    return shutil.which("trtexec")


def arguments(program: str, model: Path, engine: Path, options: "BuildOptions", profile: "Profile") -> list[str]:
    """The command that builds an engine as `worker` does, and runs nothing."""
    command = [program, f"--onnx={model}", f"--saveEngine={engine}", "--stronglyTyped", "--noTF32", "--skipInference"]
    if options.workspace_mb:
        command.append(f"--memPoolSize=workspace:{options.workspace_mb}")
    if options.timing_cache:
        command.append(f"--timingCacheFile={options.timing_cache}")
    if options.hardware_compatibility != "none":
        command.append(f"--hardwareCompatibilityLevel={_COMPATIBILITY[options.hardware_compatibility]}")
    if options.version_compatible:
        command.append("--versionCompatible")
    for index, bound in enumerate(("min", "opt", "max") if profile else ()):
        shapes = ",".join(f"{name}:{'x'.join(map(str, shapes[index]))}" for name, shapes in profile.items())
        command.append(f"--{bound}Shapes={shapes}")
    return command


def version(log: Path) -> str:
    """What built, from the banner of its log: "TensorRT.trtexec [TensorRT v100300]" is 10.3.0."""
    found = re.search(r"\[TensorRT v(\d+)(\d\d)(\d\d)\]", log.read_text(encoding="utf-8", errors="replace"))
    return (
        f"TensorRT {'.'.join(str(int(part)) for part in found.groups())} (trtexec)" if found else "TensorRT (trtexec)"
    )
