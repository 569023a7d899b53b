"""``python -m benchmarks.gpu``: it runs on a CPU in tiny sizes, loses nothing, and judges as it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.devices import describe_machine
from benchmarks.gpu import runs
from benchmarks.gpu.process import Runner
from benchmarks.gpu.records import Record, Records
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import MODES, OURS, PEERS, STEPS, Step, select
from benchmarks.gpu.targets import judge

ROOT = Path(__file__).resolve().parent.parent
QUICK = [
    "ceilings", "resume: float32", "determinism: float32", "overlap", "padded: float32",
    f"speed 1B: {OURS}", "stall: 0.5 GB", "files: distrust",
]  # fmt: skip


def run(python: Path, out: Path, *arguments: object) -> list[str]:
    command = [python, "-m", "benchmarks.gpu", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    log = out / "log.txt"
    assert result.returncode == 0, result.stdout + result.stderr + (log.read_text() if log.exists() else "")
    return result.stdout.splitlines()


def test_a_tiny_run_on_a_cpu_measures_and_is_resumed(forked_python, tmp_path):
    out = tmp_path / "gpu"
    arguments = ["--device", "cpu", "--tiny", "--budget", 200, "--out", out, "--python", forked_python]
    printed = run(forked_python, out, *arguments, "--only", *QUICK)
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    expected = [s.name for s in STEPS if {s.name, s.group} & {*QUICK}]
    assert [record["step"] for record in records] == expected
    assert {record["outcome"] for record in records} == {"ok"}
    assert sum(line.startswith(tuple(expected)) for line in printed) == len(expected)  # one line each
    figures = {record["step"]: record["figures"] for record in records}
    assert figures["resume: float32"]["exact"]
    assert figures["resume: float32"]["kills"] == 2
    assert figures["determinism: float32"]["digests"] == 1
    assert figures["overlap: 1 GB"]["torn"] == figures["overlap: 1 GB, tensor by tensor"]["torn"] == 0
    assert figures["padded: float32"]["losses_differ_by"] < 1e-5
    assert figures["padded: float32"]["norm_differs_by"] < 1e-5
    assert figures[f"speed 1B: {OURS}"]["tokens_per_second"] > 0

    run(forked_python, out, *arguments, "--only", *QUICK)  # nothing is left to do
    assert len((out / "records.jsonl").read_text().splitlines()) == len(records)
    run(forked_python, out, *arguments, "--only", "stall: 0.5 GB", "--again")
    assert len((out / "records.jsonl").read_text().splitlines()) == len(records) + 1

    summary = "\n".join(run(forked_python, out, "--show", out))
    for text in ("the same digest: alone, again, killed twice", "1 of 1", "not measured", "Tiny sizes"):
        assert text in summary
        assert text in (out / "summary.md").read_text()


def test_every_mode_states_its_precision():
    """The default depends on the device."""
    assert all("dtype" in options for options in MODES.values())


CARD = "echo A card, 570.1"
PYTEST = """test -z "$HF_HUB_OFFLINE" || exit 3  # tests of the hub set what they need
cat <<END
E   no
ERROR    distrust:a.py:1 what a test logs
SKIPPED [1] tests/d.py:1: no mlx
ERROR tests/c.py
FAILED tests/a.py::b - no
1 failed, 2 passed, 1 skipped, 4000 deselected, 1 warning, 2 errors in 3.00s

END
exit 1"""


def program(path: Path, text: str) -> str:
    """A program that stands for Python."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "seconds", "budget", "outcome"),
    [
        ("echo words; echo '{\"speed\": 2.0}'", 60, 60, "ok"),
        ("echo 'ValueError: no'; exit 1", 60, 60, "failed"),
        ("exit 3", 60, 60, "failed"),
        ("sleep 60 & echo $! >{pid}; wait", 1, 60, "too slow"),
        ("sleep 60 & echo $! >{pid}; wait", 60, 1, "cut off"),
    ],
)
def test_a_step_ends_within_its_time_and_is_recorded(tmp_path, monkeypatch, text, seconds, budget, outcome):
    monkeypatch.setattr("benchmarks.gpu.process.LEAST_SECONDS", 0)
    pid = tmp_path / "pid"
    python = program(tmp_path / "python", text.replace("{pid}", str(pid)))
    setting = Setting("cpu", True, tmp_path, tmp_path, python)
    runner = Runner(setting, Records(tmp_path), tmp_path / "log", time.monotonic() + budget, {})
    shown: list[Record] = []
    runner.run([Step("group: case", lambda setting: {}, seconds)], shown.append)
    (record,) = Records(tmp_path).all
    assert shown == [record]
    assert record.outcome == outcome
    assert record.figures == ({"speed": 2.0} if outcome == "ok" else {})
    assert (record.reason == "") == (outcome == "ok")
    if pid.exists():  # what a step has started ends with it
        for _ in range(200):
            if not _runs(int(pid.read_text())):
                break
            time.sleep(0.01)
        assert not _runs(int(pid.read_text()))


