"""A run on conversations that is killed goes on exactly, on another day and without its cache of tokens.

The template prints the date, and rewrites earlier turns, so examples consist of several sequences; turns and
records have weights, and an example that is too long is left out.
"""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from distrust import DistrustTrainer, TrainConfig
from distrust.training.events import RunStarted, StepEnded

TEMPLATE = """\
{{ strftime_now('%d%m%y') }}{% for m in messages %}{{ m.role[0] }}:
{%- if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}{{ m.content + eos_token }}
{%- endfor %}{% if add_generation_prompt %}a:{% endif %}"""
TODAY = date(2026, 11, 27)


@pytest.fixture(scope="module")
def options(tiny_model, tmp_path_factory) -> dict[str, Any]:
    """Of a run of six steps."""
    folder = tmp_path_factory.mktemp("conversations")
    records = []
    for number in range(7):
        messages: list[dict[str, Any]] = []
        for turn in range(1 + number % 3):
            answer = {"role": "assistant", "content": f"{turn}{number}", "weight": (turn + 1) / 2 % 1.5}
            if number % 2:
                answer["reasoning_content"] = "hm"
            messages += [{"role": "user", "content": "ore" * (number == 6) * 60 or "ore?"}, answer]
        records.append({"messages": messages, "weight": 1 + number % 2})
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "template.jinja").write_text(TEMPLATE)
    return {
        "model": str(tiny_model),
        "data": str(folder / "data.jsonl"),
        "chat_template": str(folder / "template.jinja"),
        "on_long": "drop",
        "device": "cpu",
        "threads": 1,
        "max_steps": 6,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 5e-3,
        "lora_rank": 2,
        "lora_dropout": 0.1,
        "save_every": 3,
    }


@pytest.fixture
def train(options, monkeypatch, tmp_path):
    """Trains on a day, with an empty cache of tokens: ``train(out, day=…, die_after=…, **options)``."""

    class Killed(BaseException):  # no Exception, so nothing is saved, as after SIGKILL
        pass

    def train(out: Path, *, day: date, die_after: int = 0, **changed: Any) -> tuple[Any, list[Any]]:
        class Calendar(date):
            @classmethod
            def today(cls) -> date:
                return day

        monkeypatch.setattr("distrust.training.run.date", Calendar)
        events: list[Any] = []

        def watch(event: Any) -> None:
            events.append(event)
            if isinstance(event, StepEnded) and event.step == die_after:
                raise Killed

        config = TrainConfig(
            out=str(out),
            cache_dir=str(tmp_path / f"cache {len(list(tmp_path.iterdir()))}"),
            **options | changed,
        )
        trainer = DistrustTrainer(config, observers=[watch])
        if die_after:
            with pytest.raises(Killed):
                trainer.train()
            return None, events
        return trainer.train(), events

    return train


@pytest.mark.parametrize(("engine", "packing"), [("torch", True), ("mlx", False)])
def test_a_killed_run_goes_on_exactly(train, tmp_path, engine, packing):
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    alone, events = train(tmp_path / "alone", day=TODAY, engine=engine, packing=packing)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert started.counts.dropped == 1
    assert started.sequences > started.examples == 6
    train(tmp_path / "killed", day=TODAY, die_after=4, engine=engine, packing=packing)
    ended, events = train(tmp_path / "killed", day=TODAY + timedelta(1), engine=engine, packing=packing)
    assert [event.step for event in events if isinstance(event, StepEnded)] == [4, 5, 6]
    assert ended.state_digest == alone.state_digest


def test_the_date_is_that_of_the_first_start_unless_it_is_given(train, tmp_path):
    first, _ = train(tmp_path / "first", day=TODAY, engine="torch", max_steps=1)
    later, _ = train(tmp_path / "later", day=TODAY + timedelta(1), engine="torch", max_steps=1)
    dated, _ = train(
        tmp_path / "given", day=TODAY + timedelta(1), date=TODAY.isoformat(), engine="torch", max_steps=1
    )
    assert first.state_digest == dated.state_digest != later.state_digest
