"""Links and things that are no files, at every name that a command opens, lists or writes.

The names are those that the commands use on valid folders (``workplace``), so a new file of a run needs no
entry here. Each is replaced by each of :data:`THINGS`. The most dangerous are links to what looks right: the
command would go on, and write or remove elsewhere.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from campaigns.fuzz import corruptions, obstacles
from campaigns.fuzz.workplace import Workplace

LINKS = "links and special files at the names of commands"  # label of the counts
RANDOM_PLACES = 20  # in a case
_CONTENT = "another user's text\n"

#: Puts something at a path, where there is nothing; the second argument is a folder of another user.
Place = Callable[[Path, Path], object]


def _link_to(name: str) -> Place:
    return lambda path, outside: path.symlink_to(outside / name)


def _hard_link_to(name: str) -> Place:
    return lambda path, outside: path.hardlink_to(outside / name)


def _link_to_pipe(path: Path, outside: Path) -> None:
    os.mkfifo(outside / "pipe")
    path.symlink_to(outside / "pipe")


def _full_folder(path: Path, _: Path) -> None:
    (path / "checkpoints").mkdir(parents=True)
    for name in ("file", "checkpoints/checkpoint-2.safetensors"):
        (path / name).write_text(_CONTENT)


def _open_link(path: Path, outside: Path) -> None:
    """A link that an access through the name of the folder would not show: it leads up and out."""
    path.symlink_to(os.path.relpath(outside / "folder", path.parent))


# s that need nothing of what was there before.
FOREIGN: dict[str, Place] = {
    **{
        name: lambda path, _, make=make: make(path)  # type: ignore[misc]
        for name, make in obstacles.OBSTACLES.items()
        if not name.endswith(("outside", "a secret", "its directory"))
    },
    "a folder with files": _full_folder,
    "a link to another's file": _link_to("secret"),
    "a link to another's folder": _link_to("folder"),
    "a relative link to another's folder": _open_link,
    "a link to what another has not": _link_to("new"),
    "a link to another's pipe": _link_to_pipe,
    "a hard link of another's file": _hard_link_to("secret"),
}


def _move_and_link(path: Path, outside: Path) -> None:
    moved = path.rename(outside / path.name)
    path.symlink_to(moved)


def _move_and_hard_link(path: Path, outside: Path) -> None:
    moved = path.rename(outside / path.name)
    path.hardlink_to(moved)


# s made of what was there before: it seems to be in order.
SIMILAR: dict[str, Place] = {
    "a link to the same elsewhere": _move_and_link,
    "a hard link of the same elsewhere": _move_and_hard_link,
}
THINGS = {**FOREIGN, **SIMILAR}


def try_command(workplace: Workplace, name: str, rng: Random, *, most: int) -> Counter[str]:
    """Put every obstacle at every name of a command; at most so many of them, drawn at random."""
    pairs = [(at, obstacle) for at in workplace.names[name] for obstacle in THINGS]
    return try_pairs(workplace, name, rng.sample(pairs, min(most, len(pairs))))


def try_at_random(workplace: Workplace, rng: Random, *, places: int = RANDOM_PLACES) -> Counter[str]:
    """Put things at one or two names of random commands."""
    counts: Counter[str] = Counter()
    for _ in range(places):
        name = rng.choice([name for name, names in workplace.names.items() if names])
        number = rng.choice((1, 1, 2))
        pairs = [(rng.choice(workplace.names[name]), rng.choice([*THINGS])) for _ in range(number)]
        counts += try_pairs(workplace, name, pairs, together=True)
    return counts


def try_pairs(
    workplace: Workplace, name: str, pairs: list[tuple[str, str]], *, together: bool = False
) -> Counter[str]:
    """Run a command with these things at these names: one by one, or all at once."""
    counts: Counter[str] = Counter()
    for group in [pairs] if together else [[pair] for pair in pairs]:
        workplace.renew()
        placed = [pair for pair in group if place(workplace, *pair)]
        if not placed or any(workplace.would_wait(at) for at, _ in placed):
            continue
        label = ", ".join(f"{obstacle} at {at}" for at, obstacle in placed)
        links = [at for at, _ in placed]
        counts += Counter(
            {f"{LINKS}: {answer}": n for answer, n in workplace.try_out(name, label, links=links).items()}
        )
    return counts


def place(workplace: Workplace, at: str, obstacle: str) -> bool:
    """Put a obstacle at a name of the current copy; whether there was room for it."""
    path = workplace.inside / at
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if obstacle in SIMILAR and not os.path.lexists(path):
            return False
        if obstacle not in SIMILAR:
            corruptions.clear(path)
        THINGS[obstacle](path, workplace.outside)
    except OSError:  # a obstacle is at one of its parents; or a folder, of which there are no hard links
        return False
    return True
