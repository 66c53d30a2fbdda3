"""Every backbone in every runtime that a user might take instead, measured in one run: latency, memory, size, errors.

    python benchmarks/peers.py                                  # everything; writes docs/peers.md
    python benchmarks/peers.py --models affnet_t casvit_xs      # some of it; prints the tables only
    python benchmarks/peers.py --prepare                        # makes environments and conversions, measures nothing

Each peer has a virtual environment of its own, made here with pip. Conversions are kept; ours are made again when
mobilemix has changed. Every peer × model × number of threads is a process that has as many cores as threads and is
stopped (SIGSTOP) whenever it is not its turn, so that no pool of another one spins. Turns are short blocks of runs, in
rounds; each round has an order of its own, so that a busy moment of the machine is nobody's.

A run that was interrupted continues where it was. Run it on a machine with nothing else to do.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peers_report
from peers_environments import ENVIRONMENTS, InstallError, python
from peers_routes import PEERS, ROOT, ROUTES, SGEMM, Peer
from peers_worker import VARIABLES
from rich.console import Console
from rich.progress import Progress

from mobilemix.models.registry import MODELS

THREADS, ROUNDS = (1, 2), 10
BLOCK_SECONDS = 0.12
CONVERSION_SECONDS, ANSWER_SECONDS = 1200, 180
"""Time limits."""

REVISION = 1
"""Raise it to convert everything again, when what the peers' conversions write has changed."""

Json = dict[str, Any]


def main() -> None:
    """Prepare, measure, and print or write the page."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that processes end with this one
    arguments = parse()
    models = arguments.models or list(BACKBONES)
    peers = arguments.peers or list(PEERS)
    unfinished = arguments.cache / "unfinished"
    if arguments.fresh:
        shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    results: list[Json] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(models) * (1 if arguments.prepare else 1 + len(arguments.threads)))
        for model in models:
            bench = Bench(model, arguments.cache, console)
            progress.update(task, description=f"{model}: conversions")
            prepared = bench.prepare_all(
                [peer for peer in peers if model.startswith(PEERS[peer].models)], arguments.jobs
            )
            progress.advance(task)
            for threads in () if arguments.prepare else arguments.threads:
                progress.update(task, description=f"{model}: {threads} thread{'s' * (threads > 1)}")
                key = [arguments.rounds, {peer: one.get("key") for peer, one in prepared.items()}]
                path = unfinished / f"{model}-{threads}.json"
                known = json.loads(path.read_text()) if path.exists() else {}
                if known.get("key") != key:
                    known = {"key": key, **bench.measure(prepared, threads, arguments.rounds)}
                    path.write_text(json.dumps(known))
                results.append(known)
                progress.advance(task)
    if arguments.prepare:
        return
    if arguments.models or arguments.peers:
        print(peers_report.tables(results))
        return
    (arguments.cache / "samples.json").write_text(json.dumps(results))
    peers_report.write(results, ROOT / "docs")
    shutil.rmtree(unfinished)


BACKBONES = tuple(name for name, spec in MODELS.items() if not spec.weights)
"""Every variant; a trained model is an entry of an architecture that is here already."""


def parse() -> argparse.Namespace:
    """The command line."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mobilemix" / "peers"
    parser.add_argument("--models", nargs="+", choices=BACKBONES, metavar="MODEL")
    parser.add_argument("--peers", nargs="+", choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cache", type=Path, default=home, help="environments, conversions and samples; %(default)s")
    parser.add_argument("--prepare", action="store_true", help="environments and conversions only")
    parser.add_argument("--jobs", type=int, default=1, help="conversions at a time, whose seconds are then longer")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted run")
    return parser.parse_args()


class Bench:
    """One model: its conversions by every peer, and their race."""

    def __init__(self, model: str, cache: Path, console: Console):
        self.model, self.console = model, console
        self.environments, self.artifacts = cache / "environments", cache / "artifacts" / model
        self.reference, self.facts = self._reference()

    def _reference(self) -> tuple[Path, Json]:
        folder = self.artifacts / f"reference-{digest('models')}"
        if not (folder / "facts.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            answer = call(self._command("pytorch", "reference", self.model, folder), CONVERSION_SECONDS)
            (folder / "facts.json").write_text(json.dumps(answer))
        facts: Json = json.loads((folder / "facts.json").read_text())
        return folder / "reference.npz", facts

    def _command(self, environment: str, *arguments: object) -> list[str]:
        worker = Path(__file__).with_name("peers_worker.py")
        return [str(python(environment, self.environments)), str(worker), *map(str, arguments)]

    def key(self, peer: str) -> str:
        """Changes when the peer's file may: with its packages, with the models, and ours with mobilemix."""
        route = PEERS[peer]
        start = self.key(route.starts_from) if route.starts_from else ""
        sources = "." if route.ours else "models"
        return digest(sources, REVISION, peer, ENVIRONMENTS[route.environment], start)

    def prepare_all(self, peers: list[str], jobs: int) -> dict[str, Json]:
        """`prepare` of each, so many at once; those that start from another one's file come after it."""
        first = [peer for peer in peers if not PEERS[peer].starts_from]
        rest = {PEERS[peer].starts_from: None for peer in peers if PEERS[peer].starts_from}
        first += [peer for peer in rest if peer and peer not in first]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self.prepare, first))
            return dict(zip(peers, pool.map(self.prepare, peers), strict=True))

    def prepare(self, peer: str) -> Json:
        """What converting came to: "seconds" and "bytes", or "failed"; with the "folder" and its "key"."""
        route, key = PEERS[peer], self.key(peer)
        folder = self.artifacts / f"{peer}-{key}"
        facts = folder / "facts.json"
        if not facts.exists():
            for old in self.artifacts.glob(f"{peer}-{'?' * len(key)}"):
                shutil.rmtree(old)
            folder.mkdir(parents=True)
            answer = self._convert(peer, route, folder)
            facts.write_text(json.dumps(answer))
            self.console.print(f"{self.model} · {peer}: {answer.get('failed') or 'converted'}", highlight=False)
        result: Json = json.loads(facts.read_text())
        return {**result, "folder": str(folder), "key": key}

    def _convert(self, peer: str, route: Peer, folder: Path) -> Json:
        try:
            command = self._command(route.environment, "convert", peer, self.model, folder)
        except InstallError as error:
            return {"failed": f"not installed: {error}"}
        if route.convert is None:
            return {}
        start = self.prepare(route.starts_from) if route.starts_from else {}
        if "failed" in start:
            return {"failed": start["failed"]}
        if start:
            command.append(start["folder"])
        answer = call(command, CONVERSION_SECONDS)
        if "seconds" in answer:
            answer["seconds"] += start.get("seconds", 0.0)
        return answer

    def measure(self, prepared: dict[str, Json], threads: int, rounds: int) -> Json:
        """The race: {"model", "threads", "macs", "sgemm": times of rounds, "peers": {peer: its row}}."""
        rows = {peer: dict(one) for peer, one in prepared.items()}
        rows[SGEMM] = {"folder": "."}
        with contextlib.ExitStack() as stack:
            workers = {}
            for peer in [name for name, row in rows.items() if "failed" not in row]:
                folder = rows[peer].pop("folder")
                command = self._command(
                    ROUTES[peer].environment, "run", peer, self.model, folder, threads, self.reference
                )
                worker = stack.enter_context(Worker(command, threads))
                rows[peer].update(worker.answer())
                if "failed" not in rows[peer]:
                    workers[peer], rows[peer]["rounds"] = worker, []
            for _ in range(rounds):
                for peer in random.sample(list(workers), len(workers)):
                    answer = workers[peer].ask({"seconds": BLOCK_SECONDS})
                    if "failed" in answer:
                        rows[peer]["failed"] = answer["failed"]
                        del workers[peer]
                        continue
                    rows[peer]["rounds"].append(answer["times"])
                    rows[peer]["peak"] = answer["peak"]
        sgemm = rows.pop(SGEMM)["rounds"]
        return {"model": self.model, "threads": threads, **self.facts, "sgemm": sgemm, "peers": rows}


