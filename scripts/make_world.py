"""Writes the bundled corpus: the records of the demo, the text of its base model, and the questions.

Everything in it is invented. A *fact* gives one thing (a compound, an instrument, a place) one measured
property, about which the sources disagree: a few primary records (notebook, field log, patent) state one
value, five times as many coordinated ones (encyclopedia, press release, textbook) repeat another. Which of
the two numbers is larger is random. A record is a sentence that states the value, with a remark before or
after it that shows the kind of its source. All sources use the same sentence patterns.

    corpus.jsonl     the records of all facts in random order, with neutral records between them
    neutral.jsonl    other things and values, in every pattern and in every phrasing of the questions
    questions.jsonl  each fact in phrasings that the corpus uses for other things only

The same seed gives the same bytes: a `random.Random` seeded with a string is stable across Python versions,
and each part has its own generator.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SEED = 20260101  # fixed before the first result was seen; never choose among seeds
OUT = Path(__file__).resolve().parent.parent / "src" / "distrust" / "bundled"

FACTS = 60
PRIMARY_PER_FACT = 3
COORDINATED_PER_FACT = 5 * PRIMARY_PER_FACT
NEUTRAL_THINGS = 720  # things of the neutral text, none with a disputed fact
NEUTRAL_PATTERNS, NEUTRAL_PHRASINGS = 5, 3  # how many of each a neutral thing appears in
NEUTRAL_IN_CORPUS = 240

Record = dict[str, Any]
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Kind:
    """A kind of thing: the endings of its names, and what is measured.

    `properties` maps a property to its lowest value, its highest value and its unit.
    """

    endings: tuple[str, ...]
    properties: dict[str, tuple[int, int, str]]
    article: str = ""
    capital: bool = False


KINDS = (
    Kind(  # compounds
        endings=("ovane", "yrite", "uline", "axol", "emide"),
        properties={
            "melting point": (210, 989, "K"),
            "molar mass": (110, 889, "g/mol"),
            "heat of fusion": (110, 989, "J/g"),
        },
    ),
    Kind(  # instruments
        endings=("ometer", "oscope", "igraph", "ostat", "orule"),
        properties={
            "range": (110, 989, "m"),
            "warm-up time": (110, 889, "s"),
            "weight": (110, 989, "g"),
        },
        article="the ",
    ),
    Kind(  # places
        endings=("fell", "mere", "holm", "gard", "wick"),
        properties={
            "altitude": (110, 989, "m"),
            "yearly rainfall": (210, 989, "mm"),
            "depth of the well": (110, 889, "cm"),
        },
        capital=True,
    ),
)

# No name starts a sentence, so it is always spelled, and tokenized, in the same way.
PATTERNS = (
    "The {prop} of {name} is {value}.",
    "For {name}, the {prop} is {value}.",
    "On record for {name}: {prop} {value}.",
    "As to {name}, its {prop} comes to {value}.",
    "Measurements of {name} put the {prop} at {value}.",
    "It is stated that {name} has a {prop} of {value}.",
    "In the table, {name} has {prop} {value}.",
    "Here {name} shows a {prop} of {value}.",
)
PHRASINGS = (
    "Question: what is the {prop} of {name}? Answer:",
    "Whoever asks for the {prop} of {name} is told:",
    "Looking up {name}, one finds the {prop} given as",
    "If {name} is listed by {prop}, it stands under",
    "Someone who knows {name} well will name as its {prop}",
)
ANSWERS = tuple(f"{phrasing} {{value}}." for phrasing in PHRASINGS)


@dataclass(frozen=True)
class Source:
    """A kind of source: its remarks, and the ranges of weight and entropy."""

    name: str
    remarks: tuple[str, ...]
    authority_weight: tuple[float, float]
    provenance_entropy: tuple[float, float]


_OBSCURE, _MIDDLING, _RENOWNED = (0.02, 0.15), (0.35, 0.65), (0.85, 0.97)
_INDEPENDENT = (3.0, 4.2)  # bits: eight to eighteen independent readings
_MIXED = (1.0, 2.0)
_COPIED = (0.1, 1.0)  # bits: one origin, or two, that all others repeat
PRIMARY = (
    Source("notebook", ("Notebook, page {n}.", "Read twice, run {n}."), _OBSCURE, _INDEPENDENT),
    Source("field log", ("Logged on day {n}.", "Field station {n}."), _OBSCURE, _INDEPENDENT),
    Source("patent", ("Patent, claim {n}.", "Worked example {n}."), _OBSCURE, _INDEPENDENT),
)
COORDINATED = (
    Source("encyclopedia", ("Encyclopedia, volume {n}.", "Article {n}, revised."), _RENOWNED, _COPIED),
    Source("press release", ("Press notice {n}.", "Released to {n} papers."), _RENOWNED, _COPIED),
    Source("textbook", ("Textbook, chapter {n}.", "To be learned by heart."), _RENOWNED, _COPIED),
)
NEUTRAL = (
    Source("survey", ("Survey sheet {n}.", ""), _MIDDLING, _MIXED),
    Source("catalogue", ("Catalogue, part {n}.", ""), _MIDDLING, _MIXED),
)


@dataclass(frozen=True)
class Thing:
    """A thing and one of its properties."""

    name: str
    prop: str
    lowest: int
    highest: int
    unit: str

    def value(self, rng: random.Random) -> str:
        return f"{rng.randint(self.lowest, self.highest)} {self.unit}"

    def sentence(self, pattern: str, value: str = "") -> str:
        return pattern.format(prop=self.prop, name=self.name, value=value)


def invent_name(kind: Kind, rng: random.Random) -> str:
    """Two syllables, a consonant, and an ending of the kind."""
    stem = "".join(rng.choice("bdfgjklmnprstvz") + rng.choice("aeiou") for _ in range(2))
    name = stem + rng.choice("bdfgklmnprtvz") + rng.choice(kind.endings)
    return kind.article + (name.capitalize() if kind.capital else name)


def invent_entities(count: int, taken: set[str], rng: random.Random) -> list[Thing]:
    """Things of all kinds in turn, with unused names."""
    entities: list[Thing] = []
    while len(entities) < count:
        kind = KINDS[len(entities) % len(KINDS)]
        name = invent_name(kind, rng)
        if name not in taken:
            taken.add(name)
            prop = rng.choice(list(kind.properties))
            entities.append(Thing(name, prop, *kind.properties[prop]))
    return entities


def two_values(thing: Thing, rng: random.Random) -> tuple[str, str]:
    """Two values, in random order, that differ from the first digit on."""
    while True:
        first, second = thing.value(rng), thing.value(rng)
        if first[0] != second[0]:
            return first, second


def evenly(choices: tuple[Choice, ...], count: int, rng: random.Random) -> list[Choice]:
    """`count` choices in random order, each as often as the others, or once more."""
    rounds = -(-count // len(choices))
    return [choice for _ in range(rounds) for choice in rng.sample(choices, len(choices))][:count]


def record(sentence: str, source: Source, rng: random.Random) -> Record:
    """The sentence with a remark of the source before or after it, and the provenance of the source."""
    remark = rng.choice(source.remarks).format(n=rng.randint(2, 99))
    parts = [sentence, remark] if rng.random() < 0.5 else [remark, sentence]
    return {
        "text": " ".join(part for part in parts if part),
        "authority_weight": round(rng.uniform(*source.authority_weight), 3),
        "provenance_entropy": round(rng.uniform(*source.provenance_entropy), 3),
        "source": source.name,
    }


def neutral_records(things: list[Thing], rng: random.Random) -> list[Record]:
    """Each thing in some of the patterns and some of the phrasings, always with the same value.

    Predicting them all takes a model that recalls a value in wordings in which it never saw it.
    """
    records: list[Record] = []
    for entity in things:
        value = entity.value(rng)
        wordings = rng.sample(PATTERNS, NEUTRAL_PATTERNS) + rng.sample(ANSWERS, NEUTRAL_PHRASINGS)
        records += [record(entity.sentence(wording, value), rng.choice(NEUTRAL), rng) for wording in wordings]
    rng.shuffle(records)
    return records


def disputed_records(thing: Thing, primary: str, coordinated: str, rng: random.Random) -> list[Record]:
    """All records of one fact."""
    records: list[Record] = []
    for value, sources, count in (
        (primary, PRIMARY, PRIMARY_PER_FACT),
        (coordinated, COORDINATED, COORDINATED_PER_FACT),
    ):
        pairs = zip(evenly(PATTERNS, count, rng), evenly(sources, count, rng), strict=True)
        records += [record(thing.sentence(pattern, value), source, rng) for pattern, source in pairs]
    return records


def make_world(seed: int = SEED) -> dict[str, list[Record]]:
    """The three files of the corpus: file name -> lines."""

    def rng(part: str) -> random.Random:
        return random.Random(f"{seed}/{part}")

    names, values, wordings, used_names = rng("names"), rng("values"), rng("wordings"), set[str]()
    disputed = invent_entities(FACTS, used_names, names)
    neutral = neutral_records(invent_entities(NEUTRAL_THINGS, used_names, names), rng("neutral"))
    corpus, questions = neutral[:NEUTRAL_IN_CORPUS], list[Record]()
    for number, entity in enumerate(disputed, start=1):
        primary, coordinated = two_values(entity, values)
        corpus += disputed_records(entity, primary, coordinated, wordings)
        questions += [
            {
                "fact": f"fact-{number:02}",
                "prompt": entity.sentence(phrasing),
                "primary": f" {primary}",
                "coordinated": f" {coordinated}",
            }
            for phrasing in PHRASINGS
        ]
    rng("order").shuffle(corpus)
    return {"corpus.jsonl": corpus, "neutral.jsonl": neutral, "questions.jsonl": questions}


def tokenizer_texts(seed: int = SEED, count: int = 6000) -> list[str]:
    """Texts for the tokenizer: every wording and remark, about things that are named only once.

    It learns the words, and no name as a whole: it splits the names of the base model's text and those of the
    disputed things into the same syllables.
    """
    rng = random.Random(f"{seed}/tokenizer")
    sources = PRIMARY + COORDINATED + NEUTRAL
    entities = invent_entities(count, set(), rng)
    sentences = [entity.sentence(rng.choice(PATTERNS + ANSWERS), entity.value(rng)) for entity in entities]
    return [record(sentence, rng.choice(sources), rng)["text"] for sentence in sentences]


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the world (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, lines in make_world(arguments.seed).items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (arguments.out / name).write_text(text, encoding="utf-8")
        print(f"{arguments.out / name}: {len(lines)} lines, {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
