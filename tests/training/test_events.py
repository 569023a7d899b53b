"""Events of a run in order, and the console that prints them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from distrust import CheckpointManager, DistrustWarning, weighting
from distrust.reporting.console import ConsoleReporter
from distrust.testing.models import write_records
from distrust.testing.toy_engine import ToyEngine, ToyTokenizer
from distrust.training.events import (
    CheckpointSaved,
    CheckpointStarted,
    Evaluated,
    Preparing,
    RunEnded,
    RunStarted,
    StepEnded,
)


def names(events):
    """Types of the events in order, without those whose time depends on the disk."""
    return [type(event).__name__ for event in events if not isinstance(event, (Preparing, CheckpointSaved))]


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_the_order_of_events(run, eval_data, tmp_path):
    _, events = run(tmp_path, max_steps=4, save_every=2, eval_every=2, eval_data=str(eval_data))
    assert isinstance(events[0], Preparing)
    assert names(events) == [
        "RunStarted",
        "StepEnded",
        "StepEnded",
        "Evaluated",
        "CheckpointStarted",
        "StepEnded",
        "StepEnded",
        "Evaluated",
        "CheckpointStarted",
        "RunEnded",
    ]
    assert [event.step for event in of_kind(events, StepEnded)] == [1, 2, 3, 4]
    assert [event.step for event in of_kind(events, Evaluated)] == [2, 4]
    saved = of_kind(events, CheckpointStarted)
    assert [event.path for event in of_kind(events, CheckpointSaved)] == [event.path for event in saved]
    assert [event.path.name for event in saved] == [
        "checkpoint-2.safetensors",
        "checkpoint-4-final.safetensors",
    ]


def test_the_last_step_is_evaluated_and_saved_once(run, eval_data, tmp_path):
    _, events = run(tmp_path, max_steps=3, save_every=2, eval_every=2, eval_data=str(eval_data))
    assert names(events)[-4:] == ["StepEnded", "Evaluated", "CheckpointStarted", "RunEnded"]
    manager = CheckpointManager(tmp_path / "checkpoints")
    assert [(file.step, file.kind) for file in manager.scan().files] == [(2, "periodic"), (3, "final")]


def test_run_ended_sums_up_the_stalls(run, tmp_path):
    ended, events = run(tmp_path, save_every=3)
    saved = of_kind(events, CheckpointSaved)
    assert [event.step for event in saved] == [3, 6, 9]
    assert all(event.stall_seconds > 0 for event in saved)
    assert ended.stall_seconds == pytest.approx(sum(event.stall_seconds for event in saved))


def test_step_ended_reports_the_step(run, data, tmp_path):
    ended, events = run(tmp_path)
    (started,) = of_kind(events, RunStarted)
    steps = of_kind(events, StepEnded)
    assert (started.step, started.max_steps, started.examples) == (0, 9, 11)
    assert started.epoch_steps == 11 / 4
    lightest, *_, heaviest = started.distribution.quantiles["weight"]
    assert 0 < lightest < 1 < heaviest
    assert 1 <= started.distribution.effective_examples < 11
    saved = CheckpointManager(tmp_path / "checkpoints").load(ended.path)
    assert saved.history["loss"].tolist() == [event.loss for event in steps]
    assert saved.history["weighted_loss"].tolist() == [event.weighted_loss for event in steps]
    assert saved.history["distrust"].tolist() == [event.distrust for event in steps]
    assert saved.history["gradient_norm"].tolist() == [event.gradient_norm for event in steps]
    assert saved.history["learning_rate"].tolist() == [event.learning_rate for event in steps]
    assert saved.metadata["tokens_seen"] == sum(event.tokens for event in steps)
    assert all(event.loss != event.weighted_loss for event in steps)
    assert steps[-1].loss < steps[0].loss


def test_published_term_is_only_logged(run, tmp_path):
    """α·r² is logged for every weighting; without weighting both losses are equal."""
    _, off = run(tmp_path / "off", weighting="off")
    _, on = run(tmp_path / "on")
    off, on = of_kind(off, StepEnded), of_kind(on, StepEnded)
    assert [event.distrust for event in off] == [event.distrust for event in on]
    assert all(event.distrust > 0 for event in off)
    assert [event.loss for event in off] == [event.weighted_loss for event in off]
    assert off[0].loss == on[0].loss  # before the first update, the models are equal
    _, weaker = run(tmp_path / "weaker", alpha=2.3)
    terms = [event.distrust * 2.3 / 2.7 for event in on]
    assert [event.distrust for event in of_kind(weaker, StepEnded)] == pytest.approx(terms)


def test_term_and_weight_of_single_example_steps(run, tmp_path):
    data = write_records(tmp_path / "one.jsonl", 2, seed=4)
    _, events = run(tmp_path / "run", data=str(data), batch_size=1, gradient_accumulation=1, max_steps=2)
    records = [json.loads(line) for line in data.read_text().splitlines()]
    w, h = (np.array([r[name] for r in records]) for name in ("authority_weight", "provenance_entropy"))
    terms = weighting.distrust_term(w, h)
    u = weighting.normalize(
        weighting.example_weights(w, h), tokens=[len(record["text"]) for record in records]
    )  # every byte but the first, and the end
    ratios = {round(e.distrust, 9): e.weighted_loss / e.loss for e in of_kind(events, StepEnded)}
    assert ratios == {round(t, 9): pytest.approx(x, rel=1e-6) for t, x in zip(terms, u, strict=True)}


def test_low_effective_sample_size_warns(run, tmp_path):
    data = write_records(tmp_path / "data.jsonl", 40)
    lines = data.read_text().splitlines()
    quiet = '{"text": "ore", "authority_weight": 0.9, "provenance_entropy": 0}'
    loud = '{"text": "ore", "authority_weight": 0, "provenance_entropy": 40}'
    data.write_text("\n".join([quiet] * len(lines) + [loud]))
    with pytest.warns(DistrustWarning, match="effective sample size of 41 examples is 1:"):
        run(tmp_path / "run", data=str(data))


def report(run, out: Path, stream, **options) -> None:
    """Run, and pass the events to the console."""
    with ConsoleReporter(log_every=3, stream=stream) as console:
        _, events = run(out, **options)
        for event in events:
            console(event)


def test_plain_lines(run, tmp_path, eval_data):
    stream = io.StringIO()
    report(run, tmp_path, stream, eval_data=str(eval_data), eval_every=9, save_every=4)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert "" not in lines
    assert [line.split(":")[0] for line in lines if "loss" in line] == [
        "step 1/9",
        "step 3/9",
        "step 6/9",
        "step 9/9",
        "step 9",
    ]
    assert "nothing saved yet" in lines[[line.startswith("step 3/9") for line in lines].index(True)]
    evaluated = re.compile(r"step 9: eval loss [\d.]+, perplexity [\d.]+; weighted [\d.]+, [\d.]+")
    assert any(evaluated.fullmatch(line) for line in lines)
    assert any(line.startswith("Finished step 9") for line in lines)


def test_plain_lines_of_a_resumed_run(run, tmp_path):
    stream = io.StringIO()
    report(run, tmp_path, stream, stop_after=3)
    report(run, tmp_path, stream)
    report(run, tmp_path, stream)
    text = stream.getvalue()
    assert "Stopped by SIGTERM: step 3 is saved. Run the same command to resume\n" in text
    assert "Resuming from step 3 (" in text
    assert "Nothing to do: the run finished at step 9\n" in text
    digests = re.findall(r"^state digest ([0-9a-f]{64})$", text, re.MULTILINE)
    assert len(digests) == 3
    assert digests[1] == digests[2]


def test_plain_lines_name_engine_and_folder(run, tmp_path):
    stream = io.StringIO()
    report(run, tmp_path, stream)
    (line,) = [line for line in stream.getvalue().splitlines() if line.startswith("training ")]
    assert re.fullmatch(r"training [\d,]+ of [\d,]+ parameters with numpy, into .+", line)


def test_plain_lines_use_the_singular(run, tmp_path):
    data = write_records(tmp_path / "data.jsonl", 1)
    stream = io.StringIO()
    report(run, tmp_path / "run", stream, data=str(data), batch_size=1, gradient_accumulation=1)
    assert ": effective sample size 1 (100%)\n" in stream.getvalue()
    assert "\n1 example, 11 trained tokens, " in stream.getvalue()


def test_plain_lines_without_a_checkpoint():
    stream = io.StringIO()
    with ConsoleReporter(log_every=1, stream=stream) as console:
        console(
            RunEnded(
                step=0,
                path=None,
                state_digest=None,
                stall_seconds=0.0,
                reason="signal",
                signal=2,
                already_finished=False,
            )
        )
    assert stream.getvalue() == ("Stopped by SIGINT: nothing to save yet. Run the same command to resume\n")


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("stop", "Stopped: step 4 is saved. Run the same command to resume\n"),
        ("early_stopping", "Finished early at step 4 (no improvement) in 0:00; "),
        ("finished", "Finished step 4 in 0:00; "),
    ],
)
def test_plain_lines_give_the_reason(reason, said):
    stream = io.StringIO()
    with ConsoleReporter(log_every=1, stream=stream) as console:
        console(
            RunEnded(
                step=4,
                path=Path("checkpoint-4.safetensors"),
                state_digest="d",
                stall_seconds=0.0,
                reason=reason,
                signal=None,
                already_finished=False,
            )
        )
    assert stream.getvalue().startswith(said)


def test_names_are_printed_without_markup(run, tmp_path):
    """The printing library interprets square brackets as markup."""
    stream = io.StringIO()
    report(run, tmp_path / "a [bold]run[/bold] [/]", stream)
    assert "a [bold]run[/bold] [/]" in stream.getvalue()


def test_progress_bar_on_a_terminal(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    shown = bytearray()
    master, slave = pty.openpty()

    def read() -> None:
        try:
            while part := os.read(master, 65536):
                shown.extend(part)
        except OSError:
            pass  # the other end is closed

    reader = threading.Thread(target=read)
    reader.start()
    _, events = run(tmp_path / "a [bold]run[/] [/]", save_every=4)
    with os.fdopen(slave, "w") as terminal, ConsoleReporter(log_every=3, stream=terminal) as console:
        assert terminal.isatty()
        saved = False
        for event in events:
            console(event)
            saved = saved or isinstance(event, CheckpointSaved)
            if isinstance(event, StepEnded) and (event.step == 5 or saved):  # until the bar is drawn
                expected = b"saved 4" if saved else b"5/9"
                deadline = time.monotonic() + 30
                while expected not in shown and b"saved 8" not in shown and time.monotonic() < deadline:
                    time.sleep(0.01)
    reader.join(30)
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "\x1b[" in shown.decode()
    assert "tok/s" in text
    assert "5/9" in text
    assert "saved 4" in text
    assert "Finished step 9" in text
    assert not re.search(r"^step \d+/9: loss", text, re.MULTILINE)  # the bar shows it
    assert shown.decode().rindex("\x1b[?25h") > shown.decode().rindex(
        "\x1b[?25l"
    )  # the cursor is visible again


def test_failing_observer_loses_no_step(run, alone, data, tmp_path):
    """The run ends, but saves first."""

    def fail(event):
        if isinstance(event, StepEnded) and event.step == 5:
            raise ValueError("a reader that went away")

    with pytest.raises(ValueError, match="went away"):
        run(tmp_path / "run", save_every=0, observers=[fail])
    assert CheckpointManager(tmp_path / "run" / "checkpoints").list_checkpoints() == [5]
    assert run(tmp_path / "run", save_every=0)[0].state_digest == alone.state_digest


def test_events_print_on_one_short_line(run, eval_data, tmp_path):
    options = {"eval_data": str(eval_data), "eval_every": 3, "save_every": 3, "reload_every": 4}
    _, events = run(tmp_path / "a\nb", engine=lambda config: ToyEngine(), **options)
    assert {type(event).__name__ for event in events} == {
        "Preparing", "RunStarted", "StepEnded", "Evaluated", "CheckpointStarted", "CheckpointSaved",
        "MemoryReset", "RunEnded",
    }  # fmt: skip
    for event in events:
        assert str(event).isprintable()
        assert len(str(event)) < 500
        assert f"{event}".startswith(f"{type(event).__name__}(")
    (step, *_), (evaluated, *_) = of_kind(events, StepEnded), of_kind(events, Evaluated)
    assert f"step=1, loss={step.loss:.4g}, weighted_loss=" in str(step)
    assert str(evaluated).startswith(f"Evaluated(step=3, eval_loss={evaluated.loss:.4g}, ")


def test_weights_without_provenance_are_shown_without_the_published_term(run, data, tmp_path):
    stream = io.StringIO()
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    rows = [{"text": text, "weight": 1 + number % 2} for number, text in enumerate(texts)]
    with ConsoleReporter(log_every=1, stream=stream) as console:
        run(tmp_path, examples=rows, observers=[console], weighting="auto")
    printed = stream.getvalue()
    assert "weighting by provenance: off, as no record states its own\n" in printed
    assert ", weighted " in printed
    assert "distrust" not in printed.replace(str(tmp_path), "")


def test_prompts_beside_a_chat_template_are_noted(run, tmp_path, monkeypatch):
    rows = [{"prompt": "p", "completion": f"ore {number}"} for number in range(9)]
    for template in ("{{ messages }}", None):
        monkeypatch.setattr(ToyTokenizer, "chat_template", template)
        _, events = run(tmp_path / f"{template is None}", examples=rows)
        (started,) = (event for event in events if isinstance(event, RunStarted))
        noted = any(note.startswith("prompts are trained as they are") for note in started.notes)
        assert noted == (template is not None)
