"""Hostile checkpoints in the older formats: folders with numpy arrays, and single tensor files.

Each family changes a valid checkpoint of step 1. Then the checksums of a folder are corrected, or left wrong.
Every answer must satisfy what ``readers`` requires of our own files, and in addition:

- a folder with a file that does not match its checksum is never accepted;
- nothing is unpickled: a pickle in place of an array would write a file, and none appears.
"""

from __future__ import annotations

import contextlib
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
from distrust.checkpoint import catalog
from distrust.errors import CheckpointError

Make = Callable[[Path, Random], None]
Arrays = Mapping[str, Any]

#: The metadata of a folder; a tensor file has the same without ``optimizer_scalars``.
FIELDS = {
    "step": 1,
    "timestamp": 1764000010.0,
    "loss_history": [2.5, 2.25],
    "random_state": {"seed": 7, "numpy": [1, 2, 3]},
    "metadata": {"best_loss": 1.25, "note": "ü"},
    "optimizer_scalars": {"step": 1, "learning_rate": 2e-4},
    "config": {"model": {"lora_rank": 8}},
}
#: The two forms of the optimizer in a tensor file.
FORMS = ("newest", "previous")
_MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
_MEMBERS = ("metadata.json", "model.npz", "optimizer.npz", "checksum.txt")
_ARRAY_FILES = ("model.npz", "optimizer.npz")
_SPARSE_BYTES = 1 << 30
_BOMB_BYTES = 256 << 20
_BOMB_MEMBERS = 64
_NPY_HEADERS = (
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (9" + "9" * 400 + ",), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "0," * 100 + "), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1L,), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
    "{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<U9', 'fortran_order': True, 'shape': (1,), }",
    "{'descr': 'bfloat16', 'fortran_order': False, 'shape': (1,), }",
    "__import__('os')._exit(3)", "(" * 2000, "-" * 2000 + "1", "[" * 9000, "'\\d'", "\0", "{[]: 1}",
)  # fmt: skip
_NAMES = ("../x.npy", "/etc/x.npy", "a\\x.npy", "a/b.npy", "", ".npy", "m.npy", "m..npy", "x", "\x1b[31m.npy")


class Directory(readers.Directory):
    """A valid checkpoint of ours at step 0, and a hostile one at step 1 in an older format.

    Args:
        path: of the directory, preferably in memory.
        good: the bytes of a valid checkpoint of step 0.
    """

    def __init__(self, path: Path, good: bytes) -> None:
        super().__init__(path, good, [])
        self.canary = path.parent / "unpickled"

    def try_out(self, make: Make, rng: Random, answers: readers.Answers, *, lies: bool) -> None:
        """Make a hostile checkpoint, and read it in every way.

        Args:
            make: the family.
            rng: every random choice.
            answers: counts the answers.
            lies: leave the checksums of a folder wrong.

        Raises:
            CounterExample: if a promise was broken.
        """
        for path in self.path.glob("checkpoint-1*"):
            corruptions.clear(path)
        is_folder = make in FOLDERS.values()
        self.hostile = self.path / ("checkpoint-1" if is_folder else "checkpoint-1.safetensors")
        original = None
        if is_folder:
            write_folder(self.hostile)
            original = _signed_content(self.hostile)
        make(self.hostile, rng)
        is_changed = is_folder and _signed_content(self.hostile) != original
        if is_folder and not lies:
            sign(self.hostile)
        files = [*self.hostile.iterdir()] if is_folder else [self.hostile]
        self.read_all(sum(file.lstat().st_size for file in files), answers)
        if lies and is_changed:
            with contextlib.suppress(CheckpointError):
                catalog.verify(self.hostile)
                raise CounterExample("a file does not match its checksum, and was accepted")
        if self.canary.exists():
            raise CounterExample("a pickle was loaded")

    def uses(self) -> dict[str, Callable[[], Any]]:
        """Every way to read it, except comparing headers, which needs digests."""
        return {name: use for name, use in super().uses().items() if "diff" not in name}


_MODEL = {"model.a.lora_a": np.arange(12, dtype=np.float32).reshape(6, 2), "b": np.ones(3, np.float16)}


def write_folder(
    path: Path, fields: Any = FIELDS, model: Arrays = _MODEL, moments: Arrays | None = None
) -> None:
    """Write a folder; moments are named m.x and v.x, and are by default copies of the weights."""
    path.mkdir()
    if moments is None:
        moments = {f"{letter}.{name}": array for letter in _MOMENTS for name, array in model.items()}
    (path / "metadata.json").write_text(json.dumps(fields))
    for file, arrays in zip(_ARRAY_FILES, (model, moments), strict=True):
        # Not np.savez: a hostile name may be one of its own arguments.
        (path / file).write_bytes(pack_zip([(f"{name}.npy", _npy(array)) for name, array in arrays.items()]))
    sign(path)


