"""Run folders as a training leaves them, made without training: by the library's own writers, and the format.

``metrics.jsonl``: one JSON object a line, of a step or of an evaluation. ``provenance.json``: a distribution
and the options of the weighting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from distrust import Checkpoint, CheckpointManager, TrainConfig
from distrust.data.distribution import summarize_weights

CLASSES = ("notebook", "encyclopedia", "press release")
#: Names that a page or a picture could take for something else.
HOSTILE = (
    "<script>document.title = 'taken over'</script>",
    "</svg><img src=x onerror=\"document.title = 'taken over'\">",
    "${x_1}$ {{ 7 * 7 }} &amp; 'a\" \x1b[31m\u202e",
)


def step_line(step: int, **changed: object) -> dict[str, object]:
    """A line of a step; the loss falls."""
    loss = 1.5 + 2.0 * math.exp(-step / 30) + 0.2 * math.sin(7.0 * step)
    return {
        "step": step,
        "loss": loss,
        "weighted_loss": loss * (1 + 0.3 * math.sin(3.0 * step)),
        "distrust": 12.5,
        "learning_rate": 2e-4 * (1 - step / 200),
        "gradient_norm": 1.0 + 0.5 * math.cos(5.0 * step),
        "tokens": 400 + step % 7,
        "seconds": 0.25,
        "stall_seconds": 0.01 if step % 20 == 1 else 0.0,
        "host_bytes": 900_000_000 + 1000 * step,
        "host_peak_bytes": 950_000_000 + 1000 * step,
        **changed,
    }


def evaluation_line(step: int, classes: Sequence[str] = CLASSES) -> dict[str, object]:
    """A line of an evaluation; classes differ by a tenth of a nat."""
    loss = 1.6 + 2.0 * math.exp(-step / 30)
    line: dict[str, object] = {
        "step": step,
        "eval_loss": loss,
        "eval_weighted_loss": loss * 1.1,
        "eval_perplexity": math.exp(loss),
        "eval_weighted_perplexity": math.exp(loss * 1.1),
    }
    for number, name in enumerate(classes):
        line[f"eval_loss/{name}"] = loss + number / 10
        line[f"eval_perplexity/{name}"] = math.exp(loss + number / 10)
    return line


def write_lines(folder: Path, lines: Sequence[Mapping[str, object]]) -> Path:
    """metrics.jsonl."""
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_provenance(folder: Path, classes: Sequence[str] = CLASSES, *, weighting: str = "monotone") -> Path:
    """provenance.json, of 60 examples for each class; the first class weighs most."""
    count = 60 * len(classes)
    class_of = np.arange(count) % len(classes)
    weights = 1.0 / (1 + class_of) + np.arange(count) / (10 * count)
    weights = summarize_weights(
        authority_weight=0.2 + 0.2 * class_of,
        provenance_entropy=3.0 / (1 + class_of),
        weights=np.ones(count) if weighting == "off" else weights / weights.mean(),
        tokens=np.full(count, 20),
        classes=classes,
        class_of=class_of,
        locations=[f"{classes[0]}.jsonl:{line}" for line in range(1, count + 1)],
        effective_examples=0.8 * count,
    )
    path = folder / "provenance.json"
    options = {"weighting": weighting, "alpha": 2.7, "lambda": 0.6, "max_ratio": None}
    path.write_text(json.dumps(weights.as_json() | options), encoding="utf-8")
    return path


def write_checkpoints(folder: Path, steps: Sequence[int], *, max_steps: int, final: bool = True) -> None:
    """Checkpoints with history, options and environment; the last one is final."""
    config = TrainConfig(out=str(folder), max_steps=max_steps, learning_rate=1e-4, lora_rank=8)
    with CheckpointManager(folder / "checkpoints", keep_last=None) as manager:
        for step in steps:
            lines = [step_line(number) for number in range(1, step + 1)]
            names = ("loss", "weighted_loss", "distrust", "gradient_norm", "learning_rate")
            checkpoint = Checkpoint(
                step=step,
                model={"w": np.ones(3, np.float32)},
                history={name: np.array([line[name] for line in lines]) for name in names},
                config=config.with_effect("result"),
                metadata={"tokens_seen": 400 * step},
                metrics={"loss": lines[-1]["loss"], "eval_loss": evaluation_line(step)["eval_loss"]},
                run={
                    **config.with_effect("free"),
                    **config.with_effect("bits"),
                    "environment": {"torch": "2.13.0", "device": "cpu", "fused": {"lora": 28}},
                    "corpus": {"examples": 180, "tokens": 3600},
                    "elapsed_seconds": 0.25 * step,
                },
            )
            manager.save(checkpoint, final=final and step == steps[-1])


def write_run(
    folder: Path,
    *,
    steps: int = 60,
    max_steps: int | None = None,
    classes: Sequence[str] = CLASSES,
    weighting: str = "monotone",
) -> Path:
    """A finished run, evaluated and saved every 20 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        lines.append(step_line(step))
        if step % 20 == 0:
            lines.append(evaluation_line(step, classes))
    write_lines(folder, lines)
    write_provenance(folder, classes, weighting=weighting)
    last = max_steps or steps
    write_checkpoints(folder, range(20, steps + 1, 20), max_steps=last, final=steps == last)
    return folder
