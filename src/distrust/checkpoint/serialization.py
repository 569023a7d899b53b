"""A checkpoint <-> the parts of its file: :func:`flatten` for a writer, :func:`load` for a reader."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distrust.checkpoint import arrays, tree, verified_read
from distrust.checkpoint.arrays import Framework, Shard
from distrust.checkpoint.catalog import open_checkpoint
from distrust.checkpoint.checkpoint import Checkpoint
from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.files import errors_with_path
from distrust.checkpoint.format import Kind, Layout, canonical_json, tensor_hasher
from distrust.checkpoint.header import parse_header
from distrust.checkpoint.lazy import LazyMapping, LazyTensor
from distrust.checkpoint.memory import allocate
from distrust.checkpoint.tree import ARRAY_SECTIONS, STATE_SECTIONS
from distrust.errors import ConfigError, UnsupportedState

_PLAIN_SECTIONS = tuple(f"{section}." for section in STATE_SECTIONS if section not in ARRAY_SECTIONS)


@dataclass(frozen=True, slots=True)
class PreparedCheckpoint:
    """A checkpoint ready to be written. The data of its tensors is not read yet."""

    step: int
    layout: Layout
    flat_arrays: Sequence[Any]  # in the order of their data; any thread may read them
    zero_copy: set[str]  # the labels of those that keep their contents without a copy
    rows: Mapping[str, int]  # of the arrays of which it has a shard: how many rows the whole one has


@dataclass(frozen=True, slots=True)
class FlatCheckpoint:
    """A copy of a checkpoint, except of its arrays: the caller's changes in them still have an effect."""

    step: int
    kind: Kind
    sections: dict[str, Any]
    arrays: dict[str, Any]  # by label
    run: str

    def lay_out(self) -> PreparedCheckpoint:
        """Lay out its file, with views of the arrays; UnsupportedState if one cannot be restored exactly."""
        shards = {label: array for label, array in self.arrays.items() if isinstance(array, Shard)}
        by_label = self.arrays | {label: shard.rows for label, shard in shards.items()}
        tensors = arrays.describe(by_label)
        tensors |= {label: (tensors[label][0], shard.shape) for label, shard in shards.items()}
        layout = Layout(tensors, step=self.step, kind=self.kind, sections=self.sections, run=self.run)
        flats, zero_copy = arrays.flat_arrays(by_label)
        in_order = [flats[name] for name in layout.names]
        rows = {name: shard.shape[0] for name, shard in shards.items()}
        return PreparedCheckpoint(self.step, layout, in_order, zero_copy, rows)


def flatten(checkpoint: Checkpoint, kind: Kind, *, record_host: bool = True) -> FlatCheckpoint:
    """Flatten a checkpoint; UnsupportedState if it could not be restored exactly.

    ``record_host``: whether the file gets the name of this machine. It is no part of the state digest.
    """
    state = {name: getattr(checkpoint, name) for name in STATE_SECTIONS}
    sections, by_label = tree.flatten(state, is_array=arrays.is_array)
    for label in by_label:
        if label.startswith(_PLAIN_SECTIONS):
            raise UnsupportedState(
                f"{label}: arrays and numpy scalars belong in {', '.join(ARRAY_SECTIONS)}; "
                "use plain numbers and lists here, such as float(x) or x.tolist()",
                label=label,
            )
    run = _run_json(checkpoint, host=platform.node() if record_host else "")
    return FlatCheckpoint(checkpoint.step, kind, sections, by_label, run)


def state_digest(checkpoint: Checkpoint, kind: Kind) -> str:
    """Return the ``state_digest`` that a checkpoint's file would have, without writing it."""
    prepared = flatten(checkpoint, kind).lay_out()
    digests = []
    for flat in prepared.flat_arrays:
        memory = allocate(flat.nbytes)
        arrays.fill(memory, 0, [flat])
        digests.append(tensor_hasher(all_cores=False).update(memory[: flat.nbytes]).hexdigest())
    raw, _ = prepared.layout.header(digests)
    return parse_header(raw, prepared.layout.file_size).state_digest


def load(
    path: Path, *, framework: Framework, mapped: bool = False, lazy: bool = False, device: str | None = None
) -> tuple[CheckpointFile, Checkpoint]:
    """Read and verify a checkpoint; return its header with its path, and its content.

    ``mapped`` gives views of the mapped file instead of copies; ``lazy``, which requires it, verifies each
    tensor on first access instead of now. ``device`` loads model and optimizer to a device of torch. Raises
    CheckpointNotFound, CorruptCheckpoint if a byte is not what was written, or ConfigError if the framework
    is not installed, or lacks a dtype or the device.
    """
    import numpy as np

    arrays.require_framework(framework)
    if device is not None and (mapped or framework != "torch"):
        raise ConfigError(f'device={device!r} needs framework="torch", and no mmap=True')
    with errors_with_path(path), open_checkpoint(path) as (descriptor, header):
        tensors = {tensor.name: tensor for tensor in header.tensors}
        if device is not None:
            from distrust.checkpoint.arrays import device_read  # imports torch

            data = device_read.load(descriptor, header, device)
        else:
            content = (verified_read.map_file if mapped else verified_read.load)(descriptor, header)
            block, starts = np.frombuffer(content.data, np.uint8), content.offsets
            data = {name: block[starts[name] :][: tensor.nbytes] for name, tensor in tensors.items()}

        def build_array(label: str) -> Any:
            tensor = tensors[label]
            return arrays.from_host(data[label], tensor.dtype, tensor.shape, framework=framework)

        def verify_and_build(label: str) -> Any:
            with errors_with_path(path):  # the one around this function has ended by then
                verified_read.verify([tensors[label]], content.view)
            return build_array(label)

        if mapped and not lazy:  # not mapped: load() verified every tensor while it read them
            verified_read.verify(header.tensors, content.view)
        build = LazyTensor if lazy else build_array
        sections = {name: tree.unflatten(header.sections[name], build) for name in ARRAY_SECTIONS}
        if lazy:
            load_tensor = functools.cache(verify_and_build)  # each tensor is verified once
            sections = {name: LazyMapping(section, load_tensor) for name, section in sections.items()}
        checkpoint = Checkpoint(
            step=header.step,
            **sections,
            config=header.config,
            metadata=header.metadata,
            metrics=header.saved_metrics,
            measured_on=header.measured_on,
            run=header.run_info["extra"],
        )
        return CheckpointFile(path, header), checkpoint


def _run_json(checkpoint: Checkpoint, *, host: str) -> str:
    try:
        metrics = {name: float(value) for name, value in checkpoint.metrics.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise UnsupportedState(f"metrics: not all are numbers: {error}", label="metrics") from None
    run = {
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "host": host,
        "metrics": metrics,
        "extra": checkpoint.run,
    }
    if checkpoint.measured_on:  # absent if empty, as in files of earlier versions
        run["measured_on"] = checkpoint.measured_on
    try:
        text = canonical_json(run)
        text.encode()  # raises for lone surrogates
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedState(f"run: not plain JSON: {error}", label="run") from None
    if tree.is_too_deep(run):
        raise UnsupportedState(f"run: nested deeper than {tree.MAX_DEPTH} levels", label="run")
    return text
