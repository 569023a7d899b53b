"""Reading, thinning, smoothing and drawing runs; their summary."""

from __future__ import annotations

import io
import json
import math
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distrust import Checkpoint, CheckpointManager
from distrust.data import NO_CLASS
from distrust.errors import ConfigError, DataError, DistrustWarning, RunNotFound, WriteFailed
from distrust.reporting import figures, run_reader, summary
from distrust.reporting.console import ConsoleReporter
from distrust.reporting.panels import PANELS, classes_by_share
from distrust.reporting.run_reader import COLUMNS, read_run
from distrust.reporting.series import smooth, thin
from distrust.training.events import Evaluated, Preparing
from run_folders import (
    CLASSES,
    HOSTILE,
    evaluation_line,
    step_line,
    write_checkpoints,
    write_lines,
    write_provenance,
    write_run,
)

numbers = st.floats(allow_nan=True, allow_infinity=True)
some_of_a_step = st.dictionaries(st.sampled_from(COLUMNS), numbers)
some_of_an_evaluation = st.dictionaries(
    st.text('ab/"\n\\é😀', max_size=4).map("eval_loss/".__add__)
    | st.sampled_from(["eval_loss", "eval_perplexity"]),
    numbers,
    min_size=1,
)


def as_json_number(value: float) -> float | str:
    """As a run writes a number."""
    return value if math.isfinite(value) else str(value)


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines")


@settings(max_examples=50)
@given(data=st.data())
def test_what_a_run_writes_is_read_back(scratch, data):
    steps = sorted(data.draw(st.sets(st.integers(1, 10**18 - 1), max_size=6)))
    evaluated = sorted(data.draw(st.sets(st.integers(0, 10**18 - 1), max_size=3)))
    rows = {step: data.draw(some_of_a_step) for step in steps}
    evaluations = {step: data.draw(some_of_an_evaluation) for step in evaluated}
    lines = [(step, 0, values) for step, values in rows.items()]
    lines += [(step, 1, values) for step, values in evaluations.items()]
    text = "".join(
        json.dumps({"step": step, **{name: as_json_number(value) for name, value in values.items()}}) + "\n"
        for step, _, values in sorted(lines, key=lambda line: line[:2])
    )
    torn = data.draw(st.sampled_from(["", '{"step": 9', "{", "\x00"]))
    (scratch / "metrics.jsonl").write_text(text + torn, encoding="utf-8")

    run = read_run(scratch)

    assert run.steps.step.tolist() == steps
    for name in COLUMNS:
        expected = [rows[step].get(name, math.nan) for step in steps]
        read = run.steps.columns.get(name, np.full(len(steps), np.nan)).tolist()
        assert all(map(same, read, expected))
    assert [e.step for e in run.evaluations] == evaluated
    for e in run.evaluations:
        assert e.metrics.keys() == evaluations[e.step].keys()
        assert all(same(e.metrics[name], value) for name, value in evaluations[e.step].items())


def on_device(step: int) -> dict[str, object]:
    """A line of a step, on a GPU."""
    return step_line(step, device_bytes=17 << 30, device_peak_bytes=30 << 30, device_reserved_bytes=33 << 30)


def memory_facts(run) -> dict[str, str]:
    return {name: f"{value} {detail}".strip() for name, value, detail in summary.facts(run) if "peak" in name}


@given(switch=st.integers(0, 4), total=st.integers(0, 2**50))
def test_logs_of_earlier_versions_have_one_sum_of_memory(scratch, switch, total):
    """The later lines of a run that began with such a version have the host's."""
    lines = [step_line(step) for step in range(1, 5)]
    for line in lines[:switch]:
        del line["host_bytes"], line["host_peak_bytes"]
        line["memory_bytes"] = total
    write_lines(scratch, lines)
    run = read_run(scratch)
    assert run.steps.columns["host_bytes"].tolist() == [
        line.get("host_bytes", line.get("memory_bytes")) for line in lines
    ]
    assert "memory_bytes" not in run.steps.columns
    peak = max(line.get("host_peak_bytes", line.get("memory_bytes")) for line in lines)
    assert memory_facts(run) == {"peak memory": f"{peak / 2**30:.3g} GiB"}
    assert PANELS["memory"].has(run)
    assert not PANELS["device"].has(run)


