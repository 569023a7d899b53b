"""Names of objects: ``s3://bucket/key``, ``gs://bucket/key``, ``az://container/key``, and folders.

A URL is never a path: everything that takes the name of a file or folder either understands a URL or refuses
it with :func:`require_path`. Python's paths would make a folder ``s3:`` of it, in silence.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PosixPath

from distrust.errors import ConfigError, quote_untrusted

#: The schemes of object stores, and what the part after the slashes names.
STORES = {"s3": "bucket", "gs": "bucket", "az": "container"}
#: What users write for the same.
_SYNONYMS = {"s3a": "s3", "gcs": "gs", "azure": "az", "abfs": "az", "abfss": "az"}
# One letter is a drive, and one slash is left of two where a program took a URL for a path.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)", re.ASCII)
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]{2,221}", re.ASCII)


@dataclass(frozen=True)
class Location:
    """An object, or the beginning of the names of several ("a folder"), in a store."""

    scheme: str  #: of STORES, or "file" for a folder of this machine
    bucket: str  #: or container; empty for a folder
    key: str  #: without slashes at its ends; of a folder the absolute path

    def __truediv__(self, name: str) -> Location:
        return replace(self, key=f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return self.key if self.scheme == "file" else f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    @property
    def path(self) -> Path:
        """The name of it for what names files by paths: listings, errors, a command's output."""
        return Path(self.key) if self.scheme == "file" else ObjectPath(str(self))

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Location:
        """What contains it."""
        return replace(self, key=self.key.rpartition("/")[0])


#: What is read: here, or in a store.
Target = Path | Location


class ObjectPath(PosixPath):
    """A path that prints as the URL of an object. No function of the system takes it for a local file."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)  # a path has one slash where a URL has two

    def __fspath__(self) -> str:
        raise ConfigError(f"{self}: is in a store; fetch it with `distrust copy`")


def is_url(text: str | os.PathLike[str] | None) -> bool:
    """Whether text is a URL, or a path that was made of one."""
    return isinstance(text, ObjectPath) or (text is not None and _URL.match(os.fspath(text)) is not None)


def require_path(text: str | os.PathLike[str], name: str, advice: str = "give a local path") -> Path:
    """The path that a user gave for ``name``, such as ``--to``; ConfigError for a URL, with advice."""
    if is_url(text):
        raise ConfigError(f"{name} {quote_untrusted(str(text))}: a URL is not understood here; {advice}")
    return Path(text)


def parse_target(text: str | os.PathLike[str] | Location, name: str = "target") -> Target:
    """A path, or the location of a URL, that a user gave for ``name``; raises as :func:`parse`."""
    if isinstance(text, Location):
        return text
    # A mirror in a folder has the names of one in a store.
    is_mirror = any(os.path.isdir(os.path.join(text, inner)) for inner in ("terms", "checkpoints/terms"))
    return parse(text, name) if is_url(text) or is_mirror else Path(text)


def parse(text: str | os.PathLike[str], name: str) -> Location:
    """The location of a URL, or of a folder, that a user gave for ``name``.

    Raises:
        ConfigError: the scheme is not known, the bucket is missing, or the URL has a query or credentials.
    """
    text = os.fspath(text)
    match = _URL.match(text)
    if match is None:
        return Location("file", "", os.path.abspath(text))
    shown = f"{name} {quote_untrusted(text)}"
    scheme = match[1].lower()
    scheme = _SYNONYMS.get(scheme, scheme)
    if scheme == "hf":
        raise ConfigError(f"{shown}: a model or dataset of the hub is named OWNER/NAME, without hf://")
    if scheme not in STORES:
        raise ConfigError(f"{shown}: a URL begins with {', '.join(f'{each}://' for each in STORES)}")
    bucket, _, key = text[match.end() :].partition("/")
    if match[2] != "//" or not bucket:
        raise ConfigError(f"{shown}: give {scheme}://{STORES[scheme].upper()}/NAME")
    if "@" in bucket or not _BUCKET.fullmatch(bucket):
        advice = "credentials and endpoint come from the environment" if "@" in bucket else "check its name"
        raise ConfigError(f"{shown}: no {STORES[scheme]} is named {quote_untrusted(bucket)}; {advice}")
    parts = [part for part in key.split("/") if part]
    # Some stores take a backslash for a slash, and list nothing below such a name.
    if {*"?#\\"} & {*key} or {".", ".."} & {*parts} or not key.isprintable():
        text = "give a plain name, without ?, #, \\, . and .. as parts, or invisible letters"
        raise ConfigError(f"{shown}: {text}")
    return Location(scheme, bucket, "/".join(parts))
