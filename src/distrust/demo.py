"""The demo: trains the same model twice, without and with weighting, and measures which facts each believes.

In the bundled world, a few primary records state one value of each fact, and five times as many coordinated
records repeat another. Questions that training never saw ask for it. What a model believes is the probability
that it gives each value's text after the question.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distrust import engines
from distrust.bundled import QUESTIONS
from distrust.config import TrainConfig
from distrust.data import Corpus, Location, Tokenizer, bos_prefix, evaluation_batches
from distrust.paths import refuse_links
from distrust.reporting.metrics import MetricsWriter
from distrust.trainer import DistrustTrainer
from distrust.weighting import Weighting

if TYPE_CHECKING:
    from distrust.contract import Engine
    from distrust.training.events import Observer, RunEnded

WEIGHTINGS: tuple[Weighting, ...] = ("off", "monotone")  # the first is the baseline
QUESTIONS_PER_BATCH = 64  # bounds the memory


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a fact, and the two values that the sources state."""

    fact: str
    prompt: str
    primary: str  # the value in the primary records, as text that continues the prompt
    coordinated: str  # the value in the coordinated records


@dataclass(frozen=True, slots=True)
class Belief:
    """How strongly a model believes either value of a fact."""

    fact: str
    primary: float  # probability of the primary value's text, mean over the questions
    coordinated: float  # the same of the coordinated value's text
    margin: float  # log-probability of the primary minus that of the coordinated text, nats, mean

    @property
    def prefers_primary(self) -> bool:
        """Whether the primary value is the more probable, by mean log-probability."""
        return self.margin > 0


def demo_config(weighting: Weighting, *, out: Path, seed: int) -> TrainConfig:
    """The training options of the demo."""
    return TrainConfig(
        out=str(out / weighting),
        weighting=weighting,
        seed=seed,
        max_steps=300,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=30,
        weight_decay=0.01,
        save_every=50,  # a crash costs little
    )


def train(
    weighting: Weighting, *, out: Path, seed: int, observers: Iterable[Observer] = ()
) -> tuple[RunEnded, list[Belief]]:
    """Train one of the two models, or resume it, and measure it if it finished."""
    config = demo_config(weighting, out=out, seed=seed)
    refuse_links(Path(config.out))
    ended = DistrustTrainer(config, observers=[*observers, MetricsWriter(config)]).train()
    if ended.signal is not None or ended.path is None:
        return ended, []  # stopped: nothing to measure
    engine, _ = engines.open_checkpoint(ended.path)
    return ended, measure(engine)


def measure_untrained(*, out: Path, seed: int) -> list[Belief]:
    """What the base model believes before training."""
    return measure(engines.create_engine(demo_config("off", out=out, seed=seed)))


def measure(engine: Engine, questions: Iterable[Question] | None = None) -> list[Belief]:
    """What a model believes about each fact; the questions, or the bundled ones, are grouped by fact."""
    questions = read_questions() if questions is None else list(questions)
    primary = _log_probabilities(engine, [(q.prompt, q.primary) for q in questions])
    coordinated = _log_probabilities(engine, [(q.prompt, q.coordinated) for q in questions])
    answers = zip(questions, primary, coordinated, strict=True)
    beliefs = []  # one per fact
    for fact, group in groupby(answers, key=lambda row: row[0].fact):
        rows = [(p, c) for _, p, c in group]
        beliefs.append(
            Belief(
                fact=fact,
                primary=sum(exp(p) for p, _ in rows) / len(rows),
                coordinated=sum(exp(c) for _, c in rows) / len(rows),
                margin=sum(p - c for p, c in rows) / len(rows),
            )
        )
    return beliefs


def summarize(beliefs: list[Belief]) -> dict[str, float]:
    """Means over the facts: how many ``preferred`` the primary value, and the probability of either value."""
    rows = [(belief.prefers_primary, belief.primary, belief.coordinated) for belief in beliefs]
    return dict(zip(("preferred", "primary", "coordinated"), np.mean(rows, axis=0).tolist(), strict=True))


def read_questions() -> list[Question]:
    """The bundled questions, grouped by fact."""
    with QUESTIONS.open(encoding="utf-8") as file:
        return [Question(**json.loads(line)) for line in file]


def results(beliefs: dict[str, list[Belief]], *, seed: int) -> dict[str, Any]:
    """The outcome as plain JSON values."""
    return {
        "seed": seed,
        "facts": len(next(iter(beliefs.values()))),
        "models": {name: summarize(of_model) for name, of_model in beliefs.items()},
    }


def plot_beliefs(beliefs: Mapping[str, list[Belief]], path: Path) -> None:
    """Draw for each model the probabilities of the primary against those of the coordinated values."""
    from distrust.reporting.figures import render, write
    from distrust.reporting.style import COORDINATED, PRIMARY, QUIET, style_context

    with style_context():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4 * len(beliefs), 4.6), layout="constrained")
        panels = figure.subplots(1, len(beliefs), sharex=True, sharey=True, squeeze=False)[0]
        for panel, (model, facts) in zip(panels, beliefs.items(), strict=True):
            panel.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
            panel.scatter(
                [fact.coordinated for fact in facts],
                [fact.primary for fact in facts],
                c=[PRIMARY if fact.prefers_primary else COORDINATED for fact in facts],
                s=28,
                alpha=0.75,
                linewidths=0,
            )
            share = summarize(facts)["preferred"]
            panel.set_title(f"{model}\nprimary value preferred in {share:.0%} of the facts", fontsize=10)
            panel.set_xlabel("probability of the coordinated value")
            panel.set_aspect("equal")
            panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        panels[0].set_ylabel("probability of the primary value")
    write(path, render(figure, ".png"))


def _log_probabilities(engine: Engine, pairs: list[tuple[str, str]]) -> list[float]:
    """The log-probability of each text after its prompt, in nats."""
    corpus = _continuations(engine.tokenizer, pairs)
    batches = evaluation_batches(corpus, batch_size=QUESTIONS_PER_BATCH)
    return [-float(loss) for batch in batches for loss in engine.evaluate(batch).cross_entropy]


def _continuations(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> Corpus:
    """A corpus of prompts and texts, only the texts scored. Unlike in training, no end-of-text token."""
    begin = bos_prefix(tokenizer)  # as in training
    prompts = [begin + tokenizer.encode(prompt, add_special_tokens=False) for prompt, _ in pairs]
    texts = [tokenizer.encode(text, add_special_tokens=False) for _, text in pairs]
    rows = list(zip(prompts, texts, strict=True))
    return Corpus(
        input_ids=np.array([token for row in rows for part in row for token in part], np.int32),
        loss_mask=np.concatenate([np.arange(len(p) + len(t)) >= len(p) for p, t in rows]),
        offsets=np.concatenate(([0], np.cumsum([len(p) + len(t) for p, t in rows]))),
        authority_weight=np.zeros(len(pairs)),  # unused: nothing is weighted here
        provenance_entropy=np.zeros(len(pairs)),
        locations=tuple(Location(str(QUESTIONS), line) for line in range(1, len(pairs) + 1)),
    )