def tensor_file(form: str, fields: Any, model: Arrays, moments: Arrays, config: Any = None) -> bytes:
    """A tensor file; ``config`` replaces the JSON of the optimizer, moments included."""
    step: Any = 1
    if type(fields) is dict:
        fields = {name: value for name, value in fields.items() if name != "optimizer_scalars"}
        step = fields.get("step")
    rows = {name: row(array) for name, array in model.items()}
    if config is None:
        config = optimizer_config(step, model)
        if form == "previous":
            config |= {field: {} for field in _MOMENTS.values()}
            for name, array in moments.items():
                config[_MOMENTS[name[0]]][name[2:]] = [array.astype(float).ravel().tolist(), [*array.shape]]
    if form == "newest":
        rows |= {f"optimizer.{_MOMENTS[name[0]]}.{name[2:]}": row(array) for name, array in moments.items()}
    optimizer = "_optimizer_config" if form == "newest" else "_optimizer"
    for name, value in (("_metadata", fields), (optimizer, config)):
        text = json.dumps(value).encode()
        rows[name] = ("U8", [len(text)], text)
    return corruptions.pack_safetensors(rows)


def optimizer_config(step: Any, names: Any) -> dict[str, Any]:
    """The JSON of an optimizer with one parameter group."""
    group = {"params": [*names], "lr": 2e-4, "betas": [0.9, 0.999], "weight_decay": 0.0}
    return {"param_groups": [group], "step": step}


def row(array: Any) -> tuple[str, list[int], bytes]:
    """A tensor as :func:`corruptions.pack_safetensors` takes it."""
    dtypes = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}
    return dtypes[str(array.dtype)], [*array.shape], array.tobytes()


def sign(path: Path) -> None:
    """Write the right checksums of the files that exist."""
    checksums = path / "checksum.txt"
    if not path.is_dir() or (os.path.lexists(checksums) and not _is_plain(checksums)):
        return  # a family put something else in its place
    files = [file for file in sorted(path.iterdir()) if _is_plain(file) and file != checksums]
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    checksums.write_text("".join(lines), "utf-8", "surrogateescape")


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size < _SPARSE_BYTES


def _signed_content(path: Path) -> dict[str, Any]:
    """What the checksums cover; the case of hexadecimal digits and spaces in checksum.txt do not matter."""
    content: dict[str, Any] = {}
    for name in _MEMBERS:
        file = path / name
        content[name] = file.read_bytes() if _is_plain(file) else os.path.lexists(file)
    if isinstance(content["checksum.txt"], bytes):
        content["checksum.txt"] = content["checksum.txt"].lower().split()
    return content


def _any_member(change: corruptions.Corruption) -> Make:
    return lambda path, rng: change(path / rng.choice(_MEMBERS), rng)


def _metadata(path: Path, rng: Random) -> None:
    (path / "metadata.json").write_text(json.dumps(_hostile_fields(rng)))


def _hostile_fields(rng: Random) -> Any:
    if rng.random() < 0.1:
        return families.any_value(rng)
    fields: dict[str, Any] = json.loads(json.dumps(FIELDS))
    for _ in range(rng.choice((1, 2))):
        fields[rng.choice([*fields, *families.HOSTILE_TEXTS])] = families.any_value(rng)
    return fields


def _checksums(path: Path, rng: Random) -> None:
    file = path / "checksum.txt"
    lines = file.read_text().splitlines()
    index = rng.randrange(len(lines))
    digest, _, name = lines[index].partition("  ")
    lines[index] = rng.choice((
        f"{'0' * 64}  {name}", f"{digest}  ../{name}", f"{digest}  /etc/passwd", f"{digest} {name}", digest,
        f"{digest}  {name}\n{digest}  {name}", f"{digest}  \x1b[2J{name}", f"{digest[:-1]}  {name}", "",
        name * 5000,
    ))  # fmt: skip
    file.write_text("\n".join(lines))