def test_ctrl_c_ends_the_step_in_progress_and_leaves_it_for_the_next_call(tmp_path):
    pid = tmp_path / "pid"
    python = program(tmp_path / "python", f"echo $$ >{pid}.part; mv {pid}.part {pid}; sleep 60; true")
    command = [
        *(sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--only", "ceilings"),
        *("--out", str(tmp_path / "out"), "--python", python),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not pid.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert "stopped; the same command goes on" in output
    assert not (tmp_path / "out" / "records.jsonl").exists()
    assert not _runs(int(pid.read_text()))


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_what_is_not_installed_is_recorded_as_that(tmp_path):
    setting = Setting("cpu", True, tmp_path, tmp_path, "/nowhere")
    runner = Runner(setting, Records(tmp_path), tmp_path / "log", time.monotonic() + 60, {})
    runner.run([Step("a: b", lambda setting: {}, libraries=("no_such_library",))], lambda record: None)
    (record,) = Records(tmp_path).all
    assert (record.outcome, record.reason) == ("not installed", "no_such_library")


def test_a_line_that_was_cut_off_is_ignored(tmp_path):
    records = Records(tmp_path)
    for name in ("a: 1", "a: 2"):
        records.add(Record(name, "ok", 1.0, "cpu", True))
    file = tmp_path / "records.jsonl"
    os.truncate(file, file.stat().st_size - 7)
    assert [record.step for record in Records(tmp_path).all] == ["a: 1"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"speed 1B: {OURS}", [f"speed 1B: {OURS}"]),  # although others begin with it
        ("weighting", ["weighting: 1B"]),
        ("speed", [step.name for step in STEPS if step.group in ("speed 1B", "speed 8B")]),
        ("resume: f", ["resume: float32"]),
    ],
)
def test_steps_are_chosen_by_the_beginning_of_their_names(text, names):
    assert [step.name for step in select(text)] == names


@pytest.mark.parametrize(("text", "close"), [("resum: float32", "resume: float32"), ("1b", "speed 1B")])
def test_a_step_that_does_not_exist_is_refused_with_close_names(text, close):
    with pytest.raises(LookupError, match=f"no such step; close to it: .*'{close}'"):
        select(text)


TORCH = "echo '2.13.0 {cuda}'; echo 'RuntimeError: {error}' >&2; test -z '{error}'"


