"""Hostile checkpoints in the older formats: folders with numpy arrays, and single tensor files.

Each family changes a valid checkpoint of step 1. Then the checksums of a folder are corrected, or left wrong.
Every answer must satisfy what ``readers`` requires of our own files. In addition, a folder with a file that
does not match its checksum is never accepted, and no pickle in place of an array is loaded.
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

from campaigns.campaign import CounterExample, require
from campaigns.fuzz import corruptions, families, readers
from distrust.checkpoint import catalog
from distrust.errors import CheckpointError

Make = Callable[[Path, Random], Any]  # changes a folder, or writes a file
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
_BOMB_BYTES = 128 << 20  # twice what a worker may take
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
    """A valid checkpoint of ours at step 0, and a hostile one at step 1 in an older format."""

    def __init__(self, path: Path, valid: bytes) -> None:
        super().__init__(path, valid, [])
        self.canary = path.parent / "unpickled"  # only a pickle that is loaded creates it

    def try_out(self, make: Make, rng: Random, answers: readers.Answers, *, lies: bool) -> None:
        """Make a hostile checkpoint, and read it by every method; ``lies`` leaves wrong checksums."""
        for path in self.path.glob("checkpoint-1*"):
            corruptions.clear(path)
        is_folder = make in FOLDERS.values()
        self.hostile = self.path / ("checkpoint-1" if is_folder else "checkpoint-1.safetensors")
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
        require(not self.canary.exists(), "a pickle was loaded")

    def uses(self) -> dict[str, Callable[[], Any]]:
        """Every way to read it, except comparing headers, which needs digests."""
        return {name: use for name, use in super().uses().items() if "diff" not in name}


_MODEL = {"model.a.lora_a": np.arange(12, dtype=np.float32).reshape(6, 2), "b": np.ones(3, np.float16)}


def _write_metadata(path: Path, fields: Any) -> None:
    (path / "metadata.json").write_text(json.dumps(fields))


def write_folder(
    path: Path, fields: Any = FIELDS, model: Arrays = _MODEL, moments: Arrays | None = None
) -> None:
    """Write a folder; moments are named m.x and v.x, and are by default copies of the weights."""
    path.mkdir()
    copies = {f"{letter}.{name}": array for letter in _MOMENTS for name, array in model.items()}
    _write_metadata(path, fields)
    for file, arrays in zip(_ARRAY_FILES, (model, copies if moments is None else moments), strict=True):
        # Not np.savez: a hostile name may be one of its own arguments.
        (path / file).write_bytes(pack_zip([(f"{name}.npy", _npy(array)) for name, array in arrays.items()]))
    sign(path)


def tensor_file(form: str, fields: Any, model: Arrays, moments: Arrays, config: Any = None) -> bytes:
    """A tensor file; ``config`` replaces the JSON of the optimizer, moments included."""
    if type(fields) is dict:
        fields = {name: value for name, value in fields.items() if name != "optimizer_scalars"}
    rows = {name: row(array) for name, array in model.items()}
    if config is None:
        config = optimizer_config(fields.get("step") if type(fields) is dict else 1, model)
        for name, array in moments.items() if form == "previous" else ():
            field = config.setdefault(_MOMENTS[name[0]], {})
            field[name[2:]] = [array.astype(float).ravel().tolist(), [*array.shape]]
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
    for file in (path / name for name in _MEMBERS):
        content[file.name] = file.read_bytes() if _is_plain(file) else os.path.lexists(file)
    if isinstance(content["checksum.txt"], bytes):
        content["checksum.txt"] = content["checksum.txt"].lower().split()
    return content


def _any_member(change: corruptions.Corruption) -> Make:
    return lambda path, rng: change(path / rng.choice(_MEMBERS), rng)


def _any_arrays(content: Callable[[Random], bytes]) -> Make:
    return lambda path, rng: (path / rng.choice(_ARRAY_FILES)).write_bytes(content(rng))


def _hostile_fields(rng: Random) -> Any:
    if rng.random() < 0.1:
        return families.any_value(rng)
    fields: dict[str, Any] = json.loads(json.dumps(FIELDS))
    for _ in range(rng.choice((1, 2))):
        fields[rng.choice([*fields, *families.HOSTILE_TEXTS])] = families.any_value(rng)
    return fields


def _change_checksums(path: Path, rng: Random) -> None:
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


def _write_pickle(path: Path, rng: Random) -> None:
    evil = corruptions.Calls(Path.touch, path.parent.parent / "unpickled")
    as_array = _npy(np.array([evil], object), allow_pickle=True)
    raw = rng.choice((
        pack_zip([("w.npy", as_array)]), pack_zip([("w.npy", pickle.dumps(evil))]), pickle.dumps(evil),
        as_array,
    ))  # fmt: skip
    (path / rng.choice(_ARRAY_FILES)).write_bytes(raw)


@functools.cache
def _compressed_zeros() -> tuple[bytes, int]:
    """A zip of zeros, and the length of each member. It takes a second."""
    zeros = _npy(np.zeros(_BOMB_BYTES // _BOMB_MEMBERS, np.uint8))
    return pack_zip([(f"{at}.npy", zeros) for at in range(_BOMB_MEMBERS)], zipfile.ZIP_DEFLATED), len(zeros)


def _bomb(rng: Random) -> bytes:
    raw, length = _compressed_zeros()
    claimed = rng.choice((length, 4096))  # the true length, or a small one
    return raw.replace(length.to_bytes(4, "little"), claimed.to_bytes(4, "little"))


def _replace_files(path: Path, rng: Random) -> None:
    """Valid files, but not those that were saved."""
    if rng.random() < 0.5:
        _write_metadata(path, {**FIELDS, "loss_history": [rng.random()]})
    else:
        np.savez(path / "model.npz", w=np.full(3, rng.random()))


def _npy_header(rng: Random) -> bytes:
    text = rng.choice(_NPY_HEADERS).encode()
    length = rng.choice((len(text),) * 4 + (0, 65535))
    version = rng.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\t\0"))
    width = 2 if version == b"\1\0" else 4
    content = b"\x93NUMPY" + version + length.to_bytes(width, "little") + text + bytes(16)
    return pack_zip([("w.npy", content)])


def _zip(rng: Random) -> bytes:
    plain = _npy(np.zeros(4, np.float32))
    names = rng.choices((*_NAMES, "w.npy", "m.w.npy"), k=rng.choice((1, 2, 3)))
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    raw = bytearray(pack_zip([(name, plain) for name in names], method))
    offset = raw.index(b"PK\1\2") + rng.choice((8, 10, 12, 16, 20, 24, 28, 30, 42))
    if rng.random() < 0.5:
        raw[offset : offset + 2] = rng.choice((b"\1\0", b"\xff\xff", b"\0\0"))
    return bytes(raw)


FOLDERS: dict[str, Make] = {
    **{f"older: {name}": _any_member(change) for name, change in corruptions.BY_NAME.items()},
    "older: another's files": _replace_files,
    "older: metadata": lambda path, rng: (path / "metadata.json").write_text(
        json.dumps(_hostile_fields(rng))
    ),
    "older: checksums": _change_checksums,
    "older: pickles": _write_pickle,
    "older: bombs": _any_arrays(_bomb),
    "older: headers of arrays": _any_arrays(_npy_header),
    "older: members of a zip": _any_arrays(_zip),
}

_WEIGHTS = {"w": np.zeros((2, 2), np.float32)}
_SQUARES = {f"{letter}.w": np.full((2, 2), 0.5, np.float32) for letter in _MOMENTS}


def _write_noise(path: Path, rng: Random) -> None:
    raw = bytearray(_tensor_file(rng))
    for _ in range(rng.choice((1, 1, 4))):
        offset = rng.randrange(len(raw))
        end = offset + rng.choice((0, 1, 4))
        raw[offset:end] = rng.choice((b"", rng.randbytes(3), b'"', b"{", b"9" * 30))
    path.write_bytes(raw[: rng.choice((len(raw), len(raw), rng.randrange(len(raw) + 1)))])


def _replace_optimizer(path: Path, rng: Random) -> None:
    """Anything in one field of the optimizer's JSON, or instead of all of it."""
    form, pair = rng.choice(FORMS), [[0.5] * 4, [2, 2]]
    config: Any = optimizer_config(1, ["w"])
    if form == "previous":
        config |= {"exp_avg": {"w": pair}, "exp_avg_sq": {"w": [*pair]}}
    for _ in range(rng.choice((1, 1, 2))):
        families.replace_one(config, rng, families.any_value)
    config = rng.choice((config,) * 9 + (families.any_value(rng),))
    path.write_bytes(tensor_file(form, FIELDS, _WEIGHTS, _SQUARES, config))


def _tensor_file(rng: Random, fields: Any = FIELDS) -> bytes:
    return tensor_file(rng.choice(FORMS), fields, _WEIGHTS, _SQUARES)


FAMILIES: dict[str, Make] = {
    **FOLDERS,
    "older: noise in a file": _write_noise,
    "older: fields in a file": lambda path, rng: path.write_bytes(_tensor_file(rng, _hostile_fields(rng))),
    "older: moments in a file": _replace_optimizer,
}
