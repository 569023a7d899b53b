"""With weighting off, nothing that a run prints, writes or draws is about weights."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest

from distrust import CheckpointManager, ConfigError, TrainConfig
from distrust.cli import main
from distrust.export import export
from distrust.option_values import STEP_METRICS
from distrust.reporting import figures, report
from distrust.reporting.console import ConsoleReporter
from distrust.reporting.dashboards import TensorBoardWriter
from distrust.reporting.metrics import METRICS, PROVENANCE, MetricsWriter
from distrust.reporting.run_reader import read_run
from distrust.testing.models import make_model, train_arguments, write_records
from tests.reporting.test_dashboards import scalars

#: What is said about weights: not the options ``weighting`` and ``weight_decay``.
SAID = re.compile(
    r"weighted|clipping|weights by|example weight"
    r"|authority_weight|provenance_entropy|distrust[ _]?\d|effective sample|\balpha\b|lambda|max.ratio",
    re.IGNORECASE,
)
OFF = {"weighting": "off", "eval_every": 3}


@pytest.fixture
def off(run, eval_data):
    """Trains the toy without weighting, as the command does; returns what it prints."""

    def off(out, **options):
        stream = io.StringIO()
        config = TrainConfig(weighting="off", alpha=2.3)
        with ConsoleReporter(log_every=2, stream=stream) as console:
            observers = [console, MetricsWriter(config), TensorBoardWriter()]
            run(out, observers=observers, eval_data=str(eval_data), **{**OFF, **options})
        return stream.getvalue()

    return off


def test_lines_files_and_curves(off, tmp_path):
    (tmp_path / PROVENANCE).write_text("of an earlier run in this folder")
    assert not SAID.search(off(tmp_path))
    assert not (tmp_path / PROVENANCE).exists()
    log = (tmp_path / METRICS).read_text()
    assert not SAID.search(log)
    assert '"distrust"' not in log
    assert '"eval_perplexity"' in log
    curves = scalars(tmp_path)
    assert {"train/loss", "eval/loss"} <= curves.keys()
    assert not [name for name in curves if "weighted" in name or "distrust" in name]
    newest = CheckpointManager(tmp_path / "checkpoints").scan().files[-1]
    assert not [name for name in newest.metrics if "weighted" in name or name == "distrust"]
    history = CheckpointManager(tmp_path / "checkpoints").load(9).history
    assert set(history) == set(STEP_METRICS)  # of the state, whose digest stays


def test_page_and_figure(off, tmp_path):
    off(tmp_path)
    shown = read_run(tmp_path)
    assert shown.provenance is None
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", report.page(shown), flags=re.DOTALL)
    assert not SAID.search(page)
    assert "<code>weighting</code><span>off" in page
    assert 'id="picture-weights"' not in page
    assert 'id="picture-sources"' not in page
    with pytest.warns(match="weights"):
        figures.draw(figures.prepare_runs([shown]), ["loss", "weights"])


def test_a_lost_log_is_restored(off, tmp_path):
    off(tmp_path / "alone")
    off(tmp_path / "run", stop_after=5)
    (tmp_path / "run" / METRICS).unlink()
    off(tmp_path / "run")
    metric_names = ("step", "loss", "gradient_norm", "learning_rate")
    losses = [
        [{name: line[name] for name in metric_names} for line in map(json.loads, lines) if "loss" in line]
        for lines in ((tmp_path / out / METRICS).read_text().splitlines() for out in ("alone", "run"))
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9


def test_the_weighted_loss_cannot_choose_the_best(off, tmp_path):
    with pytest.raises(ConfigError, match="--metric eval_weighted_loss: this run has no such metric"):
        off(tmp_path, metric="eval_weighted_loss")


def test_commands_and_model_card(tmp_path, capsys):
    make_model(tmp_path / "model")
    write_records(tmp_path / "data.jsonl")
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "eval.jsonl")
    out = tmp_path / "run"
    options = ("--weighting", "off", "--eval-data", tmp_path / "eval.jsonl", "--max-steps", 2)
    assert main(train_arguments(tmp_path, out, *options)) == 0
    assert main(["eval", str(out)]) == 0
    assert main(["ls", str(out)]) == 0
    printed = capsys.readouterr().out
    assert not SAID.search(printed)
    assert f"model {tmp_path / 'model'}, data {tmp_path / 'data.jsonl'}\n" in printed
    export(out, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "eval_loss" in card
    assert "provenance" not in card
    assert not SAID.search(card)
