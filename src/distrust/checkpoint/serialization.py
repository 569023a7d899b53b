"""A checkpoint <-> its image in a file: flattened, laid out and digested; read, checked and put together."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distrust.checkpoint import arrays, tree, verified_read
from distrust.checkpoint.catalog import open_checkpoint
from distrust.checkpoint.checkpoint import ARRAY_SECTIONS, STATE_SECTIONS, Checkpoint
from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.format import Kind, Layout, TensorInfo, canonical_json, tensor_hasher
from distrust.checkpoint.header import parse_header
from distrust.checkpoint.lazy import LazyMapping, LazyTensor
from distrust.checkpoint.memory import allocate
from distrust.errors import CorruptCheckpoint, UnsupportedState

_PLAIN_SECTIONS = tuple(f"{section}." for section in STATE_SECTIONS if section not in ARRAY_SECTIONS)


@dataclass(frozen=True, slots=True)
class PreparedCheckpoint:
    """A checkpoint taken apart for a file, the data of its tensors not yet read.

    Attributes:
        step: of the checkpoint.
        layout: where every byte goes.
        flats: the arrays in the order of their data, settled: flat, and fit to be read by any thread.
        held: the labels of those that stay as they are without a copy.
    """

    step: int
    layout: Layout
    flat_arrays: Sequence[Any]
    zero_copy: set[str]


def prepare(checkpoint: Checkpoint, kind: Kind) -> PreparedCheckpoint:
    """Take a checkpoint apart: everything but the bytes of its arrays is held from now on.

    Raises:
        UnsupportedState: for a value that would not come back exactly.
    """
    sections, found = tree.flatten(
        {name: getattr(checkpoint, name) for name in STATE_SECTIONS}, is_array=arrays.is_array
    )
    for label in found:
        if label.startswith(_PLAIN_SECTIONS):
            raise UnsupportedState(
                f"{label}: arrays and numpy scalars belong in {', '.join(ARRAY_SECTIONS)}; "
                "here give numbers and lists, such as float(x) or x.tolist()",
                label=label,
            )
    tensors = [TensorInfo(label, *described) for label, described in arrays.describe(found).items()]
    layout = Layout(tensors, step=checkpoint.step, kind=kind, sections=sections, run=_run(checkpoint))
    flats, held = arrays.flat_arrays(found)
    return PreparedCheckpoint(checkpoint.step, layout, [flats[name] for name in layout.names], held)


def state_digest(checkpoint: Checkpoint, kind: Kind) -> str:
    """The identity of a state, as its file will have it; nothing is written.

    Raises:
        UnsupportedState: for a value that would not come back exactly.
    """
    prepared = prepare(checkpoint, kind)
    digests = []
    for flat in prepared.flat_arrays:
        memory = allocate(flat.nbytes)
        arrays.fill(memory, 0, [flat])
        digests.append(tensor_hasher(all_cores=False).update(memory[: flat.nbytes]).hexdigest())
    raw, _ = prepared.layout.header(digests)
    return parse_header(raw, prepared.layout.file_size).state_digest


def load(
    path: Path, *, framework: arrays.Framework, mapped: bool = False, lazy: bool = False
) -> tuple[CheckpointFile, Checkpoint]:
    """Read and verify a whole checkpoint: what its header says, and its content.

    Args:
        path: of the file.
        framework: of the arrays.
        mapped: give views of the file, not copies.
        lazy: verify each tensor when it is first touched, not now; of a mapped file only.

    Raises:
        CheckpointNotFound: if there is no such file.
        CorruptCheckpoint: if any byte of it is not what was written.
        ConfigError: if the framework, or a dtype of it, is not at hand.
    """
    import numpy as np

    arrays.require_framework(framework)
    with open_checkpoint(path) as (descriptor, header):
        content = (
            verified_read.map_file(descriptor, header) if mapped else verified_read.load(descriptor, header)
        )
        data = np.frombuffer(content.data, np.uint8)
        tensors = {tensor.name: tensor for tensor in header.tensors}

        def array(label: str) -> Any:
            tensor, start = tensors[label], content.offsets[label]
            return arrays.from_host(
                data[start : start + tensor.nbytes], tensor.dtype, tensor.shape, framework=framework
            )

        def verified(label: str) -> Any:
            try:
                verified_read.verify_content(content, [tensors[label]])
            except CorruptCheckpoint as error:
                raise CorruptCheckpoint(error.reason, path=path, tensor=error.tensor) from None
            return array(label)

        if mapped and not lazy:
            verified_read.verify_content(content, header.tensors)
        sections = {
            name: tree.unflatten(header.sections[name], LazyTensor if lazy else array)
            for name in ARRAY_SECTIONS
        }
        if lazy:
            touch = functools.cache(verified)
            sections = {name: LazyMapping(section, touch) for name, section in sections.items()}
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


def _run(checkpoint: Checkpoint) -> str:
    try:
        metrics = {name: float(value) for name, value in checkpoint.metrics.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise UnsupportedState(f"metrics: not all are numbers: {error}", label="metrics") from None
    run = {
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "host": platform.node(),
        "metrics": metrics,
        "extra": checkpoint.run,
    }
    if checkpoint.measured_on:
        run["measured_on"] = checkpoint.measured_on
    try:
        text = canonical_json(run)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedState(f"run: not plain JSON: {error}", label="run") from None
    if tree.is_too_deep(run):
        raise UnsupportedState(f"run: nested deeper than {tree.MAX_DEPTH} levels", label="run")
    return text
