"""The single-file format: safetensors, with the metadata and the optimizer as JSON in uint8 tensors.

``_metadata`` is the JSON object of :mod:`distrust.importers.metadata`. The optimizer is in one of two forms:

- newest: tensors ``optimizer.exp_avg.NAME`` and ``optimizer.exp_avg_sq.NAME``, float32 with the shape of
  ``NAME``, and ``_optimizer_config``, the JSON of its parameter groups;
- previous: ``_optimizer``, JSON of the groups and the moments. See :mod:`distrust.importers.optimizer_json`.

A file without an optimizer has neither. Every other tensor is a weight. The format has no checksums: only
contradictions are detected.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrust.checkpoint.files import errors_with_path, open_regular, parse_checkpoint_name, read_into
from distrust.checkpoint.format import ITEM_SIZES, LENGTH_BYTES, METADATA, TensorInfo, is_valid_shape
from distrust.checkpoint.header import header_length
from distrust.checkpoint.memory import available_bytes
from distrust.errors import CheckpointUnreadable, CorruptCheckpoint, quote_untrusted, shorten
from distrust.importers import TENSOR_FILE, metadata
from distrust.importers.host_arrays import PIECE_BYTES, HostArray, require_finite_bytes
from distrust.importers.imported import Imported, ImportedHeader
from distrust.importers.safe_json import parse_object
from distrust.importers.validate_optimizer import STEP, M, V, validate_optimizer

if TYPE_CHECKING:
    from distrust.importers.optimizer_json import OptimizerConfig

METADATA_TENSOR, CONFIG_TENSOR, JSON_TENSOR = "_metadata", "_optimizer_config", "_optimizer"
#: Prefixes of the names of moments -> their section in our optimizer.
_PREFIXES = {"optimizer.exp_avg.": M, "optimizer.exp_avg_sq.": V}
#: Enough for a hundred million moments as JSON.
MAX_OPTIMIZER_BYTES = 2 << 30


def header(path: Path) -> ImportedHeader:
    """See :func:`distrust.importers.read_header`."""
    with _open(path) as file:
        return file.header


def verify(path: Path) -> ImportedHeader:
    """See :func:`distrust.importers.verify`."""
    with _open(path) as file:
        file.read(load=False)
        return file.header


def read(path: Path) -> tuple[ImportedHeader, Imported]:
    """See :func:`distrust.importers.load`."""
    with _open(path) as file:
        return file.header, file.read(load=True)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_TensorFile]:
    with open_regular(path) as (descriptor, status):
        yield _TensorFile(path, descriptor, status.st_size)


def _describe(path: Path) -> dict[str, HostArray]:
    with errors_with_path(path), _open(path) as file:
        return file.describe()


class _TensorFile:
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
        content = metadata.parse(
            self._read_json(METADATA_TENSOR, metadata.MAX_METADATA_BYTES), METADATA_TENSOR, path
        )
        if content.optimizer_scalars:
            raise CorruptCheckpoint(f"{METADATA_TENSOR}: optimizer_scalars is not part of this format")
        entry = parse_checkpoint_name(path)
        self.header = ImportedHeader(
            TENSOR_FILE,
            content,
            kind=entry[2] if entry else "periodic",
            file_size=size,
            describe=lambda: _describe(path),
            lacks_arrays=not self._model and self._json.keys() == {METADATA_TENSOR},
        )

    def _classify(self, name: str, info: TensorInfo) -> None:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if name in (METADATA_TENSOR, CONFIG_TENSOR, JSON_TENSOR):
            self._json[name] = info
        elif prefix is not None:
            label = f"optimizer.{_PREFIXES[prefix]}.{name.removeprefix(prefix)}"
            if info.dtype != "F32":
                raise CorruptCheckpoint(
                    f"tensor {quote_untrusted(name)} is {info.dtype}; moments are F32", tensor=label
                )
            self._moments[_PREFIXES[prefix]][name.removeprefix(prefix)] = info
        elif name.startswith(("optimizer.", "_")):  # taken for a weight, it would be trained
            raise CorruptCheckpoint(f"tensor {quote_untrusted(name)} is not part of this format")
        else:
            self._model[name] = info

    def read(self, *, load: bool) -> Imported:
        """Read and check everything; the arrays have data only if ``load``."""
        tensors = [self._model, *self._moments.values()]
        total = sum(info.nbytes for group in tensors for info in group.values())
        if load and total > (free := available_bytes()):
            raise CheckpointUnreadable(f"its tensors take {total:,} bytes of memory, and {free:,} are free")
        model = {
            name: self._read_array(info, f"model.{name}", load=load) for name, info in self._model.items()
        }
        config, moments = self._optimizer()
        if config is None:
            return self.header.to_imported(model, {})
        if CONFIG_TENSOR in self._json:
            moments = {
                moment: {
                    name: self._read_array(info, f"optimizer.{moment}.{name}", load=load, squares=moment == V)
                    for name, info in group.items()
                }
                for moment, group in self._moments.items()
            }
        options, dropped = config.options({name: info.shape for name, info in self._model.items()})
        return self.header.to_imported(
            model,
            {STEP: config.step, **config.learning_rate(), **moments},
            options=options,
            foreign_fields={"param_groups": config.groups},
            dropped=dropped,
        )

    def describe(self) -> dict[str, HostArray]:
        """The arrays by label, without data."""
        _, moments = self._optimizer()
        return {
            **{f"model.{name}": _description(info) for name, info in self._model.items()},
            **{
                f"optimizer.{moment}.{name}": array
                for moment, group in moments.items()
                for name, array in group.items()
            },
        }

    def _optimizer(self) -> tuple[OptimizerConfig | None, dict[str, dict[str, HostArray]]]:
        """The parameter groups and moments, which match the model; tensors without their data."""
        name = next((name for name in (CONFIG_TENSOR, JSON_TENSOR) if name in self._json), None)
        if name is None:
            return None, {}
        from distrust.importers import optimizer_json  # numpy: listing checkpoints works without it

        shapes = {weight: info.shape for weight, info in self._model.items()}
        fields = parse_object(self._read_json(name, MAX_OPTIMIZER_BYTES), name)
        config = optimizer_json.parse_config(fields, name, with_moments=name == JSON_TENSOR)
        if name == JSON_TENSOR:
            moments = optimizer_json.parse_moments(fields, name)
        else:
            moments = {
                moment: {weight: _description(info) for weight, info in group.items()}
                for moment, group in self._moments.items()
            }
        optimizer = {STEP: config.step, **moments}
        validate_optimizer(
            optimizer, shapes, step=self.header.step, moments_file=name, step_field=f"{name}: {STEP}"
        )
        if not moments[M] and not (type(config.step) is int and config.step == 0):
            raise CorruptCheckpoint(f"{name}: it has no moments, but {STEP} is {shorten(repr(config.step))}")
        optimizer_json.require_weights(config.names, shapes, name)
        # After the first step each parameter has both moments, and nothing else has any.
        if mismatched := moments[M].keys() ^ {*(config.names if moments[M] else ())}:
            raise CorruptCheckpoint(
                f"{name}: {quote_untrusted(min(mismatched))} has moments or is in param_groups, but not both"
            )
        return config, moments

    def _read_array(self, info: TensorInfo, label: str, *, load: bool, squares: bool = False) -> HostArray:
        """Read a tensor a piece at a time, and check its numbers; its data is kept only if ``load``."""
        import numpy as np

        data = np.empty(info.nbytes if load else min(info.nbytes, PIECE_BYTES), np.uint8)
        for offset in range(0, info.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, info.nbytes - offset)
            piece = data[offset : offset + nbytes] if load else data[:nbytes]
            read_into(self._descriptor, piece.data, info.offset + offset)
            try:
                require_finite_bytes(piece, info.dtype, nonnegative=squares)
            except CorruptCheckpoint as error:
                raise CorruptCheckpoint(
                    f"tensor {quote_untrusted(info.name)}: {error.reason}", tensor=label
                ) from None
        return _description(info)._replace(data=data if load else None)

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


def _description(info: TensorInfo) -> HostArray:
    return HostArray(info.dtype, info.shape)


def _read_header(descriptor: int, size: int) -> dict[str, TensorInfo]:
    """Every tensor by name; together they fill the file without gaps, as safetensors requires."""
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
            raise CorruptCheckpoint(
                f"tensor {quote_untrusted(info.name)} does not begin where the previous one ends"
            )
        offset += info.nbytes
    if offset != size:
        raise CorruptCheckpoint(f"the tensors end at byte {offset:,}, but the file has {size:,}")
    return tensors


def _parse_tensor(name: str, value: Any, data_begin: int) -> TensorInfo:
    is_complete = type(value) is dict and value.keys() == {"dtype", "shape", "data_offsets"}
    offsets = value["data_offsets"] if is_complete else None
    shape = value["shape"] if is_complete else None
    dtype = value["dtype"] if is_complete else None
    if (
        type(shape) is not list
        or type(offsets) is not list
        or type(dtype) is not str
        or dtype not in ITEM_SIZES
        or not is_valid_shape(tuple(shape))
        or [*map(type, offsets)] != [int, int]
        or not 0 <= offsets[0] <= offsets[1]
        or offsets[1] - offsets[0] != prod(shape) * ITEM_SIZES[dtype]
    ):
        raise CorruptCheckpoint(
            f"tensor {quote_untrusted(shorten(name))} is not described as safetensors does"
        )
    return TensorInfo(name, dtype, tuple(shape), data_begin + offsets[0], offsets[1] - offsets[0], "")
