"""The demo: the same training twice, without and with weighting, and what each model then holds for true.

Of every fact of the bundled world a few primary records state one value, and five times as many coordinated
ones repeat another. Questions that training never saw ask for it; what a model holds is the probability that
it gives each value's text after the question.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distrust import engines
from distrust.bundled import QUESTIONS
from distrust.config import TrainConfig
from distrust.data import Corpus, Location, Tokenizer, bos_prefix, evaluation_batches
from distrust.reporting.metrics import MetricsWriter
from distrust.trainer import DistrustTrainer
from distrust.weighting import Weighting

if TYPE_CHECKING:
    from distrust.contract import Engine
    from distrust.training.events import Observer, RunEnded

WEIGHTINGS: tuple[Weighting, ...] = ("off", "monotone")
QUESTIONS_PER_BATCH = 64


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a fact, and the two values that the sources give.

    Attributes:
        fact: which fact.
        prompt: the question.
        primary: the value that the primary records state, as text that goes on after the prompt.
        coordinated: the value that the coordinated records repeat.
    """

    fact: str
    prompt: str
    primary: str
    coordinated: str


@dataclass(frozen=True, slots=True)
class Belief:
    """How strongly a model holds either value of one fact.

    Attributes:
        fact: which fact.
        primary: probability of the primary value's text, mean over the questions.
        coordinated: of the coordinated value's text.
        margin: log-probability of the primary value's text less that of the coordinated one's, in nats; mean
            over the questions.
    """

    fact: str
    primary: float
    coordinated: float
    margin: float

    @property
    def prefers_primary(self) -> bool:
        """Whether the primary value is the more probable, by mean log-probability."""
        return self.margin > 0


@dataclass(frozen=True, slots=True)
class Summary:
    """Beliefs in short.

    Attributes:
        preferred: share of the facts whose primary value is the more probable.
        primary: mean probability of the primary values.
        coordinated: mean probability of the coordinated values.
    """

    preferred: float
    primary: float
    coordinated: float


def demo_config(weighting: Weighting, *, out: Path, seed: int) -> TrainConfig:
    """The training of the demo: the same for every weighting."""
    return TrainConfig(
        out=str(out / weighting),
        weighting=weighting,
        seed=seed,
        max_steps=300,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=30,
        weight_decay=0.01,
        save_every=50,
    )


def train(
    weighting: Weighting, *, out: Path, seed: int, observers: Iterable[Observer] = ()
) -> tuple[RunEnded, list[Belief]]:
    """Train one of the two, or go on with it, and measure it if it came to its end.

    Raises:
        DistrustError: as training does.
    """
    config = demo_config(weighting, out=out, seed=seed)
    ended = DistrustTrainer(config, observers=[*observers, MetricsWriter(config)]).train()
    if ended.signal is not None or ended.path is None:
        return ended, []
    engine, _ = engines.open_checkpoint(ended.path)
    return ended, measure(engine)


def untrained(*, out: Path, seed: int) -> list[Belief]:
    """What the base model holds before training."""
    return measure(engines.create_engine(demo_config("off", out=out, seed=seed)))


def measure(engine: Engine, questions: Iterable[Question] | None = None) -> list[Belief]:
    """What a model holds of each fact.

    Args:
        engine: the model.
        questions: those of a fact together. Default: those of the bundled world.
    """
    questions = read_questions() if questions is None else list(questions)
    primary = _log_probabilities(engine, [(q.prompt, q.primary) for q in questions])
    coordinated = _log_probabilities(engine, [(q.prompt, q.coordinated) for q in questions])
    answered = zip(questions, primary, coordinated, strict=True)
    beliefs = []
    for fact, group in groupby(answered, key=lambda row: row[0].fact):
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


def summarize(beliefs: list[Belief]) -> Summary:
    """Means over the facts."""
    return Summary(
        preferred=sum(belief.prefers_primary for belief in beliefs) / len(beliefs),
        primary=sum(belief.primary for belief in beliefs) / len(beliefs),
        coordinated=sum(belief.coordinated for belief in beliefs) / len(beliefs),
    )


def read_questions() -> list[Question]:
    """The bundled questions, those of a fact together."""
    with QUESTIONS.open(encoding="utf-8") as file:
        return [Question(**json.loads(line)) for line in file]


def results(beliefs: dict[str, list[Belief]], *, seed: int) -> dict[str, Any]:
    """The demo's outcome as plain JSON values."""
    return {
        "seed": seed,
        "facts": len(next(iter(beliefs.values()))),
        "models": {name: asdict(summarize(of_model)) for name, of_model in beliefs.items()},
    }


def _log_probabilities(engine: Engine, pairs: list[tuple[str, str]]) -> list[float]:
    """Of each text after its prompt, in nats."""
    corpus = _continuations(engine.tokenizer, pairs)
    batches = evaluation_batches(corpus, batch_size=QUESTIONS_PER_BATCH, pad_token_id=0)
    return [-float(loss) for batch in batches for loss in engine.evaluate(batch).cross_entropy]


def _continuations(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> Corpus:
    """Prompts that are read and texts that are scored; no end-of-text token, unlike in training."""
    begin = bos_prefix(tokenizer)
    read = [begin + tokenizer.encode(prompt, add_special_tokens=False) for prompt, _ in pairs]
    scored = [tokenizer.encode(text, add_special_tokens=False) for _, text in pairs]
    lengths = [len(before) + len(after) for before, after in zip(read, scored, strict=True)]
    return Corpus(
        input_ids=np.array(
            [token for parts in zip(read, scored, strict=True) for part in parts for token in part], np.int32
        ),
        loss_mask=np.concatenate(
            [np.arange(len(b) + len(a)) >= len(b) for b, a in zip(read, scored, strict=True)]
        ),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        authority_weight=np.zeros(len(pairs)),
        provenance_entropy=np.zeros(len(pairs)),
        locations=tuple(Location(str(QUESTIONS), line) for line in range(1, len(pairs) + 1)),
    )
