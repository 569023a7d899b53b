"""Which modules of a model get an adapter: ``--target-modules``, ``--exclude-modules`` and ``--layers``.

An engine says what it can adapt, by full name; the rules are the same for both. An entry is a name (a full
one, or the end of one after a dot), a shell pattern of such names, ``re:`` and a pattern of full names, or
``all-linear``. Every entry must select something, so that a mistyped name is never ignored.

A stranger's ``re:`` pattern could take forever, and earlier versions selected other modules. So a run records
what was selected: see :func:`as_trained`.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from distrust.config import TrainConfig
from distrust.engines.state_conversion import LAYER
from distrust.errors import ConfigError, shorten
from distrust.options import parse_ranges

ALL_LINEAR = "all-linear"
_PATTERN_PREFIX = "re:"
#: A trained tensor of an adapter, by peft or mlx-lm.
_ADAPTED = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_.+")
_ROUTERS = frozenset(("router", "router_gate", "shared_expert_gate"))
_EXPERTS = re.compile(r"\.(?:experts?|switch_mlp)(?=\.|$)")


@dataclass(frozen=True)
class Adaptable:
    """What an engine can adapt in a model."""

    engine: str
    shapes: Mapping[str, tuple[int, ...]]  # full name -> shape of its weight
    linear: Collection[str]  # of these, what ``all-linear`` means, with routers
    modules: Set[str]  # full names of all modules


@dataclass(frozen=True)
class Selection:
    """What gets an adapter."""

    names: Sequence[str] = ()  # full names, in the model's order
    lines: tuple[str, ...] = ()  # for the log: each kind with its number, shape and rank
    recorded: Mapping[str, Any] = field(default_factory=dict)  # entries that select the names


def select(config: TrainConfig, model: Adaptable) -> Selection:
    """The modules that a run adapts; ConfigError for an entry that selects nothing."""
    targets = _matches("--target-modules", config.target_modules, model)
    excluded = _matches("--exclude-modules", config.exclude_modules, model)
    in_layers, routers = _in_layers(config, model), _routers(model)
    if ALL_LINEAR in targets:
        targets[ALL_LINEAR] -= routers
    selected = in_layers.intersection(set().union(*targets.values()))
    for entry, matches in targets.items():
        if matches.isdisjoint(selected):
            problem = f"selects nothing in --layers {config.layers}" if config.layers else "selects nothing"
            raise _refusal("--target-modules", targets, entry, model, problem)
    chosen = selected.difference(*excluded.values())
    names = [name for name in model.shapes if name in chosen]
    if not names:
        raise ConfigError(f"--exclude-modules {' '.join(excluded)}: excludes all modules")
    left_out = sorted(routers - selected) if ALL_LINEAR in targets else []
    lines = tuple(_describe(names, left_out, model, rank=config.lora_rank))
    return Selection(names, lines, {"target_modules": shortest(names, (*model.modules, *model.shapes))})


def as_trained(config: TrainConfig, recorded: Any, tensors: Iterable[str], *, where: str) -> TrainConfig:
    """The config of a checkpoint, with names of modules in place of entries that may select others here.

    Args:
        config: as the checkpoint records it.
        recorded: what it records as its selection. Earlier versions recorded none.
        tensors: names of the trained tensors, which show what these versions adapted.
        where: names the checkpoint.

    Raises ConfigError if only a ``re:`` pattern says what was adapted.
    """
    if not _has_pattern(config) and recorded:
        return config
    if type(recorded) is not list or not recorded or not all(type(name) is str for name in recorded):
        recorded = {match[1]: None for name in tensors if (match := _ADAPTED.fullmatch(name))}
    if recorded:
        config = replace(config, target_modules=tuple(recorded), exclude_modules=(), layers=None)
    if _has_pattern(config):
        raise ConfigError(f"{where}: does not record which modules its --target-modules pattern selected")
    return config


def _has_pattern(config: TrainConfig) -> bool:
    entries = (*config.target_modules, *config.exclude_modules)
    return any(entry.startswith(_PATTERN_PREFIX) for entry in entries)


def shortest(names: Collection[str], modules: Iterable[str]) -> list[str]:
    """The shortest names that select just ``names`` among the modules: their ends, where these suffice."""
    other_kinds = {_kind(name) for name in modules if name not in names}
    return sorted({name if _kind(name) in other_kinds else _kind(name) for name in names})


def kinds(names: Iterable[str]) -> list[str]:
    """The ends of the names of modules, such as ``q_proj``, each once, sorted."""
    return sorted(set(map(_kind, names)))


def layer_of(name: str) -> int | None:
    """Number of the layer that a module is in; None for the embedding, the last norm and the head."""
    match = LAYER.search(f".{name}.")
    return int(match[1]) if match else None


def _matches(flag: str, entries: Sequence[str], model: Adaptable) -> dict[str, set[str]]:
    """What each entry selects of what can be adapted, with routers; ConfigError if it is nothing."""
    all_names = {*model.shapes, *model.modules}
    matches = {
        entry: set(model.linear if entry == ALL_LINEAR else filter(_matcher(flag, entry), all_names))
        for entry in entries
    }
    if missing := [entry for entry, names in matches.items() if not names]:
        problem = f"{'is' if len(missing) == 1 else 'are'} not in the model"
        raise _refusal(flag, entries, ", ".join(missing), model, problem)
    for entry, names in matches.items():
        adaptable = names & model.shapes.keys()
        # A pattern may match containers and norms, too; a name that does is a mistake.
        is_name = not (entry.startswith(_PATTERN_PREFIX) or {*"*?["}.intersection(entry))
        if not adaptable or (is_name and adaptable != names):
            raise _refusal(flag, entries, entry, model, "is no linear module")
        matches[entry] = adaptable
    return matches


def _matcher(flag: str, entry: str) -> Callable[[str], object]:
    if not entry.startswith(_PATTERN_PREFIX):
        return re.compile(rf"(?:.*\.)?{fnmatch.translate(entry)}").fullmatch
    try:
        return re.compile(entry.removeprefix(_PATTERN_PREFIX)).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{flag} {shorten(entry)}: is no valid pattern: {error}") from None


def _in_layers(config: TrainConfig, model: Adaptable) -> set[str]:
    """The names in the layers that ``--layers`` selects; all names without it."""
    if config.layers is None:
        return set(model.shapes)
    numbers = {name: layer_of(name) for name in model.shapes}
    last = max((number for number in numbers.values() if number is not None), default=-1)
    selected_numbers = {number for part in parse_ranges(config.layers) for number in part[: last + 2]}
    if max(selected_numbers) > last:
        raise ConfigError(f"--layers {config.layers}: the model's layers are 0 to {last}")
    return {name for name, number in numbers.items() if number in selected_numbers}


def _routers(model: Adaptable) -> set[str]:
    """The modules that choose experts: trained along with them, they unlearn to balance."""
    names = (*model.modules, *model.shapes)
    parents = {name[: match.start()] for name in names if (match := _EXPERTS.search(name))}
    gates = tuple(f"{parent}.gate." for parent in parents)  # elsewhere it is a plain layer
    return {n for n in model.linear if f"{n}.".startswith(gates) or not _ROUTERS.isdisjoint(n.split("."))}


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _describe(names: list[str], left_out: list[str], model: Adaptable, *, rank: int) -> Iterable[str]:
    by_shape: dict[tuple[int, ...], Counter[str]] = {}
    for name in names:
        by_shape.setdefault(model.shapes[name], Counter())[_kind(name)] += 1
    for shape, kinds in by_shape.items():
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        yield f"adapted: {listed} ({' x '.join(map(str, shape))}), rank {rank}"
    if left_out:
        kinds = Counter(".".join(name.split(".")[-2:]) for name in left_out)
        yield f"not adapted: {', '.join(f'{count} {kind}' for kind, count in kinds.items())} (routers)"


def _refusal(flag: str, entries: Iterable[str], entry: str, model: Adaptable, problem: str) -> ConfigError:
    return ConfigError(
        f"{flag} {shorten(' '.join(entries))}: {shorten(entry)} {problem}; the modules that {model.engine} "
        f"can adapt are: {', '.join(kinds(model.shapes))}"
    )
