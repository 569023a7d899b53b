"""Hostile checkpoints in the older formats: folders with arrays of numpy, and JSON in tensors of bytes.

Each family makes a good checkpoint of step 1 and changes it into something that a reader could fall for. Its
checksums are then made right again, or left as lies. What is promised of
every answer is what is promised of our own files (``readers``), and besides:

- where a file is not what its checksum says, nobody takes the checkpoint for whole;
- nothing is ever unpickled: a pickle in the place of an array would write a file, and none is there.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from campaigns.campaign import CounterExample
from campaigns.fuzz import corruptions, families, readers

Make = Callable[[Path, Random], None]
Arrays = Mapping[str, Any]

_FIELDS = {
    "step": 1,
    "timestamp": 1764000010.0,
    "loss_history": [2.5, 2.25],
    "random_state": {"seed": 7, "numpy": [1, 2, 3]},
    "metadata": {"best_loss": 1.25, "note": "ü"},
    "optimizer_scalars": {"step": 1, "learning_rate": 2e-4},
    "config": {"model": {"lora_rank": 8}},
}
_MEMBERS = ("metadata.json", "model.npz", "optimizer.npz", "checksum.txt")
_ARRAY_FILES = ("model.npz", "optimizer.npz")
_WITHOUT_END_BYTES = 1 << 30
_BOMB_BYTES = 256 << 20
_BOMB_MEMBERS = 64
_HEADERS = (
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (9" + "9" * 400 + ",), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "0," * 100 + "), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<U9', 'fortran_order': True, 'shape': (1,), }",
    "__import__('os')._exit(3)",
    "(" * 9000,
)
_NAMES = ("../x.npy", "/etc/x.npy", "a\\x.npy", "a/b.npy", "", ".npy", "m.npy", "m..npy", "x", "\x1b[31m.npy")


class Directory(readers.Directory):
    """A good checkpoint of ours of step 0, and a hostile one of step 1 in an older format.

    Args:
        path: of the directory, best in memory.
        good: the bytes of a good checkpoint of step 0.
    """

    def __init__(self, path: Path, good: bytes) -> None:
        super().__init__(path, good, [])
        self.canary = path.parent / "unpickled"

    def try_out(self, make: Make, rng: Random, answers: readers.Answers, *, lies: bool) -> None:
        """Make a hostile checkpoint, and ask everything of it.

        Raises:
            CounterExample: if a promise was not kept.
        """
        for folder in self.path.glob("checkpoint-1*"):
            corruptions.clear(folder)
        as_folder = make in FOLDERS.values()
        self.hostile = self.path / ("checkpoint-1" if as_folder else "checkpoint-1.safetensors")
        before = None
        if as_folder:
            write_folder(self.hostile)
            before = _contents(self.hostile)
        make(self.hostile, rng)
        changed = as_folder and _contents(self.hostile) != before
        if as_folder and not lies:
            sign(self.hostile)
        self.read_all(_bytes(self.hostile), answers)
        if lies and changed and self.is_whole():
            raise CounterExample("a file is not what its checksum says, and it was taken for whole")
        if self.canary.exists():
            raise CounterExample("a pickle was loaded")

    def is_whole(self) -> bool:
        """Whether the hostile one is taken for whole."""
        from distrust.checkpoint import catalog
        from distrust.errors import CheckpointError

        try:
            catalog.verify(self.hostile)
        except CheckpointError:
            return False
        return True

    def uses(self) -> dict[str, Callable[[], Any]]:
        """Every way to read it; those that compare by headers have nothing to compare."""
        uses = super().uses()
        return {name: use for name, use in uses.items() if "diff" not in name}


_MODEL = {"model.a.lora_a": np.arange(12, dtype=np.float32).reshape(6, 2), "b": np.ones(3, np.float16)}


def write_folder(
    path: Path, fields: Any = _FIELDS, model: Arrays = _MODEL, moments: Arrays | None = None
) -> None:
    """A good one, if its parts are; moments are named m.x and v.x, and are by default the weights."""
    path.mkdir()
    if moments is None:
        moments = {f"{moment}.{name}": array for moment in "mv" for name, array in model.items()}
    (path / "metadata.json").write_text(json.dumps(fields))
    _save_arrays(path / "model.npz", model)
    _save_arrays(path / "optimizer.npz", moments)
    sign(path)


def _save_arrays(path: Path, arrays: Arrays) -> None:
    # Not savez: a name may be one of its own arguments.
    path.write_bytes(zipped([(f"{name}.npy", _npy(array)) for name, array in arrays.items()]))


def sign(path: Path) -> None:
    """Give the files that are there the checksums that are right."""
    there = path / "checksum.txt"
    if not path.is_dir() or (os.path.lexists(there) and not (there.is_file() and not there.is_symlink())):
        return  # something else stands in its place
    files = [file for file in sorted(path.iterdir()) if _is_plain(file) and file != there]
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    there.write_text("".join(lines), "utf-8", "surrogateescape")


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size < _WITHOUT_END_BYTES


def _contents(path: Path) -> dict[str, Any]:
    """What the checksums are about; how a digest's letters are written, and spaces, say nothing."""
    found: dict[str, Any] = {}
    for name in _MEMBERS:
        file = path / name
        found[name] = file.read_bytes() if _is_plain(file) else os.path.lexists(file)
    if isinstance(found["checksum.txt"], bytes):
        found["checksum.txt"] = found["checksum.txt"].lower().split()
    return found


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else list(path.iterdir()) if path.is_dir() else []
    return sum(file.lstat().st_size for file in files)


