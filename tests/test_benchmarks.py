"""The benchmark runs from end to end, and counts as it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import operations, states, tables, tokenizing, trainer_stall
from benchmarks.cases import CASES
from benchmarks.libraries import Dcp, Distrust, Library, Safetensors, Torch
from benchmarks.results import Figure, Results
from distrust import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
SPEC = states.parse("1GiB")


def test_a_run_writes_figures_tables_and_a_picture(forked_python: Path, tmp_path: Path) -> None:
    expected = ["distrust save", "safetensors save", "copy, one thread", "BLAKE3, all cores"]
    outputs = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "picture")}
    flags = [text for name, path in outputs.items() for text in (f"--{name}", str(path))]
    command = [
        forked_python, "-m", "benchmarks.checkpoints", "--states", "1MiB", "--repeats", "1", "--pause", "0",
        "--cases", f"^({'|'.join(expected)})$", "--directory", str(tmp_path), *flags,
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    document = json.loads(outputs["json"].read_text())
    measured = document["samples"]["1MiB"]
    assert {name: measured[name]["seconds"]["0"] > 0 for name in expected} == dict.fromkeys(expected, True)
    assert document["failures"] == {}
    assert "distrust, with digests" in result.stdout
    assert "distrust, with digests" in outputs["markdown"].read_text()
    assert outputs["picture"].read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("text", ["20MiB", "1MiBx10", "65MiB"])
def test_a_state_is_as_large_as_it_says(text: str) -> None:
    spec = states.parse(text)
    tree = states.make(spec)
    assert len(states.flat(tree)) == spec.tensors
    assert states.nbytes(tree) == pytest.approx(spec.nbytes, rel=0.01)


@pytest.mark.parametrize("text", ["", "20", "0MiB", "1GiBx0", "20mb", "-1MiB"])
def test_what_is_no_state_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no state"):
        states.parse(text)


@pytest.mark.parametrize("library", [Distrust(), Safetensors(), Torch(), Dcp()], ids=lambda one: one.name)
def test_each_library_saves_and_loads_the_whole_state(library: Library, tmp_path: Path) -> None:
    spec = states.parse("1MiB")
    library.save(library.state(spec), tmp_path / "saved")
    loaded = library.loader(tmp_path / "saved", spec)()
    if isinstance(loaded, Checkpoint):
        loaded = {"model": loaded.model, "optimizer": loaded.optimizer}
    expected = {name: array.tobytes() for name, array in states.flat(states.make(spec)).items()}
    assert {name: tensor.numpy().tobytes() for name, tensor in states.flat(loaded).items()} == expected


def test_ratios_are_taken_within_a_repeat() -> None:
    results = Results()
    for repeat, (our_time, their_time) in enumerate([(1.0, 2.0), (10.0, 30.0), (2.0, 8.0)]):
        results.add(SPEC, repeat, "distrust save", {"seconds": our_time})
        results.add(SPEC, repeat, "safetensors save", {"seconds": their_time})
    results.add(SPEC, 3, "distrust save", {"seconds": 1.0})  # the other one failed
    figures = Figure("safetensors save"), Figure("distrust save")
    assert results.ratios(SPEC, *figures) == [2.0, 3.0, 4.0]
    (row,) = tables.targets(results, [SPEC])
    assert row[2:] == ("≥ 1.4", "3.00", "2.00 to 4.00", "yes")


def test_a_faster_peer_is_shown_as_faster() -> None:
    results = Results()
    results.add(SPEC, 0, "distrust save", {"seconds": 2.0})
    results.add(SPEC, 0, "safetensors save", {"seconds": 1.0})
    ((_, lines),) = tables.sections(results, SPEC)
    assert {line.cells[0]: line.faster for line in lines} == {
        "distrust, with digests": False,
        "safetensors + fsync": True,
    }
    assert "**0.50**" in tables.markdown(results, [SPEC], "about")


def test_every_figure_that_is_shown_is_measured() -> None:
    names = {case.name for case in CASES}
    assert len(names) == len(CASES)
    shown = {row.figure.case for operation in operations.OPERATIONS for row in operation.rows}
    linux_only = {name for name in shown if "raw write" in name or "cold" in name}
    assert shown - linux_only <= names
    if sys.platform == "linux":
        assert shown == names


def test_tokenizing_is_compared_on_the_same_conversations(tmp_path: Path, capsys) -> None:
    tokenizing.write_data(tmp_path / "data.jsonl", 20)
    tokenizing.make_tokenizer(tmp_path / "tokenizer")
    figures = {}
    for name in (tokenizing.OURS, tokenizing.THEIRS):
        (tmp_path / name).mkdir()
        figures[name] = tokenizing.measure(
            name, tmp_path / "data.jsonl", tmp_path / "tokenizer", tmp_path / name
        )
    # Ours counts the trained tokens, theirs all.
    assert 0 < figures[tokenizing.OURS]["tokens"] < figures[tokenizing.THEIRS]["tokens"]
    capsys.readouterr()
    seconds = {tokenizing.OURS: [1.0, 2.0, 4.0], tokenizing.THEIRS: [2.0, 1.0, 6.0]}
    tokenizing.print_table({name: [{"seconds": value} for value in each] for name, each in seconds.items()})
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| distrust | 1.00 | 2.00 | 4.00 |  |  |",
        "| datasets.map | 1.00 | 2.00 | 6.00 | 1.50 | 0.50 to 2.00 |",
    ]


def test_the_stall_of_the_trainers_own_save_and_ours_are_measured_alike(tmp_path: Path, capsys) -> None:
    state = trainer_stall.State("small", 0.5, width=16)
    measured = trainer_stall.compare([state], 1, tmp_path, lambda _: None)
    our_figures, trainer_figures = (
        measured["small"][saver][0] for saver in (trainer_stall.OURS, trainer_stall.THEIRS)
    )
    assert 0.5 < our_figures["bytes"] / trainer_figures["bytes"] < 2  # the same content
    assert 0 < our_figures["seconds"] < 5
    capsys.readouterr()
    for saver, seconds in ((trainer_stall.OURS, [0.001, 0.002]), (trainer_stall.THEIRS, [0.004, 0.004])):
        measured["small"][saver] = [{"seconds": value, "bytes": 2.0**21} for value in seconds]
    trainer_stall.print_table(measured)
    assert capsys.readouterr().out.splitlines()[2] == "| small | 2.0 | 4.0 | 1.5 | 3.0 | 2.0 to 4.0 |"