@pytest.mark.parametrize(
    ("driver", "torch", "refusal"),
    [
        ("exit 9", TORCH, "nvidia-smi finds no GPU here; without one: --device cpu --tiny"),
        ("echo No devices were found", TORCH, "nvidia-smi finds no GPU here"),
        (CARD, TORCH.format(cuda="None", error="no CUDA"), "torch 2.13.0 has no CUDA: install"),
        (CARD, TORCH.format(cuda="13.0", error="old driver"), "RuntimeError: old driver"),
        (CARD, TORCH.format(cuda="13.0", error=""), None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused_at_once(tmp_path, monkeypatch, driver, torch, refusal):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path / "nvidia-smi", driver)
    python = program(tmp_path / "python", torch)
    if refusal is None:
        assert describe_machine("cuda", python)["card"] == "A card"
        return
    command = [sys.executable, "-m", "benchmarks.gpu", "--python", python, "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert refusal in result.stdout
    assert result.stdout.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_make_gpu_without_a_gpu_installs_nothing(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    program(tmp_path / "nvidia-smi", "exit 9")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", "--no-print-directory", "gpu", "PYTHON=false"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stderr.startswith("nvidia-smi finds no GPU here; without one: make gpu GPU='--device cpu")
    assert not result.stdout
    command = ["make", "has-gpu", "GPU=--device cpu --tiny --only 'speed 1B'"]
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 0


def test_tests_are_counted_and_their_output_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    python = program(tmp_path / "python", PYTEST)
    figures = runs.tests(Setting("cuda", False, tmp_path, tmp_path, python))
    assert (figures["passed"], figures["failed"], figures["skipped"]) == (2, 3, 1)
    assert figures["failures"] == ["ERROR tests/c.py", "FAILED tests/a.py::b - no"]
    assert figures["skips"] == ["SKIPPED [1] tests/d.py:1: no mlx"]
    assert "E   no" in capsys.readouterr().out
    assert verdict(records_of({"tests: on the device": figures}), "the project's tests")[1] == "NOT reached"


def test_all_tests_for_a_device_are_in_the_folders_that_are_run():
    mark = "mark." + "device"
    files = [path for path in (ROOT / "tests").rglob("*.py") if mark in path.read_text("utf-8")]
    assert {str(path.parent.relative_to(ROOT)) for path in files} == {*runs.FOLDERS}
    command = f"pytest --device cuda -m device {' '.join(runs.FOLDERS)}"
    assert (ROOT / "docs/benchmarks.md").read_text("utf-8").count(command) == 2


def test_tests_that_do_not_start_fail(tmp_path):
    python = program(tmp_path / "python", "echo 'ERROR: --device cuda: none' >&2; echo; exit 4")
    with pytest.raises(RuntimeError, match=r"^ERROR: --device cuda: none$"):
        runs.tests(Setting("cuda", True, tmp_path, tmp_path, python))


def test_pytest_refuses_a_device_that_is_not_there(pytestconfig, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests/conftest.py"))
    with pytest.raises(pytest.UsageError, match=r"^--device cuda: torch .* finds none$"):
        conftest.refuse_missing_device("cuda")
    conftest.refuse_missing_device("cpu")


def records_of(figures: dict[str, dict[str, object]]) -> dict[str, Record]:
    return {step: Record(step, "ok", 1.0, "cuda", False, values) for step, values in figures.items()}


def verdict(records: dict[str, Record], text: str, *, tiny: bool = False) -> tuple[str, str]:
    (match,) = (v for v in judge(records, tiny=tiny) if v.target.startswith(text))
    return match.value, match.word


def test_targets_are_judged_by_the_records():
    our_figures = {"tokens_per_second": 65_000.0, "tflops": 400.0, "peak_gib": 10.0}
    peers = {
        name: {"tokens_per_second": speed, "peak_gib": 20.0}
        for name, speed in zip(PEERS, (1e4, 6e4, 5e3), strict=True)
    }
    figures = {
        f"speed 1B: {OURS}": our_figures,
        **{f"speed 1B: {name}": values for name, values in peers.items()},
    }
    records = records_of(figures)
    assert verdict(records, "1B, tokens/s") == ("65,000", "reached")
    assert verdict(records, f"1B, speed / fastest peer ({PEERS[1]})") == ("1.08", "NOT reached")
    assert verdict(records, "1B, memory / that peer") == ("0.50", "reached")
    assert verdict(records, "1B, share of the ceiling") == ("", "not measured")
    assert verdict(records, "8B, tokens/s") == ("", "not measured")
    assert verdict(records, "1B, tokens/s", tiny=True) == ("", "not measured")
    del records[f"speed 1B: {PEERS[0]}"]  # it may be faster than the others
    assert verdict(records, "1B, speed / fastest peer") == ("", "not measured")


def test_a_check_holds_in_every_mode_that_promises_it():
    exact, torn = {"exact": True, "kills": 2}, {"exact": False, "kills": 2}
    records = records_of({"resume: a": exact, "resume: b": torn})
    assert verdict(records, "the same digest") == ("1 of 2; NOT b", "NOT reached")
    records |= records_of({"determinism: b": {"digests": 3, "deterministic": False}})
    assert verdict(records, "the same digest") == ("1 of 1; b does not promise it", "reached")
    assert verdict({}, "the same digest") == ("", "not measured")
