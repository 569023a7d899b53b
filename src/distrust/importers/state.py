"""What the older formats hold -> :class:`Checkpoint`; the one place that says what becomes of what.

============================  =======================================================================
there                         here
============================  =======================================================================
the model's arrays            ``model``: name -> array
the optimizer's moments       ``optimizer``: ``{"m": {name: array}, "v": {name: array}}``
``optimizer_scalars``         ``optimizer``, beside ``m`` and ``v``: ``step``, ``learning_rate``
``loss_history``              ``history["loss"]``, float64; its last value is the metric ``loss``
``random_state``              ``rng``; a list of whole numbers is an int64 array
``metadata``                  ``metadata``, as it stands
``config``                    ``metadata["foreign_config"]``, unchanged
fields not known here         ``metadata["foreign_fields"]``, unchanged
the rank of the LoRA arrays   ``config["lora_rank"]``: of our options the only one that is certain
``timestamp``                 ``run["timestamp"]``, with the format's name as ``run["imported_from"]``
============================  =======================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from distrust.checkpoint import arrays
from distrust.checkpoint.arrays import Framework
from distrust.checkpoint.arrays.host import NUMPY_NAMES
from distrust.checkpoint.checkpoint import Checkpoint
from distrust.importers.fields import Whole
from distrust.importers.header import OlderHeader
from distrust.importers.moments import Numbers
from distrust.run_record import imported_run


class Bytes(NamedTuple):
    """An array that is not yet one of a framework.

    Attributes:
        data: uint8[nbytes], little-endian, in C layout.
        dtype: the format's name of it.
        shape: its dimensions.
    """

    data: Any
    dtype: str
    shape: tuple[int, ...]


def assemble(
    header: OlderHeader,
    model: Mapping[str, Bytes],
    optimizer: dict[str, Any],
    *,
    framework: Framework,
) -> Checkpoint:
    """A checkpoint of what an older one holds.

    Args:
        header: what it says of itself.
        model: its arrays by name.
        optimizer: the tree of its arrays and scalars, moments under ``m`` and ``v``.
        framework: of the arrays.

    Raises:
        ConfigError: if a dtype of the framework is not at hand.
    """

    def made(value: Bytes) -> Any:
        return arrays.from_host(value.data, value.dtype, value.shape, framework=framework)

    fields = header.fields
    losses = np.array(fields.losses, np.float64)
    return Checkpoint(
        step=header.step,
        model={name: made(value) for name, value in model.items()},
        optimizer=_mapped(optimizer, made),
        rng=_mapped(fields.rng, made),
        history={"loss": made(_bytes(losses, "F64"))} if fields.losses else {},
        config=_certain(model),
        metadata=fields.kept,
        metrics=header.saved_metrics,
        run=imported_run(header.format, timestamp=fields.timestamp),
    )


def _mapped(node: Any, made: Callable[[Bytes], Any]) -> Any:
    if isinstance(node, Bytes):
        return made(node)
    if isinstance(node, Numbers):
        values = np.array(node.values, NUMPY_NAMES[node.dtype]).reshape(node.shape)
        return made(_bytes(values, node.dtype))
    if isinstance(node, Whole):
        return made(_bytes(np.array(node.values, np.int64), "I64"))
    if type(node) is dict:
        return {key: _mapped(value, made) for key, value in node.items()}
    return [_mapped(value, made) for value in node] if type(node) is list else node


def _bytes(values: Any, dtype: str) -> Bytes:
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return Bytes(little.reshape(-1).view(np.uint8), dtype, values.shape)


def _certain(model: Mapping[str, Bytes]) -> dict[str, Any]:
    """The options of ours that the arrays prove. What the config there says may be another run's.

    The names that end in ``lora_a`` have the shape [in, rank], those in ``lora_b`` [rank, out].
    """
    ranks = {
        value.shape[place]
        for name, value in model.items()
        for suffix, place in ((".lora_a", -1), (".lora_b", 0))
        if name.endswith(suffix) and len(value.shape) == 2
    }
    return {"lora_rank": ranks.pop()} if len(ranks) == 1 else {}
