"""The single-file format: safetensors, with the metadata and the optimizer as JSON in uint8 tensors.

``_metadata`` is the JSON object of :mod:`distrust.importers.imported`. The optimizer is in one of two forms:

- newest: tensors ``optimizer.exp_avg.NAME`` and ``optimizer.exp_avg_sq.NAME``, float32 with the shape of
  ``NAME``, and ``_optimizer_config``, the JSON of its parameter groups;
- previous: ``_optimizer``, JSON of the groups and the moments. See :mod:`distrust.importers.optimizer`.

Every other tensor is a weight. The format has no checksums: only contradictions are detected.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from distrust.checkpoint.files import open_regular, read_into
from distrust.checkpoint.format import ITEM_SIZES, LENGTH_BYTES, METADATA, TensorInfo, is_valid_shape
from distrust.checkpoint.header import header_length
from distrust.checkpoint.memory import available_bytes
from distrust.errors import CheckpointUnreadable, CorruptCheckpoint, quote_untrusted
from distrust.importers.detect import TENSOR_FILE
from distrust.importers.host_arrays import PIECE_BYTES, Depth, HostArray, require_finite_bytes
from distrust.importers.imported import MAX_METADATA_BYTES, Imported, ImportedHeader
from distrust.importers.optimizer import STEP, M, OptimizerConfig, V, parse_moments, validate_optimizer
from distrust.importers.safe_json import parse_object

METADATA_TENSOR, CONFIG_TENSOR, JSON_TENSOR = "_metadata", "_optimizer_config", "_optimizer"
#: Prefixes of the names of moments -> their section in our optimizer.
_PREFIXES = {"optimizer.exp_avg.": M, "optimizer.exp_avg_sq.": V}
#: Enough for a hundred million moments as JSON.
MAX_OPTIMIZER_BYTES = 2 << 30


class TensorFile:
    """An open file whose header and metadata are valid."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._json: dict[str, TensorInfo] = {}
        self._model: dict[str, TensorInfo] = {}
        self._moments: dict[str, dict[str, TensorInfo]] = {M: {}, V: {}}
        for name, info in _read_header(descriptor, size).items():
            self._classify(name, info)
        if CONFIG_TENSOR in self._json and JSON_TENSOR in self._json:
            raise CorruptCheckpoint(f"it has both {CONFIG_TENSOR} and {JSON_TENSOR}")
        if CONFIG_TENSOR not in self._json and any(self._moments.values()):
            raise CorruptCheckpoint(f"it has moments, but no tensor {CONFIG_TENSOR}")
        raw = self._read_json(METADATA_TENSOR, MAX_METADATA_BYTES)
        lacks_arrays = not self._model and self._json.keys() == {METADATA_TENSOR}
        self.header = ImportedHeader(
            raw, METADATA_TENSOR, path, self.open, TENSOR_FILE, file_size=size, lacks_arrays=lacks_arrays
        )
        if self.header.optimizer_scalars:  # two sources of the optimizer's step could disagree
            raise CorruptCheckpoint(f"{METADATA_TENSOR}: optimizer_scalars is not part of this format")

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[TensorFile]:
        """Open a file for the time of a with statement."""
        with open_regular(path) as (descriptor, status):
            yield cls(path, descriptor, status.st_size)

    def read(self, depth: Depth) -> Imported:
        """Read and check everything; the arrays have data only if ``depth`` is "load"."""
        tensors = [self._model, *self._moments.values()]
        total = sum(info.nbytes for group in tensors for info in group.values())
        if depth == "load" and total > (free := available_bytes()):
            raise CheckpointUnreadable(f"its tensors take {total:,} bytes of memory, and {free:,} are free")
        model = self._read_group(self._model, "model", depth)
        config, moments = self._read_optimizer(depth)
        optimizer = {STEP: config.step, **moments} if config else {}
        return self.header.to_imported(model, optimizer, config)

    def describe(self) -> dict[str, HostArray]:
        """The arrays by label, without data."""
        arrays = {f"model.{name}": HostArray(info.dtype, info.shape) for name, info in self._model.items()}
        for moment, group in self._read_optimizer("headers")[1].items():
            arrays |= {f"optimizer.{moment}.{name}": array for name, array in group.items()}
        return arrays

    def _classify(self, name: str, info: TensorInfo) -> None:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        if name in (METADATA_TENSOR, CONFIG_TENSOR, JSON_TENSOR):
            self._json[name] = info
        elif prefix and info.dtype == "F32":
            self._moments[_PREFIXES[prefix]][name.removeprefix(prefix)] = info
        elif prefix:
            raise CorruptCheckpoint(f"tensor {quote_untrusted(name)} is {info.dtype}; moments are F32")
        elif name.startswith(("optimizer.", "_")):  # taken for a weight, it would be trained
            raise CorruptCheckpoint(f"tensor {quote_untrusted(name)} is not part of this format")
        else:
            self._model[name] = info

    def _read_optimizer(self, depth: Depth) -> tuple[OptimizerConfig | None, dict[str, dict[str, HostArray]]]:
        """The parameter groups and the moments, which match the model; None without an optimizer."""
        name = next((name for name in (CONFIG_TENSOR, JSON_TENSOR) if name in self._json), None)
        if name is None:
            return None, {}
        fields = parse_object(self._read_json(name, MAX_OPTIMIZER_BYTES), name)
        config = OptimizerConfig.parse(fields, name, with_moments=name == JSON_TENSOR)
        if name == JSON_TENSOR:
            moments = parse_moments(fields, name)
        else:
            moments = {m: self._read_group(g, f"optimizer.{m}", depth) for m, g in self._moments.items()}
        shapes = {weight: info.shape for weight, info in self._model.items()}
        optimizer, field = {STEP: config.step, **moments}, f"{name}: {STEP}"
        validate_optimizer(optimizer, shapes, self.header.step, name, field)
        config.require_parameters(shapes.keys(), moments[M].keys(), name)
        return config, moments

    def _read_group(
        self, tensors: Mapping[str, TensorInfo], section: str, depth: Depth
    ) -> dict[str, HostArray]:
        arrays = {}
        for name, info in tensors.items():
            try:
                data = self._read_data(info, depth, nonnegative=section == f"optimizer.{V}")
            except CorruptCheckpoint as error:
                reason = f"tensor {quote_untrusted(info.name)}: {error.reason}"
                raise CorruptCheckpoint(reason, tensor=f"{section}.{name}") from None
            arrays[name] = HostArray(info.dtype, info.shape, data)
        return arrays

    def _read_data(self, info: TensorInfo, depth: Depth, *, nonnegative: bool) -> Any:
        """Read a tensor in pieces and check its numbers; returns uint8[nbytes] if it is to be loaded."""
        if depth == "headers":
            return None
        import numpy as np  # listing checkpoints works without it

        data = np.empty(info.nbytes if depth == "load" else min(info.nbytes, PIECE_BYTES), np.uint8)
        for offset in range(0, info.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, info.nbytes - offset)
            piece = data[offset : offset + nbytes] if depth == "load" else data[:nbytes]
            read_into(self._descriptor, piece.data, info.offset + offset)
            require_finite_bytes(piece, info.dtype, nonnegative=nonnegative)
        return data if depth == "load" else None

    def _read_json(self, name: str, max_bytes: int) -> bytes:
        info = self._json.get(name)
        if info is None or info.dtype != "U8" or len(info.shape) != 1:
            raise CorruptCheckpoint(f"the tensor {name} is not a uint8 vector")
        if info.nbytes > max_bytes:
            raise CorruptCheckpoint(
                f"the tensor {name} has {info.nbytes:,} bytes; the limit is {max_bytes:,}"
            )
        raw = bytearray(info.nbytes)
        read_into(self._descriptor, memoryview(raw), info.offset)
        return bytes(raw)


