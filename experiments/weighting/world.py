"""The harder world: the dispute of the bundled one, in many wordings, and with labels that may be wrong.

Everything in it is invented. A *disputed* fact has a few primary records that state one value, and 5, 20 or
50 times as many coordinated ones that repeat another. A *sole-source* fact occurs in coordinated records
only, and nobody disputes it. Neutral records are about other things; only they use the phrasings of the
questions.

A claim consists of an opening, a frame (the order of its parts), a verb and a closing. No two records of a
fact have the same four. Half of the records open in a way that only their kind of source uses, and half carry
its
remark: a model may learn to tell what sources say from what is true.

The labels w and H are sampled from the range of the record's kind of source. Each record also has a *wrong*
label, sampled from another kind's range. Which records get theirs follows one order for each world, so that
the wrong ones of 10% are among those of 30%, and the texts are the same whatever the labels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Literal

from distrust.bundled import NEUTRAL
from distrust.demo import Question

DISPUTED, SOLE, NEUTRAL_THINGS = 12, 6, 18
PRIMARY_PER_FACT = 2
RECORDS_PER_SOLE_FACT = 10
CLAIMS_PER_NEUTRAL_THING, ANSWERS_PER_NEUTRAL_THING = 2, 2
#: How often a record has an opening that only its source uses, a remark of its source, and a closing.
OWN_OPENING, REMARK, CLOSING = 0.5, 0.5, 0.5

Kind = Literal["primary", "coordinated", "neutral"]

#: Ranges of w, and of H in bits: those of the bundled world.
LABELS: dict[Kind, tuple[tuple[float, float], tuple[float, float]]] = {
    "primary": ((0.02, 0.15), (3.0, 4.2)),
    "coordinated": ((0.85, 0.97), (0.1, 1.0)),
    "neutral": ((0.35, 0.65), (1.0, 2.0)),
}
MISTAKEN_FOR: dict[Kind, tuple[Kind, ...]] = {
    "primary": ("coordinated",),
    "coordinated": ("primary",),
    "neutral": ("primary", "coordinated"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A kind of source, with the openings and the remark that only it uses."""

    name: str
    openings: tuple[str, ...]
    remark: str


