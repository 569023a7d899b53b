"""How options are defined, read and checked: groups, bounds, TOML, conversion to the type, documentation."""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import json
import math
import os
import re
import textwrap
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partialmethod
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from distrust.errors import ConfigError, read_failure_reason, shorten

MAX_TOML_BYTES = 1 << 24  # 16 MiB: a table of ranks may name each of a million institutions

Effect = Literal["result", "bits", "free"]


class Bound(NamedTuple):
    """What a value must satisfy, and the advice for one that does not. None satisfies every bound."""

    holds: Callable[[Any], bool]
    advice: str


@dataclass(frozen=True)
class Group:
    """A heading of options in the help and in the reference; its methods define options under it."""

    title: str

    def _option(
        self, default: Any, bound: Bound | None = None, *, effect: Effect, if_changed: bool = False
    ) -> Any:
        metadata = {"group": self.title, "effect": effect, "bound": bound, "if_changed": if_changed}
        return field(default=default, metadata=metadata)

    # It changes the result. ``if_changed``: checkpoints record it only if it differs from its default, so
    # that an option that came later leaves the digests of runs without it as they were.
    result = partialmethod(_option, effect="result")
    bits = partialmethod(_option, effect="bits")  # it changes only the last bits
    free = partialmethod(_option, effect="free")  # it does not change the result


def in_range(value: float | None, low: float, high: float = math.inf) -> bool:
    """Whether a value is None, or finite and in [low, high]."""
    try:
        return value is None or (math.isfinite(value) and low <= value <= high)
    except OverflowError:  # an integer beyond the largest float
        return False


def interval(low: float, high: float = math.inf, *, advice: str = "") -> Bound:
    """A bound for finite numbers in [low, high]."""
    upper = "or more" if high == math.inf else f"to {high}"
    return Bound(lambda value: in_range(value, low, high), advice or f"give {low} {upper}")


def parse_ranges(text: str) -> list[range]:
    """The ranges in text such as ``0,4,8-15``, which :data:`RANGES` allows."""
    parts = (part.partition("-") for part in text.split(","))
    return [range(int(first), int(last or first) + 1) for first, _, last in parts]


_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", re.ASCII)
RANGES = Bound(
    lambda text: _RANGES.fullmatch(text) is not None and all(parse_ranges(text)),
    "give numbers and ranges, such as 0,4,8-15",
)
NON_NEGATIVE, POSITIVE = interval(0), interval(1)
ABOVE_ZERO = Bound(lambda value: value > 0 and math.isfinite(value), "give more than 0")
BELOW_ONE = Bound(lambda value: 0 <= value < 1, "give 0 or more, and less than 1")


class Documentation:
    """A docstring that also lists every option of its class; built when it is read, from the source."""

    def __init__(self, docstring: str) -> None:
        self._docstring = docstring

    def __get__(self, instance: object, owner: type) -> str:
        summary, separator, raises = inspect.cleandoc(self._docstring).partition("\n\nRaises:")
        options = (
            textwrap.fill(f"{name}: {text}", 100, initial_indent=" " * 4, subsequent_indent=" " * 8)
            for name, text in read_docs(owner).items()
        )
        return "\n".join([summary, "", "Args:", *options]) + separator + raises


@cache
def read_docs(config: type) -> dict[str, str]:
    """The documentation of each field of a config class, as one line: the string below the field."""
    (body,) = ast.parse(inspect.getsource(config)).body
    docs = {}
    for statements in pairwise(body.body if isinstance(body, ast.ClassDef) else []):
        match statements:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                docs[name] = " ".join(text.split())
    return docs


def read_toml(path: Path, flag: str) -> dict[str, Any]:
    """The content of a TOML file that was given with a flag; ConfigError if it cannot be read."""
    try:
        return tomllib.loads(read_text(path, flag, max_bytes=MAX_TOML_BYTES))
    except (ValueError, RecursionError) as error:  # TOML, a number of thousands of digits
        raise ConfigError(f"{flag} {path}: not valid TOML: {error}") from None


def read_text(path: Path, flag: str, *, max_bytes: int) -> str:
    """The text of a file that was given with a flag; ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:  # the user named it: it may be a pipe
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ConfigError(f"{flag} {path}: more than {max_bytes:,} bytes; give a smaller file")
        return content.decode()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {read_failure_reason(error)}") from None
    except ValueError as error:  # not UTF-8
        raise ConfigError(f"{flag} {path}: cannot be read: {error}") from None


def to_toml(values: Mapping[str, Any]) -> str:
    """The text of a TOML file with these top-level keys: strings, finite numbers, booleans, lists of them."""
    lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())
    return "".join(lines).replace("\x7f", "\\u007f")  # as in JSON, but TOML wants DEL escaped


def as_text(value: Any, show: Callable[[Any], str] = str) -> str:
    """An option's value for a message: the entries of a list side by side."""
    return shorten(" ".join(map(show, value)) or "nothing" if isinstance(value, tuple) else show(value))


def suggest_name(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: ``; did you mean X?``, or nothing."""
    # Files may be written with the flags' hyphens.
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def to_plain(value: Any, hint: Any) -> Any:
    """Paths become strings; a list of one name becomes that name, if the option takes several."""
    if hint is not str and str not in get_args(hint):
        return value  # no option of paths
    takes_several = any(get_origin(choice) is tuple for choice in get_args(hint))
    if takes_several and isinstance(value, (list, tuple)):
        names = type(value)(os.fspath(name) if isinstance(name, os.PathLike) else name for name in value)
        return names[0] if len(names) == 1 else names or ("",)  # an empty list is reported as an empty name
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def coerce(value: Any, hint: Any) -> Any:
    """``value`` as the annotated type if nothing is lost; raises TypeError with advice if not."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        # The last choice is X or tuple[X, ...]; one before it is str, for a single name.
        *alternatives, inner = [choice for choice in get_args(hint) if choice is not type(None)]
        if not alternatives:
            return coerce(value, inner)
        if isinstance(value, str):  # a flag's text may be the other type
            return int(value) if inner is int and value.isdecimal() else value
        with contextlib.suppress(TypeError):
            return coerce(value, inner)
        raise TypeError(f"give a name, or {'a whole number' if inner is int else 'a list of names'}")
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise TypeError(f"give one of {', '.join(get_args(hint))}")
    if origin is tuple:  # every list option is tuple[X, ...]
        inner = get_args(hint)[0]
        with contextlib.suppress(TypeError):
            if isinstance(value, (list, tuple)):
                return tuple(coerce(item, inner) for item in value)
        if get_origin(inner) is Literal:
            raise TypeError(f"give a list of {', '.join(get_args(inner))}")
        raise TypeError(f"give a list of {'strings' if inner is str else 'numbers'}")
    if hint is float and type(value) is int:  # TOML and Python users write 1 for 1.0
        with contextlib.suppress(OverflowError):
            return float(value)
    if type(value) is not hint:  # not isinstance: True is no whole number
        expected = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise TypeError(f"give {expected[hint]}")
    return value
