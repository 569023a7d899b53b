"""Figures are drawn with matplotlib's defaults: no settings file changes them or does harm."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl
import pytest

from distrust.reporting import figures
from distrust.reporting.run_reader import read_run
from distrust.testing.models import write_records
from run_folders import write_lines

SETTINGS = "text.usetex: True\nfigure.dpi: 37\nlines.linewidth: 9\naxes.facecolor: red\nfont.size: 21\n"

#: The files of every command that draws, written by a new process in the folder ``sys.argv[1]``.
DRAW = """
import os, sys
from pathlib import Path
os.chdir(sys.argv[1])
run, data, out = map(Path, sys.argv[2:])
from distrust.cli import main
assert main(["plot", str(run), "--panels", "loss", "--out", f"{out}/p.svg", "--out", f"{out}/p.png"]) == 0
assert main(["report", str(run), "--out", f"{out}/report.html"]) == 0
assert main(["weigh", str(data), "--plot", f"{out}/weigh.svg"]) == 0
from distrust.demo import Belief, plot_beliefs
plot_beliefs({"off": [Belief("fact", 0.2, 0.7, -1.0), Belief("other", 0.6, 0.1, 1.0)]}, out / "demo.png")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    write_lines(folder, [{"step": step, "loss": 1 / step} for step in range(1, 6)])  # of few panels
    return folder


def test_the_same_run_gives_the_same_bytes_whatever_the_settings(run, run_python, tmp_path):
    data = write_records(tmp_path / "records.jsonl")
    plain, hostile, home = (tmp_path / name for name in ("plain", "hostile", "home"))
    for folder in (plain, hostile, home):
        folder.mkdir()
    (hostile / "matplotlibrc").write_text(SETTINGS)
    (home / "matplotlibrc").write_text(SETTINGS)  # the user's own: for other figures
    contents = {}
    for folder, environment in ((plain, {}), (hostile, {"MATPLOTLIBRC": str(home)})):
        out = tmp_path / f"drawn-in-{folder.name}"
        out.mkdir()
        completed = run_python(DRAW, folder, run, data, out, **environment)
        assert (completed.returncode, completed.stderr) == (0, "")
        contents[folder] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert contents[plain].keys() == {"p.svg", "p.png", "report.html", "weigh.svg", "demo.png"}
    assert contents[hostile] == contents[plain]


def invalid_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe: 1\n")


@pytest.mark.parametrize("make", [invalid_text, os.mkfifo])  # whoever opens a pipe waits for ever
def test_settings_in_the_current_folder_are_not_even_opened_by_any_thread(run_python, tmp_path, make):
    make(tmp_path / "matplotlibrc")
    code = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
os.chdir(sys.argv[1])
exists = os.path.exists
from distrust.reporting.style import load_matplotlib
barrier = Barrier(4)
def load(_):
    barrier.wait()
    return load_matplotlib().rcParams["backend"]  # missing in the middle of the import
with ThreadPoolExecutor(4) as pool:
    assert len(set(pool.map(load, range(4)))) == 1
assert os.path.exists is exists
"""
    completed = run_python(code, tmp_path)
    assert (completed.returncode, completed.stderr) == (0, "")


def test_drawing_leaves_the_settings_of_the_caller_alone(run):
    with mpl.rc_context({"lines.linewidth": 9, "svg.hashsalt": "mine"}):
        settings = dict(mpl.rcParams)
        figure = figures.draw(figures.prepare_runs([read_run(run)]))
        figures.render(figure, ".svg")
        assert dict(mpl.rcParams) == settings


def test_invalid_settings_of_the_user_are_one_line(run_python, run, tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe: 1\n")
    code = "import sys; from distrust.cli import main; sys.exit(main(['plot', *sys.argv[1:]]))"
    completed = run_python(code, run, "--out", tmp_path / "p.png", MATPLOTLIBRC=str(tmp_path))
    assert completed.returncode == 2
    assert completed.stderr.splitlines()[-1].startswith("distrust: matplotlib cannot be loaded: ")
    assert "Traceback" not in completed.stderr
