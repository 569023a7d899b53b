"""One run: generate the records, train, measure."""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from distrust import DistrustTrainer, TrainConfig, engines, weighting
from distrust.bundled import CORPUS, MODEL, NEUTRAL
from distrust.contract import Engine
from distrust.data import evaluation_batches, read_records, tokenize
from distrust.demo import Belief, Question, measure, read_questions
from distrust.training.events import Event, StepEnded
from distrust.weighting import Weighting
from experiments.weighting.additive import Adding
from experiments.weighting.design import CLIPPED_PLAINLY, SEEDS, WORLDS, WRONG, Run, Training
from experiments.weighting.world import make_world

Records = list[dict[str, Any]]
WEIGHTINGS: dict[str, Weighting] = {
    "published": "published",
    "monotone": "monotone",
    CLIPPED_PLAINLY: "monotone",
}
LAST = 10  # steps whose mean is the training loss at the end


@dataclass(frozen=True, slots=True)
class Material:
    """Attributes: the records of a world; questions on disputed facts, and on sole-source facts."""

    records: Records
    disputed: list[Question]
    sole: list[Question]


def material(run: Run) -> Material:
    """The world of a run."""
    ratio = WORLDS[run.world]
    if ratio is None:
        with CORPUS.open(encoding="utf-8") as file:
            return Material([json.loads(line) for line in file], read_questions(), [])
    world = make_world(run.seed, ratio)
    return Material(world.corpus(run.wrong), list(world.disputed), list(world.sole))


def chosen(records: Records, method: str, *, seed: int) -> Records:
    """The records that a method trains on.

    `filter` keeps those whose weight is more than 1: r > 0. `upsample` repeats each in proportion to its
    weight, u / min u, rounded up or down at random so that the mean is exact. Others keep all.
    """
    if method not in ("filter", "upsample"):
        return records
    u = weights(records)
    if method == "filter":
        return [record for record, weight in zip(records, u, strict=True) if weight > 1]
    rng = random.Random(f"upsample/{seed}")
    return [
        record
        for record, weight in zip(records, u / u.min(), strict=True)
        for _ in range(int(weight + rng.random()))
    ]


def weights(records: Records) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The score of filtering and up-sampling: the weight of `monotone`, float64[n]."""
    return weighting.example_weights(
        [record["authority_weight"] for record in records],
        [record["provenance_entropy"] for record in records],
    )


def config_of(run: Run, training: Training, out: Path) -> TrainConfig:
    """The same for every method except for the weighting."""
    steps = training.steps_of(run.world)
    return TrainConfig(
        out=str(out),
        cache_dir=str(out / "cache"),
        weighting=WEIGHTINGS.get(run.method, "off"),
        clipping="plain" if run.method == CLIPPED_PLAINLY else "weighted",
        seed=run.seed,
        max_steps=steps,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=steps // 10,
        weight_decay=training.weight_decay,
        threads=training.threads,
        device="cpu",
        save_every=0,
    )


@cache
def digest(training: Training) -> str:
    """Digest of everything that all runs share: results of different designs are never put into one table.

    It covers the training with every option's default, the worlds, the questions, the neutral text and the
    base model, but not the code that works on them.
    """
    one = Run("1:5", max(WRONG), "monotone", min(SEEDS))
    options = config_of(one, training, Path("out")).with_effect("result")
    options["model"] = [blake2b(path.read_bytes()).hexdigest() for path in sorted(MODEL.iterdir())]
    worlds = [asdict(material(replace(one, world=world))) for world in WORLDS]
    decides = [asdict(training), options, worlds, blake2b(NEUTRAL.read_bytes()).hexdigest()]
    return blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()


def execute(run: Run, training: Training, folder: Path) -> dict[str, Any] | None:
    """Train and measure; None if a signal stopped it. Files in `folder` are removed afterwards."""
    began = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    world = material(run)
    config = config_of(run, training, folder)
    facts: dict[str, Any] = {}
    if run.method == "before":
        engine = engines.create_engine(config)
    else:
        steps: list[StepEnded] = []

        def remember(event: Event) -> None:
            if isinstance(event, StepEnded):
                steps.append(event)

        adding = Adding() if run.method == "additive" else None
        records = chosen(world.records, run.method, seed=run.seed)
        ended = DistrustTrainer(config, engine=adding, observers=[remember], examples=records).train()
        if not ended.finished or ended.path is None:
            return None
        assert adding is None or len(adding.objectives) == len(steps)  # one micro-step each
        engine, _ = engines.open_checkpoint(ended.path)
        facts = {
            "records": len(records),
            "state_digest": ended.state_digest,
            "objective": adding.objectives[0] if adding else steps[0].weighted_loss,
            "training_loss": float(np.mean([step.loss for step in steps[-LAST:]])),
        }
    result = {
        "design": digest(training),
        "world": run.world,
        "wrong": run.wrong,
        "method": run.method,
        "seed": run.seed,
        **facts,
        "disputed": _plain(measure(engine, world.disputed)),
        "sole": _plain(measure(engine, world.sole)) if world.sole else [],
        "neutral_loss": neutral_loss(engine, training.neutral_records),
        "seconds": round(time.perf_counter() - began, 2),
    }
    engine.close()
    shutil.rmtree(folder, ignore_errors=True)
    return result


def neutral_loss(engine: Engine, count: int) -> float:
    """Plain cross-entropy on neutral text that no corpus contains, in nats per token: what is forgotten."""
    corpus = tokenize(neutral_records()[-count:], engine.tokenizer, max_length=256)
    batches = evaluation_batches(corpus, batch_size=64)
    total = sum(float(engine.evaluate(batch).cross_entropy.sum()) for batch in batches)
    return total / float(corpus.loss_tokens.sum())


@cache
def neutral_records() -> list[Any]:
    """The base model's own text that is not in the bundled corpus."""
    with CORPUS.open(encoding="utf-8") as file:
        used = {json.loads(line)["text"] for line in file}
    return [one for one in read_records(NEUTRAL) if getattr(one.content, "text", "") not in used]


def _plain(beliefs: list[Belief]) -> list[list[float]]:
    """For each fact: the margin, and the probability of either value's text."""
    return [[belief.margin, belief.primary, belief.coordinated] for belief in beliefs]
