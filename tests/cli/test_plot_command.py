"""``distrust plot``: the files it writes, and its errors."""

from __future__ import annotations

import os
import struct

import pytest

from run_folders import step_line, write_lines, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("off", "monotone"):
        write_run(folder / name, weighting=name)
    return folder


def size_of_png(path):
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:])


def test_one_run_is_drawn_into_its_folder(distrust, runs):
    output = distrust("plot", runs / "off", "--panels", "loss,lr")
    assert (output.code, output.out, output.err) == (0, f"{runs / 'off' / 'plot.png'}\n", "")
    width, height = size_of_png(runs / "off" / "plot.png")
    assert width > height > 400


def test_several_runs_are_drawn_here(distrust, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = distrust("plot", runs / "off", runs / "monotone", "--panels", "loss", "--title", "both of them")
    assert (output.code, output.out) == (0, "plot.png\n")
    assert os.listdir(tmp_path) == ["plot.png"]


def test_files_of_both_kinds_under_names_of_their_own(distrust, runs, tmp_path):
    png, svg = tmp_path / "new" / "a.png", tmp_path / "b.SVG"
    output = distrust(
        "plot", runs / "off", runs / "monotone", "--out", png, "--out", svg, "--panels", "loss,weights",
        "--x", "tokens", "--smooth", 7, "--title", "off <and> monotone",
    )  # fmt: skip
    assert (output.code, output.out) == (0, f"{png}\n{svg}\n")
    size_of_png(png)
    text = svg.read_text("utf-8")
    assert text.startswith("<?xml")
    assert "off &lt;and&gt; monotone" in text
    assert ">tokens<" in text


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--out", "plot.pdf"], 2, "--out plot.pdf: give a name that ends with .png or .svg"),
        (["--out", "plot"], 2, "--out plot: give a name"),
        (["--panels", "loss,lose"], 2, "no panel 'lose'; there are loss, eval, sources"),
        (["--smooth", "0"], 2, "'0': give a whole number, 1 or more"),
        (["--x", "epochs"], 2, "epochs"),
        (["--panels", "lr", "--out", "/dev/null/plot.png"], 1, "/dev/null/plot.png: not written: "),
    ],
)
def test_a_mistake_is_reported_in_one_line(distrust, runs, options, code, message):
    output = distrust("plot", runs / "monotone", *options)
    assert (output.code, output.out) == (code, "")
    assert message in output.err
    assert "Traceback" not in output.err


@pytest.mark.parametrize(
    ("command", "name"), [(("plot", "--panels", "lr"), "plot.png"), (("report",), "report.html")]
)
def test_a_link_in_a_run_folder_is_not_written_through_unasked(distrust, tmp_path, command, name):
    run = write_run(tmp_path / "run", steps=3)
    if command == ("report",):
        (run / "metrics.jsonl").write_text("")  # without pictures
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (run / name).symlink_to(precious)
    output = distrust(*command, run)
    assert (output.code, output.out, output.err.count("\n")) == (1, "", 1)
    assert f"{run / name}: is a link" in output.err
    assert precious.read_text() == "mine"
    assert distrust(*command, run, "--out", run / name).code == 0


def test_one_run_under_two_names_is_one_run(distrust, runs, tmp_path):
    output = distrust("plot", runs / "off", runs / "monotone" / ".." / "off", "--out", tmp_path / "a.png")
    assert (output.code, output.out) == (2, "")
    assert output.err == f"distrust: {runs / 'monotone' / '..' / 'off'} is given twice; name each run once\n"


def test_a_folder_that_is_not_a_run_is_reported_in_one_line(distrust, runs, tmp_path):
    output = distrust("plot", tmp_path)
    assert (output.code, output.err.count("\n")) == (1, 1)
    assert "no run here" in output.err
    output = distrust("plot", runs / "off", runs / "off")
    assert (output.code, output.err.count("\n")) == (2, 1)
    (tmp_path / "metrics.jsonl").write_text("}\n")
    output = distrust("plot", tmp_path)
    assert (output.code, output.err.count("\n")) == (1, 1)
    assert f"{tmp_path}/metrics.jsonl:1: not JSON" in output.err
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_run_that_trains_is_drawn_as_far_as_it_is(distrust, tmp_path):
    path = write_lines(tmp_path, [step_line(step) for step in range(1, 4)])
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # its writer is in the middle of it
    assert distrust("plot", tmp_path, "--panels", "loss").code == 0


def test_help_shows_examples(distrust):
    for command in ("plot", "report"):
        output = distrust(command, "--help")
        assert output.code == 0
        assert f"distrust {command} runs/train" in output.out


def test_drawing_loads_no_framework(run_python, runs):
    code = """
import sys
from distrust.cli import main
assert main(["plot", sys.argv[1], "--panels", "lr"]) == 0
assert not {"torch", "transformers", "datasets", "pyarrow", "mlx", "jax"} & sys.modules.keys()
assert "matplotlib.pyplot" not in sys.modules
"""
    output = run_python(code, runs / "off")
    assert output.returncode == 0, output.stderr


def test_a_link_to_itself_is_no_run(distrust, tmp_path):
    (tmp_path / "run").symlink_to("run")
    output = distrust("plot", tmp_path / "run")
    assert (output.code, output.out, output.err.count("\n")) == (1, "", 1)
