"""A checkpoint <-> its image in a file: flattened, laid out and digested; read, checked and put together."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrust.checkpoint import arrays, tree
from distrust.checkpoint.checkpoint import ARRAY_SECTIONS, STATE_SECTIONS, Checkpoint
from distrust.checkpoint.format import Kind, Layout, TensorInfo, canonical_json, tensor_hasher
from distrust.checkpoint.storage import AtomicFile
from distrust.checkpoint.store import CheckpointFile, check_digest, opened, read_into
from distrust.errors import UnsupportedState

if TYPE_CHECKING:
    import numpy as np

WRITE_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Image:
    """A checkpoint laid out for a file, its tensors not yet read.

    Attributes:
        step: of the checkpoint.
        layout: where every byte goes.
        arrays: the caller's arrays, in the order of their data.
    """

    step: int
    layout: Layout
    arrays: Sequence[Any]

    def write(self, path: Path, data: Iterable[np.ndarray[Any, Any]]) -> str:
        """Write and commit the file; returns its header's digest.

        Args:
            path: the final name.
            data: uint8[nbytes] of each tensor, in the order of :attr:`arrays`; consumed one by one.

        Raises:
            SaveFailed: with what stood before untouched.
        """
        with AtomicFile(path, self.layout.file_size) as file:
            tensors = self.layout.tensors
            digests = [_write(file, tensor, part) for tensor, part in zip(tensors, data, strict=True)]
            header, digest = self.layout.header(digests)
            # Last: a file without its header is no checkpoint, whatever the disk made of the rest.
            file.write_at(0, header)
            file.commit()
        return digest


def prepare(checkpoint: Checkpoint, kind: Kind) -> Image:
    """Lay a checkpoint out.

    Raises:
        UnsupportedState: for a value that would not come back exactly.
    """
    skeleton, found = tree.flatten(
        {name: getattr(checkpoint, name) for name in STATE_SECTIONS}, is_array=arrays.is_array
    )
    tensors = [_described(label, array) for label, array in found.items()]
    layout = Layout(tensors, step=checkpoint.step, kind=kind, sections=skeleton, run=_run(checkpoint))
    return Image(checkpoint.step, layout, [found[tensor.name] for tensor in layout.tensors])


def read(path: Path, *, framework: arrays.Framework) -> tuple[CheckpointFile, Checkpoint]:
    """Read and verify a whole checkpoint: what its header says, and its content.

    Raises:
        CheckpointNotFound: if there is no such file.
        CorruptCheckpoint: if any byte of it is not what was written.
    """
    import numpy as np

    with opened(path) as (descriptor, header):
        loaded: dict[str, Any] = {}
        for tensor in header.tensors:
            data = np.empty(tensor.nbytes, np.uint8)
            read_into(descriptor, data.data, tensor.offset)
            check_digest(tensor, tensor_hasher().update(data.data).hexdigest())
            loaded[tensor.name] = arrays.from_host(data, tensor.dtype, tensor.shape, framework=framework)

        checkpoint = Checkpoint(
            step=header.step,
            **{name: tree.unflatten(header.sections[name], loaded.__getitem__) for name in ARRAY_SECTIONS},
            config=header.config,
            metadata=header.metadata,
            metrics=header.saved_metrics,
            run=header.run_info["extra"],
        )
        return CheckpointFile(path, header), checkpoint


def _write(file: AtomicFile, tensor: TensorInfo, data: np.ndarray[Any, Any]) -> str:
    hasher = tensor_hasher()
    for start in range(0, tensor.nbytes, WRITE_BLOCK_BYTES):
        block = data[start : start + WRITE_BLOCK_BYTES]
        # A copy: were the caller's array to change between digest and write, the file would be damaged.
        block = block.copy()
        hasher.update(block.data)
        file.write_at(tensor.offset + start, block)
    return hasher.hexdigest()


def _described(label: str, array: Any) -> TensorInfo:
    if label.split(".", 1)[0] not in ARRAY_SECTIONS:
        raise UnsupportedState(
            f"{label}: arrays and numpy scalars belong in {', '.join(ARRAY_SECTIONS)}; "
            "here give numbers and lists, such as float(x) or x.tolist()",
            label=label,
        )
    return TensorInfo(label, *arrays.describe(array, label))


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
    try:
        text = canonical_json(run)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedState(f"run: not plain JSON: {error}", label="run") from None
    return text