def _read_header(descriptor: int, size: int) -> dict[str, TensorInfo]:
    """Every tensor by name; together they fill the file without gaps, as safetensors requires."""
    # Bounds the length, which is read from the file, by the file's size.
    end = header_length(os.pread(descriptor, LENGTH_BYTES, 0), size)
    raw = bytearray(end - LENGTH_BYTES)
    read_into(descriptor, memoryview(raw), LENGTH_BYTES)
    fields = parse_object(bytes(raw), "the header")
    if type(fields.pop(METADATA, {})) is not dict:
        raise CorruptCheckpoint(f"the header's {METADATA} is not an object")
    tensors = {name: _parse_tensor(name, value, end) for name, value in fields.items()}
    offset = end
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != offset:
            shown = quote_untrusted(info.name)
            raise CorruptCheckpoint(f"tensor {shown} does not begin where the previous one ends")
        offset += info.nbytes
    if offset != size:  # cut off, or with hidden data
        raise CorruptCheckpoint(f"the tensors end at byte {offset:,}, but the file has {size:,}")
    return tensors


def _parse_tensor(name: str, value: Any, data_begin: int) -> TensorInfo:
    is_complete = type(value) is dict and value.keys() == {"dtype", "shape", "data_offsets"}
    dtype, shape, offsets = map(value.get, ("dtype", "shape", "data_offsets")) if is_complete else (None,) * 3
    if (
        type(dtype) is not str
        or type(shape) is not list
        or type(offsets) is not list
        or dtype not in ITEM_SIZES
        or not is_valid_shape(tuple(shape))
        or [*map(type, offsets)] != [int, int]
        or not 0 <= offsets[0] <= offsets[1]
        or offsets[1] - offsets[0] != prod(shape) * ITEM_SIZES[dtype]
    ):
        raise CorruptCheckpoint(f"tensor {quote_untrusted(name)} is not described as safetensors does")
    return TensorInfo(name, dtype, tuple(shape), data_begin + offsets[0], offsets[1] - offsets[0], "")
