import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

peers = pytest.importorskip("peers")
import peers_environments  # noqa: E402
import peers_matmuls  # noqa: E402
import peers_report  # noqa: E402
import peers_worker  # noqa: E402

from mobilemix.models.affnet import AdaptiveFrequencyFilter  # noqa: E402
from mobilemix.models.flops import count  # noqa: E402
from mobilemix.models.registry import create_model  # noqa: E402

ROUNDING = 1e-5


def row(milliseconds, **facts):
    """A peer that ran: three runs a round, of which the median is stated."""
    rounds = [[one / 2e3, one / 1e3, one / 1e2] for one in milliseconds]
    return {"rounds": rounds, "error": 0.0, "peak": 50e6, "load": 0.5, **facts}


def result(**rows):
    """One model with one thread, on a machine of 10⁹ operations a second; 10⁶ multiply-adds."""
    sgemm = [[2 * peers_report.SGEMM_SIZE**3 / 1e9]]
    return {"model": "casvit_xs", "threads": 1, "macs": 10**6, "sgemm": sgemm, "peers": rows}


def cells(table, start):
    """The cells of a table's only row that starts so."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_latency_is_the_median_of_the_rounds_medians():
    assert np.median(peers_report.milliseconds(row([4, 2, 90]))) == pytest.approx(4)


def test_a_ratio_of_rounds_that_move_together_has_no_interval():
    base = row([1, 2, 3, 4, 5])
    assert peers_report.ratio(row([2, 4, 6, 8, 10]), base) == pytest.approx((2, 2, 2))


def test_the_interval_covers_the_spread_of_the_rounds():
    middle, low, high = peers_report.ratio(row([2, 2, 2, 3, 3, 3, 3]), row([1] * 7))
    assert (low, middle, high) == pytest.approx((2, 3, 3))


def test_details_state_share_memory_and_sizes():
    table = peers_report.details(result(**{"mobilemix-onnx": row([4] * 3, bytes=12e6), "eager": row([8] * 3)}))
    ours, eager = cells(table, "**mobilemix → ONNX Runtime"), cells(table, "PyTorch eager")
    assert ours[1:] == ["4.00", "1.00 [1.00, 1.00]", "50%", "0e+00", "50", "0.50", "12.0"]
    assert eager[1:4] == ["8.00", "2.00 [2.00, 2.00]", "25%"]
    assert table.index("mobilemix") < table.index("eager")


def test_a_peer_that_cannot_is_a_row_with_its_reason_and_last():
    table = peers_report.details(result(ncnn={"failed": "no | such layer"}, eager=row([8])))
    assert table.splitlines()[-1].startswith("| ncnn through pnnx | refused: no \\| such layer |")


def test_a_wrong_answer_is_marked_and_never_the_best():
    one = result(**{"mobilemix-onnx": row([4]), "openvino": row([1], error=0.1), "eager": row([8])})
    assert cells(peers_report.details(one), "OpenVINO")[4] == "**wrong**, 1e-01"
    assert peers_report.best(one, ours=False) == "eager"


def test_the_summary_has_the_best_peer_and_ratios():
    one = result(**{"mobilemix-onnx": row([4]), "mobilemix-litert": row([3]), "onnxsim": row([6]), "eager": row([8])})
    found = cells(peers_report.summary([one]), "casvit_xs")
    assert found[2:6] == ["4.00", "3.00", "torch.onnx.export, onnxsim → ONNX Runtime", "6.00"]
    assert [cell.split()[0] for cell in found[6:]] == ["2.00", "1.50", "2.00", "2.00"]


def test_where_a_peer_is_faster_a_line_says_so():
    slower = result(**{"mobilemix-onnx": row([4]), "openvino": row([2])})
    faster = result(**{"mobilemix-onnx": row([4]), "openvino": row([6])})
    assert "casvit_xs, 1 thread(s): OpenVINO is 2.00 ×" in peers_report.wins([faster, slower])
    assert peers_report.wins([faster]) == "Nowhere in this run."


def test_the_page_keeps_what_was_written_by_hand(tmp_path):
    pytest.importorskip("matplotlib")
    one = [result(**{"mobilemix-onnx": row([4]), "openvino": row([2])})]
    peers_report.write(one, tmp_path)
    page = tmp_path / "peers.md"
    page.write_text(page.read_text().replace("<!-- by hand -->\n", "<!-- by hand -->\n- Its depthwise kernels.\n"))
    peers_report.write(one, tmp_path)
    assert page.read_text().count("- Its depthwise kernels.") == 1
    assert (tmp_path / "peers.svg").read_text().count("<svg") == 1
    (_, openvino) = json.loads((tmp_path / "peers.json").read_text())
    assert (openvino["peer"], openvino["ms"], openvino["ratio"][0]) == ("openvino", 2, 0.5)


def test_environments_of_peers_exist_and_pin_everything():
    assert {peer.environment for peer in peers.ROUTES.values()} == set(peers_environments.ENVIRONMENTS)
    for requirements in (peers_environments.BASE, *peers_environments.ENVIRONMENTS.values()):
        own = str(peers_environments.ROOT)
        assert all("==" in one or one == "-e" or one.startswith(own) for one in requirements), requirements


def test_reason_is_the_first_line_of_the_cause_that_says_something():
    error = RuntimeError("outer")
    error.__cause__ = ValueError("Check 'false' failed at a.cpp:1:\nDetails:\nno such operator\nmore")
    assert peers_worker.reason(error) == "ValueError: no such operator"


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 6)])
def test_matmuls_by_hand_equal_the_filter(size):
    model = torch.nn.Sequential(AdaptiveFrequencyFilter(16)).double()
    torch.nn.init.normal_(model[0].b2)  # above the shrinkage
    x = torch.randn(1, 16, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        found = peers_matmuls.without_ffts(model, (x,)).float()(x.float())
    assert not isinstance(model[0], AdaptiveFrequencyFilter)
    assert (found - expected).norm() < ROUNDING * expected.norm()


def command(code):
    return [sys.executable, "-c", code]


def test_a_worker_answers_and_then_stands_still():
    code = "import sys\nprint('{}', flush=True)\nfor line in sys.stdin: print(line, flush=True)"
    with peers.Worker(command(code), 1) as worker:
        assert worker.answer() == {}
        assert worker.ask({"a": 1}) == {"a": 1}
        state = Path(f"/proc/{worker.process.pid}/stat")
        if state.exists():
            assert state.read_text().split()[2] == "T"
    assert worker.process.poll() is not None


def test_a_crash_is_an_answer_with_the_last_line_of_errors():
    with peers.Worker(command("import sys; sys.exit('no such chip')"), 1) as worker:
        assert worker.answer() == {"failed": "crashed with 1: no such chip"}


def test_an_endless_worker_is_ended():
    with peers.Worker(command("while True: pass"), 1, limit=0.2) as worker:
        assert worker.answer() == {"failed": "no answer in 0 s"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A small model's, with this interpreter in place of the peers' environments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "python", lambda *_: Path(sys.executable))
        patch.setattr(peers, "BLOCK_SECONDS", 0.0)
        yield peers.Bench("affnet_et", tmp_path_factory.mktemp("cache"), peers.Console(quiet=True))


def test_a_race_end_to_end(bench):
    prepared = bench.prepare_all(["eager"], jobs=1)
    prepared["ncnn"] = {"failed": "refused", "folder": "", "key": ""}
    found = bench.measure(prepared, threads=1, rounds=2)
    assert found["macs"] == count(create_model("affnet_et"), (1, 3, 256, 256)).macs
    assert found["peers"]["ncnn"]["failed"] == "refused"
    eager = found["peers"]["eager"]
    assert eager["error"] < ROUNDING
    assert [len(times) for times in eager["rounds"]] == [peers_worker.LEAST_RUNS] * 2
    assert eager["peak"] > 1e6
    assert len(found["sgemm"]) == 2


@pytest.mark.skipif(importlib.util.find_spec("pnnx") is not None, reason="pnnx is here, and converts")
def test_a_conversion_that_raises_is_kept_as_its_reason(bench):
    first = bench.prepare("ncnn")
    assert "pnnx" in first["failed"]
    assert bench.prepare("ncnn") == first


def test_keys_follow_what_a_file_depends_on(monkeypatch):
    bench = object.__new__(peers.Bench)
    before = {peer: bench.key(peer) for peer in peers.PEERS}
    monkeypatch.setitem(peers.ENVIRONMENTS, "onnxruntime", ("onnxruntime==1.0.0",))
    changed = {peer for peer in peers.PEERS if bench.key(peer) != before[peer]}
    assert changed == {"onnxruntime", "onnxsim", "onnxslim"}


def test_the_command_line_knows_its_names():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "peers.py", "--models", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "invalid choice: 'nothing'" in done.stderr
    assert len(peers.BACKBONES) == 13