def pack_zip(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of members, by name and content."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that occurs twice
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return buffer.getvalue()


def _npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def _pickled(path: Path, rng: Random) -> None:
    evil = corruptions.WritesFile(path.parent.parent / "unpickled")
    as_array = _npy(np.array([evil], object), allow_pickle=True)
    raw = rng.choice((
        pack_zip([("w.npy", as_array)]), pack_zip([("w.npy", pickle.dumps(evil))]), pickle.dumps(evil),
        as_array,
    ))  # fmt: skip
    (path / rng.choice(_ARRAY_FILES)).write_bytes(raw)


@functools.cache
def _compressed_zeros() -> tuple[bytes, int]:
    """A zip of zeros, and the length of each member."""
    zeros = _npy(np.zeros(_BOMB_BYTES // _BOMB_MEMBERS, np.uint8))
    return pack_zip([(f"{at}.npy", zeros) for at in range(_BOMB_MEMBERS)], zipfile.ZIP_DEFLATED), len(zeros)


def _bomb(path: Path, rng: Random) -> None:
    raw, length = _compressed_zeros()
    claimed = rng.choice((length, 4096))  # the true length, or a small one
    raw = raw.replace(length.to_bytes(4, "little"), claimed.to_bytes(4, "little"))
    (path / rng.choice(_ARRAY_FILES)).write_bytes(raw)


def _replaced(path: Path, rng: Random) -> None:
    """Valid files, but not those that were saved."""
    if rng.random() < 0.5:
        (path / "metadata.json").write_text(json.dumps({**FIELDS, "loss_history": [rng.random()]}))
    else:
        np.savez(path / "model.npz", w=np.full(3, rng.random()))


def _npy_headers(path: Path, rng: Random) -> None:
    text = rng.choice(_NPY_HEADERS).encode()
    length = rng.choice((len(text),) * 4 + (0, 65535))
    version = rng.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\t\0"))
    width = 2 if version == b"\1\0" else 4
    content = b"\x93NUMPY" + version + length.to_bytes(width, "little") + text + bytes(16)
    (path / rng.choice(_ARRAY_FILES)).write_bytes(pack_zip([("w.npy", content)]))


def _members(path: Path, rng: Random) -> None:
    plain = _npy(np.zeros(4, np.float32))
    names = rng.choices((*_NAMES, "w.npy", "m.w.npy"), k=rng.choice((1, 2, 3)))
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    raw = bytearray(pack_zip([(name, plain) for name in names], method))
    offset = raw.index(b"PK\1\2") + rng.choice((8, 10, 12, 16, 20, 24, 28, 30, 42))
    if rng.random() < 0.5:
        raw[offset : offset + 2] = rng.choice((b"\1\0", b"\xff\xff", b"\0\0"))
    (path / rng.choice(_ARRAY_FILES)).write_bytes(raw)


FOLDERS: dict[str, Make] = {
    "older: bits": _any_member(corruptions.flip_bits),
    "older: cut": _any_member(corruptions.cut),
    "older: spliced": _any_member(corruptions.splice),
    "older: another's files": _replaced,
    "older: missing files": _any_member(corruptions.remove),
    "older: metadata": _metadata,
    "older: checksums": _checksums,
    "older: pickles": _pickled,
    "older: bombs": _bomb,
    "older: headers of arrays": _npy_headers,
    "older: members of a zip": _members,
    "older: no files": _any_member(corruptions.replace_by_non_file),
}

_WEIGHTS = {"w": np.zeros((2, 2), np.float32)}
_SQUARES = {f"{letter}.w": np.full((2, 2), 0.5, np.float32) for letter in _MOMENTS}


def _noise(path: Path, rng: Random) -> None:
    raw = bytearray(tensor_file(rng.choice(FORMS), FIELDS, _WEIGHTS, _SQUARES))
    for _ in range(rng.choice((1, 1, 4))):
        offset = rng.randrange(len(raw))
        raw[offset : offset + rng.choice((0, 1, 4))] = rng.choice(
            (b"", rng.randbytes(3), b'"', b"{", b"9" * 30)
        )
    path.write_bytes(raw[: rng.choice((len(raw), len(raw), rng.randrange(len(raw) + 1)))])


def _file_fields(path: Path, rng: Random) -> None:
    path.write_bytes(tensor_file(rng.choice(FORMS), _hostile_fields(rng), _WEIGHTS, _SQUARES))


def _file_optimizer(path: Path, rng: Random) -> None:
    """Anything in one field of the optimizer's JSON, or instead of all of it."""
    form, pair = rng.choice(FORMS), [[0.5] * 4, [2, 2]]
    config: Any = optimizer_config(1, ["w"])
    if form == "previous":
        config |= {"exp_avg": {"w": pair}, "exp_avg_sq": {"w": [*pair]}}
    for _ in range(rng.choice((1, 1, 2))):
        families.replace_one(config, rng, families.any_value)
    config = rng.choice((config,) * 9 + (families.any_value(rng),))
    path.write_bytes(tensor_file(form, FIELDS, _WEIGHTS, _SQUARES, config))


FILES: dict[str, Make] = {
    "older: noise in a file": _noise,
    "older: fields in a file": _file_fields,
    "older: moments in a file": _file_optimizer,
}

FAMILIES: dict[str, Make] = {**FOLDERS, **FILES}
