"""Names below a folder that a user named: a stranger may have made them, so nothing is written through them.

A link in a folder can lead anywhere. What a user names may be a link; what this package adds to that name,
such as ``metrics.jsonl`` in a run, may not. Checks of names are for folders that nobody changes meanwhile;
where a file is opened, the open file itself is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from distrust.checkpoint.files import NOT_REGULAR
from distrust.checkpoint.remote.location import Location, is_url, parse, require_path
from distrust.errors import DataError, DistrustError, WriteFailed, quote_untrusted


def cache_folder(option: str | None = None) -> Path:
    """The cache folder: the option, else $DISTRUST_CACHE, else ``distrust`` in the user's cache folder."""
    if option is not None:
        return Path(option)
    if os.environ.get("DISTRUST_CACHE"):
        return require_path(os.environ["DISTRUST_CACHE"], "$DISTRUST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "distrust"


def local_folder(name: str) -> Path:
    """The folder that a user named; for a URL, the one in the cache that holds its local copy."""
    if not is_url(name):
        return Path(name)
    return cache_folder() / "runs" / cache_name(parse(name, "--out"))


def cache_name(location: Location) -> str:
    """The name of a location's folder in the cache."""
    digest = hashlib.sha256(str(location).encode()).hexdigest()[:12]  # names of buckets need not be unique
    return f"{location.name or location.bucket}-{digest}"


def refuse_links(*paths: Path) -> None:
    """Raise WriteFailed if one of the paths is a symbolic link: what is written there would be elsewhere."""
    for path in paths:
        if path.is_symlink():
            raise WriteFailed(
                f"{quote_untrusted(str(path))}: is a link, and nothing is written or removed through a link "
                "that the command does not name; replace it with what it links to",
                path=path,
            )


def require_regular_files(folder: Path, kind: type[DistrustError] = DataError) -> None:
    """:func:`require_regular` for a folder in which a library will open files, and for the folders in it."""
    require_regular(*_entries(folder), kind=kind)


def require_regular(*paths: Path, kind: type[DistrustError] = DataError) -> None:
    """Check names before a library opens them: opening a pipe would wait for a writer, forever.

    Links are followed, as libraries do: the hub's cache consists of them.

    Raises:
        DistrustError: of that ``kind``: something is neither a file nor a folder.
    """
    for path in paths:
        with contextlib.suppress(OSError):  # a link to nothing: the library says what it lacks
            mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise kind(f"{quote_untrusted(str(path))}: {NOT_REGULAR}; remove it")


def _entries(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):  # the library reports a folder that cannot be listed
        for path in folder.iterdir():
            yield path
            if path.is_dir():
                yield from path.iterdir()
