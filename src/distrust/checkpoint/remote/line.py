"""The names of a mirror's objects, and which of them count. Pure: no requests.

A listing may be hostile. A name that no writer gives is ignored, and no key ever becomes a path.

Each writer has a *term*, a number that only it has, and a *base*, the step from which it goes on. A writer
that was replaced may still finish an upload. So what an earlier term wrote counts only up to the smallest
base of the later ones. A plain name, such as ``checkpoint-50.safetensors``, was copied there by a person, and
counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from distrust.checkpoint.checkpoint_file import Rank
from distrust.checkpoint.format import MAX_SIZE, Kind
from distrust.checkpoint.remote.client import ObjectInfo

#: Characters of the state's digest in a name: they tell states apart, and the file proves the rest.
DIGEST_CHARACTERS = 16
#: The folder of the terms, beside the checkpoints.
TERMS = "terms/"
_NAME = re.compile(
    r"checkpoint-(0|[1-9][0-9]{0,17})(-final)?(?:\.([1-9][0-9]{0,7})-([0-9a-f]{16}))?\.safetensors", re.ASCII
)
_TERM = re.compile(r"terms/([0-9]{8})\.(json|beat|end)", re.ASCII)


class RemoteFile(NamedTuple):
    """A checkpoint in a store, as its key states it."""

    key: str  #: below the location of the client
    size: int  #: in bytes
    step: int
    kind: Kind
    term: int  #: of its writer; 0 for a plain name
    digest: str  #: the beginning of the state's digest; empty for a plain name

    @property
    def rank(self) -> Rank:
        """As ``CheckpointFile.rank``, by the name."""
        return self.step, True, True, self.kind == "final"


class Term(NamedTuple):
    """A writer's right to write, as a listing shows it."""

    number: int
    beat: str  #: changes while the writer lives; empty if there was none yet
    has_ended: bool  #: whether the writer has said that it ended


def object_name(step: int, kind: Kind, term: int, state_digest: str) -> str:
    """The name of a checkpoint that a writer uploads."""
    suffix = "-final" if kind == "final" else ""
    return f"checkpoint-{step}{suffix}.{term}-{state_digest[:DIGEST_CHARACTERS]}.safetensors"


def term_key(number: int, kind: str) -> str:
    """The key of a term's ``beat``, ``end``, or the ``json`` that gives the right and never changes."""
    return f"{TERMS}{number:08d}.{kind}"


def parse_key(info: ObjectInfo) -> RemoteFile | None:
    """The checkpoint that the last part of a key names; None for any other name, or an impossible size."""
    match = _NAME.fullmatch(info.key.rpartition("/")[2])
    if match is None or not 0 <= info.size < MAX_SIZE:
        return None
    kind: Kind = "final" if match[2] else "periodic"
    return RemoteFile(info.key, info.size, int(match[1]), kind, int(match[3] or 0), match[4] or "")


def parse_terms(infos: Iterable[ObjectInfo]) -> dict[int, Term]:
    """The terms among the objects of one folder, by number; keys are relative to that folder."""
    marks: dict[tuple[int, str], str] = {}
    for info in infos:
        if match := _TERM.fullmatch(info.key):
            marks[int(match[1]), match[2]] = info.etag
    numbers = sorted(number for number, kind in marks if kind == "json" and number)
    return {
        number: Term(number, marks.get((number, "beat"), ""), (number, "end") in marks) for number in numbers
    }


def parse_term(content: bytes | memoryview) -> dict[str, Any]:
    """What a term's object says: ``base``, ``nonce``, perhaps ``host`` and ``pid``.

    Raises ValueError if no writer writes that: without its base nobody can tell what counts.
    """
    try:
        values: Any = json.loads(bytes(content))
    except RecursionError:  # nested without end
        values = None
    if type(values) is not dict or type(values.get("base")) is not int or not 0 <= values["base"] < MAX_SIZE:
        raise ValueError("it states no base")
    return values


def bounding_terms(files: Iterable[RemoteFile], terms: Mapping[int, Term]) -> list[int]:
    """The terms whose bases :func:`line` needs: those later than the first writer of a file."""
    first = min((file.term for file in files if file.term), default=None)
    return [] if first is None else [number for number in terms if number > first]


def line(files: Iterable[RemoteFile], bases: Mapping[int, int]) -> list[RemoteFile]:
    """The files that count, by step, kind and term; ``bases`` has the base of each term that bounds one."""
    counting = [
        file
        for file in files
        if not file.term or all(file.step <= base for term, base in bases.items() if term > file.term)
    ]
    return sorted(counting, key=lambda file: (file.rank, file.term))