def test_memory_of_host_and_device_are_shown_apart(tmp_path):
    write_lines(tmp_path, [on_device(step) for step in (1, 2)])
    run = read_run(tmp_path)
    assert memory_facts(run) == {
        "peak device memory": "30 GiB 33 GiB reserved",
        "peak host memory": "0.885 GiB",
    }
    svg = render_runs(run)
    assert {"Memory", "peak 0.885 GiB", "Device memory", "peak of the arrays 30 GiB"} <= texts(svg)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json}", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON|recursion"),
        ('{"loss": 1.0}', "step: missing"),
        ('{"step": -1}', "step: not a whole number"),
        ('{"step": true}', "step: not a whole number"),
        ('{"step": 2.0}', "step: not a whole number"),
        ('{"step": 2, "loss": null}', "loss: neither a number"),
        ('{"step": 2, "loss": "low"}', "loss: neither a number"),
        ('{"step": 2, "loss": 1%s}' % ("0" * 400), "loss: too large a number"),
        ('{"step": 2, "loss": 1%s}' % ("0" * 5000), "a number with too many digits"),
        ('{"step": 2, "eval_loss": []}', "eval_loss: neither a number"),
        ('{"step": 1, "loss": 2.0}', "step: 1 comes after 1"),
    ],
)
def test_a_line_that_no_run_writes_is_reported_with_its_location(tmp_path, line, message):
    (tmp_path / "metrics.jsonl").write_text(
        f"{json.dumps(step_line(1))}\n{line}\n{json.dumps(step_line(3))}\n"
    )
    with pytest.raises(DataError, match=message) as caught:
        read_run(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/metrics.jsonl:2: ")
    assert "\n" not in str(caught.value)


def test_the_state_of_an_extended_run_is_not_wrong(tmp_path):
    """Its new length is known from its next checkpoint on."""
    run = write_run(tmp_path / "run", steps=60)
    assert summary.state(read_run(run)) == ("finished", "step 60 of 60")
    write_lines(run, [step_line(step) for step in range(1, 74)])
    assert summary.state(read_run(run)) == ("not finished", "step 73; the newest checkpoint is of step 60")
    assert summary.facts(read_run(run))[0] == summary.Fact("steps", "73")


def test_unknown_options_are_shown(tmp_path):
    with CheckpointManager(tmp_path / "checkpoints") as manager:
        config = {"lora_rank": 2, "a_new_option": 3, "fingerprints": {"data": "1"}}
        manager.save(Checkpoint(step=1, config=config))
    shown = {option.name: option.value for option in summary.options(read_run(tmp_path))}
    assert shown == {"lora_rank": "2", "a_new_option": "3"}


def test_empty_lines_are_ignored(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        f"\n{json.dumps(step_line(1))}\r\n \n{json.dumps(step_line(2))}\n"
    )
    assert read_run(tmp_path).steps.step.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("metrics.jsonl", 1 << 40, "metrics.jsonl: 1,099,511,627,776 bytes, more than"),
        ("metrics.jsonl", run_reader.MAX_LOG_BYTES, "metrics.jsonl:2: more than 1,048,576 bytes"),
        ("provenance.json", 1 << 40, "provenance.json: more than 1,048,576 bytes"),
    ],
)
def test_a_file_larger_than_any_run_writes_is_reported_at_once(tmp_path, name, size, message):
    """The rest of it is a hole."""
    (tmp_path / name).write_text(f"{json.dumps(step_line(1))}\n")
    os.truncate(tmp_path / name, size)
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize("limit", ["MAX_STEPS", "MAX_EVALUATED"])
def test_a_log_of_more_lines_than_any_run_writes_is_reported(tmp_path, monkeypatch, limit):
    lines = [step_line(1), {"step": 1, "eval_loss": 2.0}, step_line(2), {"step": 2, "eval_loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.setattr(run_reader, limit, 2)
    assert len(read_run(tmp_path).steps) == 2
    monkeypatch.setattr(run_reader, limit, 1)
    with pytest.raises(DataError, match=r"metrics.jsonl:[34]: more than"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "provenance.json"])
def test_a_named_pipe_does_not_block(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: cannot be read: not a regular file"):
        read_run(tmp_path)


def test_bytes_that_are_not_text_are_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(DataError, match=r"metrics.jsonl:1: not UTF-8"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"examples": "many"}, "examples: not a whole number"),
        ({"edges": [1.0, 1.0], "counts": [3]}, "edges"),
        ({"counts": [1, 2]}, "edges"),
        ({"edges": [-1e308, 1e308], "counts": [1 << 52]}, "edges: not one more than counts, above 0"),
        ({"effective_examples": 1e308}, "effective_examples: more than there are examples"),
        ({"effective_examples": 10**400}, "effective_examples: too large a number"),
        ({"classes": [{"name": 7}]}, "name: not a string"),
        ({"classes": {}}, "classes: not a list"),
        ({"heaviest": [{"where": "a:1", "weight": "nan"}]}, "heaviest.authority_weight: not a finite number"),
        ({"quantiles": {"weight": [1, 2]}}, "quantiles.weight"),
        ({"alpha": []}, "alpha"),
    ],
)
def test_a_provenance_that_no_run_writes_is_reported_with_its_field(tmp_path, changed, message):
    path = write_provenance(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(DataError, match=message) as caught:
        read_run(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_the_provenance_comes_back(tmp_path):
    path = write_provenance(tmp_path)
    result = read_run(tmp_path).provenance
    assert result.weights.as_json() | dict(result.options) == json.loads(path.read_text())


def test_a_folder_that_is_not_a_run_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    for path, message in [
        (tmp_path / "begun", "no step and saved nothing yet"),
        (tmp_path / "run" / "checkpoints", f"checkpoints of a run; give {tmp_path / 'run'}$"),
        (tmp_path, "no run here"),
        (tmp_path / "no", "no such"),
        (tmp_path / "file", "a file"),
    ]:
        with pytest.raises(RunNotFound, match=message) as caught:
            read_run(path)
        assert "\n" not in str(caught.value)


def test_without_metrics_the_steps_come_from_the_newest_intact_checkpoint(tmp_path):
    write_checkpoints(tmp_path, [20, 40, 60], max_steps=60)
    run = read_run(tmp_path)
    assert run.from_history
    assert run.steps.step.tolist() == list(range(1, 61))
    assert run.steps.columns["loss"].tolist() == [step_line(step)["loss"] for step in range(1, 61)]
    assert [e.step for e in run.evaluations] == [20, 40, 60]
    assert "seconds" not in run.steps.columns

    newest = run.newest
    history = next(tensor for tensor in newest.tensors if tensor.name == "history.loss")
    with newest.path.open("r+b") as file:
        file.seek(history.offset + 3)
        file.write(b"\xaa")
    with pytest.warns(DistrustWarning, match="history.loss"):
        assert len(read_run(tmp_path).steps) == 40


def test_damaged_checkpoints_do_not_hide_the_run(tmp_path):
    write_run(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-80.safetensors").write_bytes(b"cut")
    run = read_run(tmp_path)
    assert [file.step for file in run.checkpoints.damaged] == [80]
    assert summary.state(run)[0] == "finished"


def test_the_state_of_a_run(tmp_path):
    assert summary.state(read_run(write_run(tmp_path / "whole"))) == ("finished", "step 60 of 60")
    assert summary.state(read_run(write_run(tmp_path / "half", max_steps=90)))[0] == "not finished"
    early = tmp_path / "early"
    write_checkpoints(early, [20], max_steps=90)
    assert summary.state(read_run(early)) == ("ended early", "step 20 of 90")
    write_lines(early, [step_line(step) for step in range(1, 31)])  # resumed from a final checkpoint
    assert summary.state(read_run(early))[0] == "not finished"
    begun = tmp_path / "begun"
    begun.mkdir()
    write_lines(begun, [step_line(1)])
    assert summary.state(read_run(begun)) == ("not saved yet", "step 1: no checkpoint exists")


def test_the_best_evaluation_is_by_the_metric_of_the_run(tmp_path):
    run = read_run(write_run(tmp_path))
    assert summary.best_evaluation(run) == ("eval_loss", evaluation_line(60)["eval_loss"], 60)
    assert summary.best_checkpoint(run).step == 60


def test_of_many_evaluations_the_first_the_best_and_the_newest_are_shown(tmp_path):
    lines = [evaluation_line(step) for step in range(1, 101)]
    lines[29]["eval_loss"] = 0.5
    write_lines(tmp_path, lines)
    _, rows, left_out = summary.evaluations(read_run(tmp_path))
    assert [row.name for row in rows][-2:] == ["30", "1"]
    assert rows[0].name == "100"
    assert [row.best for row in rows].count(True) == 1
    assert rows[-2].best
    assert len(rows) + left_out == 100


values = arrays(
    np.float64, st.integers(1, 300), elements=st.floats(-1e9, 1e9) | st.sampled_from([np.nan, np.inf])
)


@given(values=values, points=st.integers(4, 40))
def test_thinning_keeps_first_last_lowest_and_highest(values, points):
    x, y = thin(np.arange(len(values)), values, points)
    assert len(x) <= max(points, 4)
    assert (np.diff(x) > 0).all()
    assert np.array_equal(y, values[x], equal_nan=True)
    assert (x[0], x[-1]) == (0, len(values) - 1)
    finite = values[np.isfinite(values)]
    if finite.size:
        assert (np.nanmin(y[np.isfinite(y)]), np.nanmax(y[np.isfinite(y)])) == (finite.min(), finite.max())


@given(values=values, window=st.integers(1, 50))
def test_smoothing_is_the_mean_of_the_finite_values_around(values, window):
    result = smooth(values, window)
    assert len(result) == len(values)
    for at, mean in enumerate(result):
        around = values[max(0, at - (window - 1) // 2) : at + window // 2 + 1]
        finite = around[np.isfinite(around)]
        if finite.size:
            assert mean == pytest.approx(finite.mean(), rel=1e-9, abs=1e-3)
        else:
            assert np.isnan(mean)


def test_names_are_the_parts_that_distinguish_runs():
    def names(*paths):
        return figures.distinct_names([Path(path) for path in paths])

    assert names("runs/a") == ["a"]
    assert names("runs/a", "runs/b") == ["a", "b"]
    assert names("runs/a/seed", "runs/b/seed") == ["a", "b"]
    assert names("x/a/s/1", "x/b/s/2") == ["a/s/1", "b/s/2"]
    assert names("runs", "runs/b") == ["runs", "runs/b"]
    assert names("a\x1b[31m", "b") == ["a\ufffd[31m", "b"]


@given(
    paths=st.lists(
        st.lists(st.sampled_from("ab"), min_size=1, max_size=4), unique_by=tuple, min_size=2, max_size=4
    )
)
def test_no_two_runs_have_one_name(paths):
    names = figures.distinct_names([Path("/", *parts) for parts in paths])
    assert len(set(names)) == len(names)
    assert all(names)


def render_runs(*runs, panels=(), axis="step", suffix=".svg", **more) -> bytes:
    return figures.render(figures.draw(figures.prepare_runs(runs, axis=axis), panels, **more), suffix)


def texts(svg: bytes) -> set[str]:
    return {
        "".join(element.itertext())
        for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    }


def test_a_picture_has_a_panel_for_all_that_is_known(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    svg = render_runs(run)
    titles = {panel.title for panel in PANELS.values()}
    assert titles & texts(svg) == titles - {"Device memory"}  # it trained in the host's
    assert {*CLASSES, "all", "dashed: weighted", "run"} <= texts(svg)
    assert render_runs(run, panels=["eval"]) == render_runs(run, panels=["eval"])  # the same bytes each time

    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "provenance.json").unlink()
    titles = {PANELS[name].title for name in ("loss", "eval", "lr", "norm")}
    assert {panel.title for panel in PANELS.values()} & texts(
        render_runs(read_run(tmp_path / "run"))
    ) == titles


def test_several_runs_are_distinguishable(tmp_path):
    runs = [read_run(write_run(tmp_path / name, weighting=name)) for name in ("off", "monotone", "published")]
    assert {"off", "monotone", "published"} <= texts(render_runs(*runs))
    crowd = figures.prepare_runs([runs[0]] * 12).runs
    assert len({shown.colour for shown in crowd}) == 12


def test_a_panel_without_data_is_reported(tmp_path):
    write_lines(tmp_path, [step_line(1)])
    run = read_run(tmp_path)
    with pytest.warns(DistrustWarning, match="--panels eval"):
        render_runs(run, panels=["loss", "eval"])
    with pytest.raises(ConfigError, match="no panel 'lose'"):
        render_runs(run, panels=["lose"])
    write_lines(tmp_path, [])
    with pytest.raises(RunNotFound, match="nothing to draw"):
        render_runs(read_run(tmp_path))
    with pytest.raises(ConfigError, match=r"--x tokens: .*metrics.jsonl has no tokens"):
        render_runs(read_run(tmp_path), axis="tokens")


def test_axes_of_tokens_and_of_time(tmp_path):
    lines = [step_line(step, tokens=10, seconds=60, stall_seconds=0) for step in range(1, 11)]
    for name in ("tokens", "seconds", "stall_seconds"):
        del lines[3][name]  # restored after a crash
    write_lines(tmp_path, [*lines, evaluation_line(10)])
    run = read_run(tmp_path)
    assert figures.prepare_runs([run], axis="tokens").runs[0].x.tolist() == [
        10.0 * step for step in range(1, 11)
    ]
    scene = figures.prepare_runs([run], axis="time")
    assert scene.x_label == "minutes"
    assert scene.runs[0].x.tolist() == pytest.approx(range(1, 11))
    assert scene.runs[0].positions_of(np.array([0, 10])).tolist() == [0, 10]


def test_names_are_drawn_as_text(tmp_path):
    svg = render_runs(read_run(write_run(tmp_path, classes=HOSTILE)), panels=["sources", "eval"])
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
    assert not tags & {"script", "img", "foreignObject"}
    shown = " ".join(texts(svg))
    assert "<script>document" in shown
    assert "</svg><img" in shown
    assert "${x_1}$" in shown  # no formula


@pytest.mark.parametrize("value", ["nan", "-inf", 1e308, -1e308, 5e-324])
def test_no_number_breaks_a_picture(tmp_path, value):
    names = [name for name in COLUMNS if name != "step"]
    lines = [step_line(step, **dict.fromkeys(names, value)) for step in range(1, 5)]
    write_lines(tmp_path, [*lines, on_device(5), evaluation_line(5) | {"eval_loss": value}])
    panels = ["loss", "eval", "stall", "memory", "device"]
    render_runs(read_run(tmp_path), axis="time", suffix=".png", panels=panels)
    summary.facts(read_run(tmp_path))


def test_the_figure_of_a_million_steps_is_small(tmp_path):
    run = read_run(write_run(tmp_path))
    steps = np.arange(1, 1_000_001)
    columns = {name: np.sin(steps / 1e5) + 2 for name in COLUMNS}
    long = type(run)(path=tmp_path, steps=type(run.steps)(steps, columns))
    assert len(render_runs(long)) < 3_000_000


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "plot.png"
    figures.write(target, b"one")
    figures.write(target, b"two")
    assert target.read_bytes() == b"two"
    folder = tmp_path / "folder.png"
    (folder / "full").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe.png")
    for path in (folder, tmp_path / "pipe.png"):  # not a wrong usage: exit code 1, as for a link
        with pytest.raises(WriteFailed, match=re.escape(f"{path}: exists already, and is not a file")):
            figures.write(path, b"three")
    (tmp_path / "file").touch()
    with pytest.raises(WriteFailed, match="not written"):
        figures.write(tmp_path / "file" / "plot.png", b"four")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png", "new", "pipe.png"]
    assert os.listdir(target.parent) == ["plot.png"]


def test_an_evaluation_after_the_last_known_step_keeps_its_position(tmp_path):
    write_lines(tmp_path, [step_line(10), step_line(20), *map(evaluation_line, (5, 20, 30))])
    (shown,) = figures.prepare_runs([read_run(tmp_path)]).runs
    assert shown.positions_of(np.array([0, 5, 20, 30])).tolist() == [0, 5, 20, 30]


def test_the_class_without_a_name_is_drawn_by_what_it_weighs(tmp_path):
    """Its evaluations go by another name than its weights."""
    write_lines(tmp_path, [step_line(1), evaluation_line(1, [*CLASSES, NO_CLASS])])
    write_provenance(tmp_path, ["", *CLASSES])
    assert classes_by_share(read_run(tmp_path))[0] == NO_CLASS


def test_control_characters_are_shown_as_text():
    words = io.StringIO()
    name = "\x1b[31mRED\x1b]0;pwn\x07\u202e"
    metrics = dict.fromkeys(("eval_loss", "eval_perplexity", "eval_weighted_loss", f"eval_loss/{name}"), 1.0)
    with ConsoleReporter(log_every=1, stream=words) as console:
        console(Preparing(f"checking {name}"))
        console(Evaluated(1, metrics))
    assert words.getvalue().count("RED") == 2
    assert not set("\x1b\x07\u202e") & set(words.getvalue())