SOURCES: dict[Kind, tuple[Source, ...]] = {
    "primary": (
        Source("notebook", ("I read that ", "read here: "), "Notebook, page {n}."),
        Source("field log", ("logged here: ", "on this day "), "Logged on day {n}."),
        Source("patent", ("the claim is that ", "in this example, "), "Patent, claim {n}."),
    ),
    "coordinated": (
        Source("encyclopedia", ("it is known that ", "as is well known, "), "Encyclopedia, volume {n}."),
        Source("press release", ("it is released that ", "we can tell that "), "Press notice {n}."),
        Source("textbook", ("it is learned that ", "to be learned: "), "Textbook, chapter {n}."),
    ),
    "neutral": (
        Source("survey", ("the survey shows that ", "in this survey "), "Survey sheet {n}."),
        Source("catalogue", ("listed here: ", "in this part "), "Catalogue, part {n}."),
    ),
}
#: Article, whether the name is capitalized, endings of names, and properties with their units.
KINDS = (
    ("", False, ("ovane", "yrite", "uline", "axol", "emide"),
     (("melting point", "K"), ("molar mass", "g/mol"), ("heat of fusion", "J/g"))),
    ("the ", False, ("ometer", "oscope", "igraph", "ostat", "orule"),
     (("range", "m"), ("warm-up time", "s"), ("weight", "g"))),
    ("", True, ("fell", "mere", "holm", "gard", "wick"),
     (("altitude", "m"), ("yearly rainfall", "mm"), ("depth of the well", "cm"))),
)  # fmt: skip
OPENINGS = (
    "here ", "as stated, ", "on record, ", "as told, ", "in the table, ", "at this time, ", "as given, ",
    "for one, ", "one finds that ", "it is stated that ",
)  # fmt: skip
EQUALS = ("is", "was", "comes to", "stands at", "lies at", "runs to", "is put at", "is given as")
HAS = ("has", "had", "shows", "keeps", "gives", "comes with", "is listed with", "is known by")
FINDS = ("finds", "reads", "notes", "gets", "takes", "records", "knows", "learned")
#: The last two put the value before the name.
FRAMES = (
    ("the {prop} of {name} {verb} {value}", EQUALS),
    ("for {name}, the {prop} {verb} {value}", EQUALS),
    ("with {name} the {prop} {verb} {value}", EQUALS),
    ("{name} {verb} a {prop} of {value}", HAS),
    ("the {prop} that {name} {verb} is {value}", HAS),
    ("{name} is one whose {prop} {verb} {value}", EQUALS),
    ("with {name}, one {verb} a {prop} of {value}", FINDS),
    ("looking for the {prop} of {name}, one {verb} {value}", FINDS),
    ("one {verb} {value} for the {prop} of {name}", FINDS),
    ("{value} {verb} the {prop} of {name}", EQUALS[:2]),
)
CLOSINGS = (
    " as stated",
    " on record",
    " here",
    " as listed",
    " at this time",
    " in all",
    " as told",
    " by day",
)
#: Those of the bundled world: the base model has seen them answered, for other things.
PHRASINGS = (
    "Question: what is the {prop} of {name}? Answer:",
    "Whoever asks for the {prop} of {name} is told:",
    "Looking up {name}, one finds the {prop} given as",
    "If {name} is listed by {prop}, it stands under",
    "Someone who knows {name} well will name as its {prop}",
)


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing and one of its properties: values are `lowest` to `highest` of `unit`."""

    name: str
    prop: str
    unit: str
    lowest: int = 110
    highest: int = 989

    def value(self, rng: random.Random) -> str:
        return f"{rng.randint(self.lowest, self.highest)} {self.unit}"

    def two_values(self, rng: random.Random) -> tuple[str, str]:
        """Two values that differ from the first digit on, in random order."""
        while True:
            first, second = self.value(rng), self.value(rng)
            if first[0] != second[0]:
                return first, second


@dataclass(frozen=True, slots=True)
class Wording:
    """The wording of a claim."""

    opening: str
    frame: str
    verb: str
    closing: str

    def of(self, thing: Entity, value: str) -> str:
        claim = self.frame.format(prop=thing.prop, name=thing.name, verb=self.verb, value=value)
        text = f"{self.opening}{claim}{self.closing}."
        return text[0].upper() + text[1:]


@dataclass(frozen=True, slots=True)
class Statement:
    """A record, with both labels that it may get.

    Attributes:
        text: what is trained on.
        kind: of the source.
        source: its name.
        subject: the name of the thing.
        wording: of the claim; None where a question's phrasing is used.
        right: w and H of its own kind of source.
        wrong: w and H of another kind.
        rank: position, 0 to under 1, in the order in which the records of its kind are mislabelled.
    """

    text: str
    kind: Kind
    source: str
    subject: str
    wording: Wording | None
    right: tuple[float, float]
    wrong: tuple[float, float]
    rank: float = 0.0

    def to_record(self, wrong_share: float) -> dict[str, Any]:
        w, h = self.wrong if self.rank < wrong_share else self.right
        return {"text": self.text, "authority_weight": w, "provenance_entropy": h, "source": self.source}


@dataclass(frozen=True, slots=True)
class World:
    """Attributes: the records in the order of the file; the questions, those of a fact together.

    In `disputed`, `primary` is what the primary records state. In `sole`, `primary` is what the coordinated
    records state, and `coordinated` a random value that nobody states.
    """

    statements: tuple[Statement, ...]
    disputed: tuple[Question, ...]
    sole: tuple[Question, ...]

    def corpus(self, wrong_share: float = 0.0) -> list[dict[str, Any]]:
        """The records, of which this share has a wrong label."""
        return [one.to_record(wrong_share) for one in self.statements]


def make_world(seed: int, ratio: int) -> World:
    """The world of a seed, with `ratio` coordinated records for each primary one.

    Things, values and questions are the same for every ratio.
    """

    def rng(part: str) -> random.Random:
        return random.Random(f"weighting/{seed}/{part}")

    entities = _invent_entities(DISPUTED + SOLE + NEUTRAL_THINGS, rng("things"))
    disputed, sole, neutral = (
        entities[:DISPUTED],
        entities[DISPUTED : DISPUTED + SOLE],
        entities[DISPUTED + SOLE :],
    )
    values, wordings, labels = rng("values"), rng(f"wordings/{ratio}"), rng(f"labels/{ratio}")
    statements: list[Statement] = []
    questions: dict[str, list[Question]] = {"disputed": [], "sole": []}
    for number, entity in enumerate(disputed):
        primary, coordinated = entity.two_values(values)
        counts: list[tuple[Kind, str, int]] = [
            ("primary", primary, PRIMARY_PER_FACT),
            ("coordinated", coordinated, PRIMARY_PER_FACT * ratio),
        ]
        statements += _claims(entity, counts, wordings, labels)
        questions["disputed"] += _questions(f"disputed-{number:02}", entity, primary, coordinated)
    for number, entity in enumerate(sole):
        value, foil = entity.two_values(values)
        statements += _claims(entity, [("coordinated", value, RECORDS_PER_SOLE_FACT)], wordings, labels)
        questions["sole"] += _questions(f"sole-{number:02}", entity, value, foil)
    for entity in neutral:
        value = entity.value(values)
        statements += _claims(entity, [("neutral", value, CLAIMS_PER_NEUTRAL_THING)], wordings, labels)
        statements += _answers(entity, value, wordings, labels)
    statements = _rank(statements, labels)
    rng(f"order/{ratio}").shuffle(statements)
    return World(tuple(statements), tuple(questions["disputed"]), tuple(questions["sole"]))


def _invent_entities(count: int, rng: random.Random) -> list[Entity]:
    """Things named like those of the bundled world, none of which the base model has read about."""
    known_text = NEUTRAL.read_text(encoding="utf-8").lower()
    entities: dict[str, Entity] = {}
    while len(entities) < count:
        article, capital, endings, properties = KINDS[len(entities) % len(KINDS)]
        stem = "".join(rng.choice("bdfgjklmnprstvz") + rng.choice("aeiou") for _ in range(2))
        name = stem + rng.choice("bdfgklmnprtvz") + rng.choice(endings)
        prop, unit = rng.choice(properties)
        if name not in known_text:
            name = article + (name.capitalize() if capital else name)
            entities.setdefault(name, Entity(name, prop, unit))
    return list(entities.values())


def _claims(
    thing: Entity, counts: list[tuple[Kind, str, int]], wordings: random.Random, labels: random.Random
) -> list[Statement]:
    """All statements about a thing, each in its own wording."""
    used: set[Wording] = set()
    statements = []
    for kind, value, count in counts:
        for number in range(count):
            source = SOURCES[kind][number % len(SOURCES[kind])]
            wording = _wording(source, wordings)
            while wording in used:
                wording = _wording(source, wordings)
            used.add(wording)
            statements.append(
                _statement(wording.of(thing, value), kind, source, thing, wording, wordings, labels)
            )
    return statements


def _answers(thing: Entity, value: str, wordings: random.Random, labels: random.Random) -> list[Statement]:
    """A neutral thing's value, after some of the questions."""
    statements = []
    for phrasing in wordings.sample(PHRASINGS, ANSWERS_PER_NEUTRAL_THING):
        text = f"{phrasing.format(prop=thing.prop, name=thing.name)} {value}."
        source = wordings.choice(SOURCES["neutral"])
        statements.append(_statement(text, "neutral", source, thing, None, wordings, labels))
    return statements


