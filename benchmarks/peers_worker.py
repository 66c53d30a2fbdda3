"""One peer's process: converts a model, or loads it once and then runs blocks of it when told to over a pipe.

    python peers_worker.py reference MODEL FOLDER
    python peers_worker.py convert PEER MODEL FOLDER [START]
    python peers_worker.py run PEER MODEL FOLDER THREADS REFERENCE

Every answer is one line of JSON. A `run` answers once when it is loaded, and then to each line {"seconds": s} with the
times of as many runs as fit into s seconds.
"""

import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
WARM_UP_RUNS, LEAST_RUNS = 1, 3


def main() -> None:
    """Do what the arguments say; standard output is for answers alone, whatever the packages print."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    action, *arguments = sys.argv[1:]
    try:
        for answer in ACTIONS[action](*arguments):
            answers.write(json.dumps(answer) + "\n")
    except Exception as error:  # whatever it is, it is the answer
        answers.write(json.dumps({"failed": reason(error)}) + "\n")


def reference(model: str, folder: str) -> Any:
    """Writes the input and what the module answers in float64; states its multiply-adds."""
    import numpy as np
    import torch
    from peers_routes import build, image

    from mobilemix.models.flops import count

    x = image(model)
    with torch.inference_mode():
        expected = build(model).double()(torch.from_numpy(x).double())
    np.savez(Path(folder, "reference.npz"), image=x, expected=expected.numpy())
    yield {"macs": count(build(model), x.shape).macs}


def convert(peer: str, model: str, folder: str, start: str | None = None) -> Any:
    """Seconds of the conversion and bytes of its file."""
    from peers_routes import ROUTES

    route = ROUTES[peer]
    begin = time.perf_counter()
    assert route.convert is not None
    route.convert(model, Path(folder), Path(start) if start else None)
    seconds = time.perf_counter() - begin
    files = Path(folder).glob(route.file) if route.file else ()
    yield {"seconds": seconds, "bytes": sum(one.stat().st_size for one in files)}


def run(peer: str, model: str, folder: str, threads: str, reference: str) -> Any:
    """Loads, answers once, and then runs blocks until standard input ends."""
    pin(int(threads))
    import numpy as np
    from peers_routes import ROUTES, SGEMM

    with np.load(reference) as arrays:
        image, expected = arrays["image"], arrays["expected"]
    begin = time.perf_counter()
    function = ROUTES[peer].load(model, Path(folder), int(threads))
    found = function(image)
    seconds = time.perf_counter() - begin
    error = 0.0 if peer == SGEMM else float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    yield {"load": seconds, "error": error}
    for line in sys.stdin:
        budget = json.loads(line)["seconds"]
        for _ in range(WARM_UP_RUNS):
            function(image)
        times: list[float] = []
        while len(times) < LEAST_RUNS or sum(times) < budget:
            begin = time.perf_counter()
            function(image)
            times.append(time.perf_counter() - begin)
        yield {"times": times, "peak": peak_memory()}


def pin(threads: int) -> None:
    """As many cores as threads, so that a runtime that starts more has no advantage of it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reason(error: BaseException) -> str:
    """The first line of the innermost error that says more than where in C++ it was raised, or that more follows."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    lines = [text for text in lines if not text.startswith(("Check '", "Exception from")) and text[-1] != ":"] or lines
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


ACTIONS = {"reference": reference, "convert": convert, "run": run}

if __name__ == "__main__":
    main()