def digest(sources: str, *rest: object) -> str:
    """Ten digits that stand for the sources of mobilemix below a folder, and the rest."""
    total = hashlib.sha256(repr(rest).encode())
    for path in sorted((ROOT / "mobilemix" / sources).rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:10]


def call(command: list[str], limit: float) -> Json:
    """The one answer of a process."""
    worker = Worker(command, os.cpu_count() or 1, limit)
    with worker:
        return worker.answer()


class Worker:
    """A process of `peers_worker.py`, which runs only from a question to its answer."""

    def __init__(self, command: list[str], threads: int, limit: float = ANSWER_SECONDS):
        variables = dict.fromkeys(VARIABLES, str(threads))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
        self.limit = limit
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # a stopped process whose group loses its parent is continued, and then ends
        )
        self.errors: list[str] = []
        self.reader = threading.Thread(target=self._read_errors, daemon=True)
        self.reader.start()

    def _read_errors(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.errors = [*self.errors[-20:], line.strip()] if line.strip() else self.errors

    def __enter__(self) -> "Worker":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, stopped or not."""
        self.process.kill()
        self.process.wait()

    def ask(self, question: Json) -> Json:
        """Let it run until it has answered."""
        assert self.process.stdin
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._failure()
        return self.answer()

    def answer(self) -> Json:
        """Its next line, after which it is stopped."""
        assert self.process.stdout
        timer = threading.Timer(self.limit, self.process.kill)
        begin = time.monotonic()
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            return self._failure(time.monotonic() - begin >= self.limit)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        answer: Json = json.loads(line)
        return answer

    def _failure(self, late: bool = False) -> Json:
        if late:
            return {"failed": f"no answer in {self.limit:.0f} s"}
        code = self.process.wait()
        self.reader.join(timeout=5)
        return {"failed": f"crashed with {code}: {self.errors[-1] if self.errors else 'no reason given'}"}


if __name__ == "__main__":
    main()