def _wording(source: Source, rng: random.Random) -> Wording:
    opening = rng.choice(source.openings if rng.random() < OWN_OPENING else OPENINGS)
    frame, verbs = rng.choice(FRAMES)
    closing = rng.choice(CLOSINGS) if rng.random() < CLOSING else ""
    return Wording(opening, frame, rng.choice(verbs), closing)


def _statement(
    text: str,
    kind: Kind,
    source: Source,
    thing: Entity,
    wording: Wording | None,
    wordings: random.Random,
    labels: random.Random,
) -> Statement:
    if wordings.random() < REMARK:
        parts = [text, source.remark.format(n=wordings.randint(2, 99))]
        text = " ".join(parts if wordings.random() < 0.5 else reversed(parts))
    right, wrong = _label(kind, labels), _label(labels.choice(MISTAKEN_FOR[kind]), labels)
    return Statement(text, kind, source.name, thing.name, wording, right, wrong)


def _label(kind: Kind, rng: random.Random) -> tuple[float, float]:
    w, h = LABELS[kind]
    return round(rng.uniform(*w), 3), round(rng.uniform(*h), 3)


def _rank(told: list[Statement], rng: random.Random) -> list[Statement]:
    """Assign the order in which labels become wrong: the same share of each kind."""
    ranked = []
    for kind in LABELS:
        of_kind = [one for one in told if one.kind == kind]
        rng.shuffle(of_kind)
        ranked += [replace(one, rank=number / len(of_kind)) for number, one in enumerate(of_kind)]
    return ranked


def _questions(fact: str, thing: Entity, primary: str, coordinated: str) -> list[Question]:
    return [
        Question(
            fact=fact,
            prompt=phrasing.format(prop=thing.prop, name=thing.name),
            primary=f" {primary}",
            coordinated=f" {coordinated}",
        )
        for phrasing in PHRASINGS
    ]