def _member(change: corruptions.Corruption) -> Make:
    """Change one of the files."""
    return lambda path, rng: change(path / rng.choice(_MEMBERS), rng)


def _metadata(path: Path, rng: Random) -> None:
    (path / "metadata.json").write_text(json.dumps(_hostile_fields(rng)))


def _hostile_fields(rng: Random) -> Any:
    if rng.random() < 0.1:
        return families.any_value(rng)
    fields: dict[str, Any] = json.loads(json.dumps(_FIELDS))
    for _ in range(rng.choice((1, 2))):
        fields[rng.choice([*fields, *families.HOSTILE_TEXTS])] = families.any_value(rng)
    return fields


def _checksums(path: Path, rng: Random) -> None:
    file = path / "checksum.txt"
    lines = file.read_text().splitlines()
    place = rng.randrange(len(lines))
    digest, _, name = lines[place].partition("  ")
    lines[place] = rng.choice((
        f"{'0' * 64}  {name}", f"{digest}  ../{name}", f"{digest}  /etc/passwd", f"{digest} {name}", digest,
        f"{digest}  {name}\n{digest}  {name}", f"{digest}  \x1b[2J{name}", f"{digest[:-1]}  {name}", "",
        name * 5000,
    ))  # fmt: skip
    file.write_text("\n".join(lines))


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these: names and contents."""
    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that stands twice
        with zipfile.ZipFile(made, "w") as archive:
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return made.getvalue()


def _npy(array: Any, **options: Any) -> bytes:
    made = io.BytesIO()
    np.save(made, array, **options)
    return made.getvalue()


def _pickled(path: Path, rng: Random) -> None:
    canary = path.parent.parent / "unpickled"
    raw = rng.choice((
        zipped([("w.npy", _npy(np.array([corruptions.WritesFile(canary)], object), allow_pickle=True))]),
        zipped([("w.npy", pickle.dumps(corruptions.WritesFile(canary)))]),
        pickle.dumps(corruptions.WritesFile(canary)),
        _npy(np.array([corruptions.WritesFile(canary)], object), allow_pickle=True),
    ))  # fmt: skip
    (path / rng.choice(_ARRAY_FILES)).write_bytes(raw)


@functools.cache
def _packed_zeros() -> tuple[bytes, int]:
    """A zip of zeros, and the length of each of its members."""
    zeros = _npy(np.zeros(_BOMB_BYTES // _BOMB_MEMBERS, np.uint8))
    return zipped([(f"{at}.npy", zeros) for at in range(_BOMB_MEMBERS)], zipfile.ZIP_DEFLATED), len(zeros)


def _bomb(path: Path, rng: Random) -> None:
    raw, length = _packed_zeros()
    if rng.random() < 0.5:  # it says that it is small
        raw = raw.replace(length.to_bytes(4, "little"), (4096).to_bytes(4, "little"))
    (path / rng.choice(_ARRAY_FILES)).write_bytes(raw)


def _others(path: Path, rng: Random) -> None:
    """Files that are well in themselves, and not those that were saved."""
    if rng.random() < 0.5:
        (path / "metadata.json").write_text(json.dumps({**_FIELDS, "loss_history": [rng.random()]}))
    else:
        np.savez(path / "model.npz", w=np.full(3, rng.random()))


def _headers(path: Path, rng: Random) -> None:
    text = rng.choice(_HEADERS).encode()
    length = rng.choice((len(text), 0, 65535))
    version = rng.choice((b"\1\0", b"\3\0", b"\t\0"))
    width = 2 if version == b"\1\0" else 4
    content = b"\x93NUMPY" + version + length.to_bytes(width, "little") + text + bytes(16)
    (path / rng.choice(_ARRAY_FILES)).write_bytes(zipped([("w.npy", content)]))


def _members(path: Path, rng: Random) -> None:
    plain = _npy(np.zeros(4, np.float32))
    names = rng.choices((*_NAMES, "w.npy", "m.w.npy"), k=rng.choice((1, 2, 3)))
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    raw = bytearray(zipped([(name, plain) for name in names], method))
    place = raw.index(b"PK\1\2") + rng.choice((8, 10, 12, 16, 20, 24, 28, 30, 42))
    if rng.random() < 0.5:
        raw[place : place + 2] = rng.choice((b"\1\0", b"\xff\xff", b"\0\0"))
    (path / rng.choice(_ARRAY_FILES)).write_bytes(raw)


FOLDERS: dict[str, Make] = {
    "older: bits": _member(corruptions.flip_bits),
    "older: cut": _member(corruptions.cut),
    "older: spliced": _member(corruptions.splice),
    "older: another's files": _others,
    "older: missing files": _member(corruptions.remove),
    "older: metadata": _metadata,
    "older: checksums": _checksums,
    "older: pickles": _pickled,
    "older: bombs": _bomb,
    "older: headers of arrays": _headers,
    "older: members of a zip": _members,
    "older: no files": _member(corruptions.replace_by_non_file),
}


def _byte_tensors(fields: Any = _FIELDS, optimizer: Any = None) -> bytes:
    array = {"shape": [2, 2], "data": [0.5] * 4}
    optimizer = {"exp_avg": {"w": array}, "exp_avg_sq": {"w": array}} if optimizer is None else optimizer
    texts = {"_metadata": json.dumps(fields).encode(), "_optimizer": json.dumps(optimizer).encode()}
    rows = {name: ("U8", [len(text)], text) for name, text in texts.items()}
    return corruptions.pack_safetensors({"w": ("F32", [2, 2], bytes(16)), **rows})


def _noise(path: Path, rng: Random) -> None:
    raw = bytearray(_byte_tensors())
    for _ in range(rng.choice((1, 1, 4))):
        place = rng.randrange(len(raw))
        raw[place : place + rng.choice((0, 1, 4))] = rng.choice(
            (b"", rng.randbytes(3), b'"', b"{", b"9" * 30)
        )
    path.write_bytes(raw[: rng.choice((len(raw), len(raw), rng.randrange(len(raw) + 1)))])


def _fields(path: Path, rng: Random) -> None:
    path.write_bytes(_byte_tensors(_hostile_fields(rng)))


def _moments(path: Path, rng: Random) -> None:
    array: dict[str, Any] = {"shape": [2, 2], "data": [0.5] * 4}
    array[rng.choice(("shape", "data", "dtype", "values"))] = families.any_value(rng)
    by_moment = {"exp_avg": {"w": array}, "exp_avg_sq": {"w": families.any_value(rng)}}
    spelled = rng.choice((by_moment, {"w": by_moment}, {"state": by_moment}, families.any_value(rng)))
    if type(spelled) is dict and rng.random() < 0.3:
        spelled[rng.choice(("step", "shapes", "m", "state", "exp_avg"))] = families.any_value(rng)
    path.write_bytes(_byte_tensors(optimizer=spelled))


FILES: dict[str, Make] = {
    "older: noise in a file": _noise,
    "older: fields in a file": _fields,
    "older: moments in a file": _moments,
}

FAMILIES: dict[str, Make] = {**FOLDERS, **FILES}
