"""Forged checkpoints, with correct digests.

A reader stops at the first wrong digest, so the checks behind the digests are reached only by signed files.
The signer follows the description of the format (:mod:`distrust.checkpoint.format`) and shares no line with
the writer, so that neither can hide the other's mistake.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint.format import ITEM_SIZES

METADATA = "__metadata__"  # the header's entry that is no tensor
PAGE = 4096  # the header is padded to it
NO_DIGEST = "0" * 64  # in place of the digest while it is computed
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')  # the header's own


class Tensor(NamedTuple):
    """A tensor to forge; its length follows from dtype and shape, its data are zeros."""

    name: str
    dtype: str = "U8"
    shape: tuple[int, ...] = (0,)

    @property
    def nbytes(self) -> int:
        return ITEM_SIZES[self.dtype] * prod(self.shape)


def canonical(value: Any) -> str:
    """JSON as a writer makes it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def encode_json(value: Any) -> str:
    """Canonical JSON, or escaped where that cannot be encoded."""
    text = canonical(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    return text


def frame(body: bytes) -> bytes:
    """A header with its length before it and its padding behind."""
    length = -(-(8 + len(body)) // PAGE) * PAGE - 8
    return length.to_bytes(8, "little") + body.ljust(length)


def sign(header: bytes) -> bytes:
    """A framed header with its correct digest, if it has a field for one."""
    match = _DIGEST.search(header)
    if match is None:
        return header
    begin, end = match.span(1)
    digest = blake3(header[:begin] + NO_DIGEST.encode() + header[end:]).hexdigest().encode()
    return header[:begin] + digest + header[end:]


def state_digest(fields: dict[str, Any]) -> str:
    """The digest of the state that a header describes; raises many kinds of errors if it makes no sense."""
    metadata = fields[METADATA]
    names = sorted(
        (name for name in fields if name != METADATA), key=lambda name: fields[name]["data_offsets"]
    )
    tensors = [
        [name, fields[name]["dtype"], fields[name]["shape"], metadata["digests"][64 * at : 64 * at + 64]]
        for at, name in enumerate(names)
    ]
    return _state_digest(metadata["state"], tensors)


def _state_digest(state: str, tensors: list[Any]) -> str:
    return blake3(encode_json({"state": state, "tensors": sorted(tensors)}).encode()).hexdigest()


class Specimen:
    """A real checkpoint, parsed from the bytes of its file."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.end = 8 + int.from_bytes(raw[:8], "little")
        self.body = raw[8 : self.end].rstrip(b" ")
        self.data = raw[self.end :]

    @classmethod
    def of(cls, path: Path) -> Specimen:
        return cls(path.read_bytes())

    @property
    def fields(self) -> Any:
        """A copy of its header."""
        return json.loads(self.body)

    def draft(self) -> Draft:
        return Draft(self.fields, self.data)


class Draft:
    """A checkpoint that is being changed."""

    def __init__(self, fields: dict[str, Any], data: bytes) -> None:
        self.fields = fields  # of the header, without state and run
        self.data = data  # the bytes behind the header
        self.state: Any = json.loads(fields[METADATA]["state"])  # parsed; a text is written unchanged
        self.run: Any = json.loads(fields[METADATA]["run"])  # the same

    def body(self, *, sign_state: bool = True) -> bytes:
        """The header's JSON, before its own digest; with the correct digest of the state, if possible."""
        metadata = self.fields.get(METADATA)
        if type(metadata) is dict:
            for name, value in (("state", self.state), ("run", self.run)):
                if name in metadata and type(metadata[name]) is str:
                    metadata[name] = value if type(value) is str else encode_json(value)
            if sign_state:
                _sign_state(self.fields)
        return encode_json(self.fields).encode()

    def file(self, *, sign_state: bool = True) -> bytes:
        """The complete file, its header signed."""
        return sign(frame(self.body(sign_state=sign_state))) + self.data


def _sign_state(fields: dict[str, Any]) -> None:
    try:
        fields[METADATA]["state_digest"] = state_digest(fields)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return  # it makes no sense, so it has no digest


def build(
    tensors: Iterable[Tensor] = (),
    *,
    sections: dict[str, Any] | None = None,
    run: Any = None,
    names: Any = None,
) -> bytes:
    """The file that a writer would make of these tensors, laid out as a writer does, and this state.

    ``sections`` are nodes of the skeleton instead of empty sections; a text as ``run`` is written unchanged;
    ``names`` is the node of ``model``, by default a list of every tensor.
    """
    in_order = sorted(tensors, key=lambda tensor: (-ITEM_SIZES[tensor.dtype], tensor.name))
    zeros = {nbytes: blake3(bytes(nbytes)).hexdigest() for nbytes in {tensor.nbytes for tensor in in_order}}
    model = names or {"d": {"s": {"l": [{"a": tensor.name} for tensor in in_order]}}}
    empty = ("optimizer", "rng", "history", "config", "metadata")
    nodes = {"model": model, **{name: {"d": {}} for name in empty}, **(sections or {})}
    run = {"created": "", "extra": {}, "host": "", "metrics": {}} if run is None else run
    state = encode_json({"sections": nodes, "step": 1})
    described = [[each.name, each.dtype, list(each.shape), zeros[each.nbytes]] for each in in_order]
    metadata = {
        "digest": NO_DIGEST,
        "digests": "".join(zeros[tensor.nbytes] for tensor in in_order),
        "format": "distrust",
        "kind": "periodic",
        "run": run if type(run) is str else encode_json(run),
        "state": state,
        "state_digest": _state_digest(state, described),
        "step": "1",
        "version": "1",
    }
    fields: dict[str, Any] = {METADATA: metadata}
    end = 0
    for tensor in in_order:
        begin, end = end, end + tensor.nbytes
        offsets = [begin, end]
        fields[tensor.name] = {"data_offsets": offsets, "dtype": tensor.dtype, "shape": list(tensor.shape)}
    return sign(frame(encode_json(fields).encode())) + bytes(end)


def make_specimens(directory: Path) -> tuple[bytes, list[Specimen]]:
    """The bytes of a valid checkpoint of step 0, and specimens of step 1, written in an empty directory."""
    with CheckpointManager(directory, keep_last=None) as manager:
        valid = manager.save(Checkpoint(step=0, model={"a": np.zeros(4, np.float32)})).read_bytes()
        return valid, [Specimen.of(manager.save(checkpoint)) for checkpoint in _checkpoints()]


def _checkpoints() -> list[Checkpoint]:
    model = {"a": np.arange(4, dtype=np.float32), "b": np.arange(3, dtype=np.uint8)}
    return [
        Checkpoint(step=1, model=model, optimizer={"n": [1, (2.5, None)]}, metadata={"m": "x"}),
        Checkpoint(step=1),
        Checkpoint(
            step=1,
            model={"": np.float64(1.5), "a.b": np.zeros((2, 0, 3), np.int16), "ü": np.ones(5, np.complex64)},
            optimizer={
                "state": {0: {"step": np.float32(3), "lr": 0.1}, 1: {}},
                "groups": [{"b": (0.9, 0.99)}],
            },
            rng={"torch": np.arange(16, dtype=np.uint8), "python": (3, [1, 2], None)},
            history={"loss": np.linspace(1, 0, 7)},
            config={"rank": 8, "deep": {True: [1.0, "x", {None: -0.0}]}},
            metadata={"best_loss": float("inf"), "note": 'say "ü\n"'},
            metrics={"eval_loss": 0.25},
            run={"paths": ["a", "b"], "every": 10},
        ),
    ]
