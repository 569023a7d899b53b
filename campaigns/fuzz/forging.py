"""Files that look like checkpoints: made by hand, and with digests that are right.

A reader stops at the first digest that is wrong. What it makes of the rest is seen only by files whose
digests are those of what they say: signed ones. The signer here is written against the description of the
format (:mod:`distrust.checkpoint.format`) and uses no line of the writer, so that neither can hide the
other's mistake.

- :func:`canonical`, :func:`framed`, :func:`signed`, :func:`state_digest`: the parts.
- :class:`Specimen`: a real checkpoint, to be made into bad ones.
- :class:`Draft`: one that is being changed; :meth:`Draft.file` gives its bytes, signed.
- :func:`built`: a file from nothing but tensors, state and run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from distrust.checkpoint.format import ITEM_SIZES

METADATA = "__metadata__"
PAGE = 4096
NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')


class Tensor(NamedTuple):
    """A tensor to forge; its length is what dtype and shape say, its data zeros.

    Attributes:
        name: its label.
        dtype: of the format.
        shape: its dimensions.
    """

    name: str
    dtype: str = "U8"
    shape: tuple[int, ...] = (0,)

    @property
    def nbytes(self) -> int:
        """Its length."""
        items = ITEM_SIZES[self.dtype]
        for dimension in self.shape:
            items *= dimension
        return items


def canonical(value: Any) -> str:
    """JSON as a writer gives it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def encodable(value: Any) -> str:
    """Canonical JSON, or escaped where that has no bytes."""
    text = canonical(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    return text


def framed(body: bytes) -> bytes:
    """A header with its length before it and its padding behind."""
    length = -(-(8 + len(body)) // PAGE) * PAGE - 8
    return length.to_bytes(8, "little") + body.ljust(length)


def signed(header: bytes) -> bytes:
    """A framed header with the right digest in it, if it has a place for one."""
    place = _DIGEST.search(header)
    if place is None:
        return header
    begin, end = place.span(1)
    digest = blake3(header[:begin] + NO_DIGEST.encode() + header[end:]).hexdigest().encode()
    return header[:begin] + digest + header[end:]


def state_digest(fields: dict[str, Any]) -> str:
    """The identity of the state that a header speaks of.

    Raises:
        Exception: of many kinds, where the header makes no sense.
    """
    metadata = fields[METADATA]
    names = sorted(
        (name for name in fields if name != METADATA), key=lambda name: fields[name]["data_offsets"]
    )
    tensors = sorted(
        [name, fields[name]["dtype"], fields[name]["shape"], metadata["digests"][64 * at : 64 * at + 64]]
        for at, name in enumerate(names)
    )
    return blake3(encodable({"state": metadata["state"], "tensors": tensors}).encode()).hexdigest()


class Specimen:
    """A real checkpoint, taken apart.

    Args:
        raw: the bytes of its file.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.end = 8 + int.from_bytes(raw[:8], "little")
        self.body = raw[8 : self.end].rstrip(b" ")
        self.data = raw[self.end :]

    @classmethod
    def of(cls, path: Path) -> Specimen:
        """The checkpoint in a file."""
        return cls(path.read_bytes())

    @property
    def fields(self) -> dict[str, Any]:
        """Its header, to be changed."""
        fields: dict[str, Any] = json.loads(self.body)
        return fields

    def draft(self) -> Draft:
        """A copy, to be changed."""
        return Draft(self.fields, self.data)


class Draft:
    """A checkpoint that is being changed.

    Args:
        fields: of its header, state and run as text.
        data: what stands behind the header.

    Attributes:
        fields: of the header, without state and run.
        state: parsed; or text, which is taken as it is.
        run: the same.
        data: what stands behind the header.
    """

    def __init__(self, fields: dict[str, Any], data: bytes) -> None:
        self.fields = fields
        self.data = data
        self.state: Any = json.loads(fields[METADATA]["state"])
        self.run: Any = json.loads(fields[METADATA]["run"])

    def body(self, *, sign_state: bool = True) -> bytes:
        """The header's JSON; its own digest is still to come.

        Args:
            sign_state: give the state its right digest, where there can be one.
        """
        metadata = self.fields.get(METADATA)
        if type(metadata) is dict:
            for name, value in (("state", self.state), ("run", self.run)):
                if name in metadata and type(metadata[name]) is str:
                    metadata[name] = value if type(value) is str else encodable(value)
            if sign_state:
                _sign_state(self.fields)
        return encodable(self.fields).encode()

    def file(self, *, sign_state: bool = True) -> bytes:
        """The whole file, its header signed."""
        return signed(framed(self.body(sign_state=sign_state))) + self.data


def _sign_state(fields: dict[str, Any]) -> None:
    try:
        fields[METADATA]["state_digest"] = state_digest(fields)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return  # it makes no sense: nobody can say what its digest is


def built(
    tensors: Iterable[Tensor] = (),
    *,
    sections: dict[str, Any] | None = None,
    run: Any = None,
    names: Any = None,
) -> bytes:
    """A file that says what a writer would say of these tensors and this state.

    Args:
        tensors: laid out as a writer does.
        sections: nodes of the skeleton in place of empty sections.
        run: JSON, or text that is taken as it is.
        names: the node of ``model``; by default a list of every tensor.
    """
    in_order = sorted(tensors, key=lambda tensor: (-ITEM_SIZES[tensor.dtype], tensor.name))
    zeros = {nbytes: blake3(bytes(nbytes)).hexdigest() for nbytes in {tensor.nbytes for tensor in in_order}}
    empty: dict[str, Any] = dict.fromkeys(("model", "optimizer", "rng", "history", "config", "metadata"))
    nodes = {name: {"d": {}} for name in empty} | {"model": names or _all_of(in_order)} | (sections or {})
    run = {"created": "", "extra": {}, "host": "", "metrics": {}} if run is None else run
    metadata = {
        "digest": NO_DIGEST,
        "digests": "".join(zeros[tensor.nbytes] for tensor in in_order),
        "format": "distrust",
        "kind": "periodic",
        "run": run if type(run) is str else encodable(run),
        "state": encodable({"sections": nodes, "step": 1}),
        "state_digest": NO_DIGEST,
        "step": "1",
        "version": "1",
    }
    fields: dict[str, Any] = {METADATA: metadata}
    end = 0
    for tensor in in_order:
        begin, end = end, end + tensor.nbytes
        fields[tensor.name] = {
            "data_offsets": [begin, end],
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
        }
    metadata["state_digest"] = blake3(
        encodable(
            {
                "state": metadata["state"],
                "tensors": sorted(
                    [tensor.name, tensor.dtype, list(tensor.shape), zeros[tensor.nbytes]]
                    for tensor in in_order
                ),
            }
        ).encode()
    ).hexdigest()
    return signed(framed(encodable(fields).encode())) + bytes(end)


def _all_of(tensors: Sequence[Tensor]) -> Any:
    return {"d": {"s": {"l": [{"a": tensor.name} for tensor in tensors]}}}
