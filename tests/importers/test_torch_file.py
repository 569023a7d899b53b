"""Files of torch.save: what is loaded is what was examined, and no small file makes large objects."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrust.errors import CorruptCheckpoint
from distrust.importers.torch_file import read_torch

TEBIBYTE = 1 << 40
STATE = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0).reshape(2, 3).T}},
    "halves": [torch.arange(5, dtype=torch.bfloat16)[1:4], torch.zeros(0), torch.tensor([True])],
    "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1 << 40], "fused": None}],
}
#: Calls bytearray(1 << 40), which torch allows.
BYTES = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + TEBIBYTE.to_bytes(6, "little") + b"\x85R."


#: In place of a pickle's last opcode: empties the tensor that it returns, and sets it to itself, enlarged.
ENLARGE = b"q\xc8)b(h\xc8K\0\x8a\x06" + TEBIBYTE.to_bytes(6, "little") + b"\x85K\1\x85tb."


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def save(path: Path, value: Any = STATE) -> Path:
    torch.save(value, path)
    return path


def entries(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def pack(path: Path, named: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in named:
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def test_it_returns_what_was_saved(tmp_path):
    assert same(read_torch(save(tmp_path / "state.pt")), STATE)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@given(spelling=st.permutations(["data.pkl", "Data.pkl", "DATA.PKL", "data.PKL"]), count=st.integers(1, 4))
def test_a_second_pickle_is_refused_in_any_case(tmp_path_factory, spelling, count):
    """torch finds an entry in any case, and takes the first: it would load one that was not examined."""
    path = tmp_path_factory.mktemp("saved") / "state.pt"
    valid = dict(entries(save(path)))
    valid_pickle = valid.pop("state/data.pkl")
    pickles = [(f"state/{name}", BYTES) for name in spelling[:count]]
    pack(path, [*pickles, *valid.items(), ("state/data.pkl", valid_pickle)])
    with pytest.raises(CorruptCheckpoint, match=r"holds an entry twice"):
        read_torch(path)
    pack(path, [*pickles[:1], *valid.items()])
    with pytest.raises(CorruptCheckpoint, match=r"holds no data\.pkl|it calls __builtin__ bytearray|it uses"):
        read_torch(path)


def test_of_two_directories_in_one_archive_only_the_examined_one_counts(tmp_path):
    """torch follows the offset of the central directory; Python's zipfile takes what is before the end."""
    named = entries(save(tmp_path / "state.pt"))
    plain = pack(tmp_path / "plain.zip", named).read_bytes()
    evil = [(name, BYTES.ljust(len(raw), b".") if name.endswith("data.pkl") else raw) for name, raw in named]
    hostile = pack(tmp_path / "hostile.zip", evil).read_bytes()
    start = hostile.rindex(b"PK\x05\x06")
    end = plain.rindex(b"PK\x05\x06")
    offset = int.from_bytes(hostile[start + 16 : start + 20], "little")
    path = tmp_path / "two.pt"
    # The hostile archive without its end, and after it the plain one, whose end gives the first one's offset.
    path.write_bytes(hostile[:start] + plain[: end + 16] + offset.to_bytes(4, "little") + plain[end + 20 :])
    assert same(read_torch(path), STATE)


def bombs() -> dict[str, Any]:
    copied = [(number, number) for number in range(1000)]
    return {
        "bytes": Call(bytearray, TEBIBYTE),
        "a storage": Call(torch.storage.UntypedStorage, TEBIBYTE),
        "copies of a list": [Call(OrderedDict, copied) for _ in range(1000)],
        "a subclass's state": torch.nn.Linear(2, 2).state_dict(),
    }


@pytest.mark.parametrize("kind", bombs())
def test_pickles_that_make_more_than_they_hold_are_refused(tmp_path, kind):
    with pytest.raises(CorruptCheckpoint, match=r"it calls|it uses") as refused:
        read_torch(save(tmp_path / "state.pt", {"state": bombs()[kind]}))
    assert "\n" not in str(refused.value)


def test_a_tensor_cannot_be_enlarged(tmp_path):
    named = dict(entries(save(tmp_path / "state.pt", torch.zeros(1))))
    named["state/data.pkl"] = named["state/data.pkl"].removesuffix(b".") + ENLARGE
    with pytest.raises(CorruptCheckpoint, match="it uses BUILD"):
        read_torch(pack(tmp_path / "state.pt", list(named.items())))


@given(st.binary(max_size=40), st.integers(0, 1 << 16))
def test_a_damaged_pickle_is_refused_or_makes_plain_values(tmp_path_factory, junk, position):
    path = tmp_path_factory.mktemp("saved") / "state.pt"
    named = dict(entries(save(path)))
    raw = named["state/data.pkl"]
    position %= len(raw)
    named["state/data.pkl"] = raw[:position] + junk + raw[position:]
    pack(path, list(named.items()))
    with contextlib.suppress(CorruptCheckpoint):
        pickle.dump(read_torch(path), io.BytesIO())  # plain values and tensors
