"""The digest of a base model's weights, on a GPU computed beside what follows.

A GPU is read in a thread, through a small block of page-locked memory and on a stream of its own, while the
model gets its adapter and its trials. Nobody may change the weights until the digest is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from distrust.config import TrainConfig
from distrust.engines import loading
from distrust.engines.state_conversion import dtype_name
from distrust.engines.torch.model import stored_weights

#: Bytes of a weight that are read from a device at once. torch keeps page-locked memory for good.
PIECE_BYTES = 2**25


def start(
    base: torch.nn.Module, config: TrainConfig, *, dtype: torch.dtype, device: torch.device
) -> Callable[[], str]:
    """Start to digest the weights as loaded, before any quantization; returns a function that waits for it.

    A weight that is not finite raises ModelError: here, or where a thread digests, from that function.
    """
    if config.quantization == "none":
        weights: Iterable[tuple[str, Tensor]] = sorted(base.named_parameters())
    else:  # the files have them where the model no longer does
        weights = stored_weights(config.model, dtype=dtype)
    if not runs_beside(device):
        digest = loading.fingerprint(describe(weights, config.model))
        return lambda: digest
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # which loads the weights

    def read_device() -> str:
        with torch.cuda.stream(stream):  # with None: nothing
            block = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=stream is not None)
            return loading.fingerprint(describe(weights, config.model, block))

    pool = ThreadPoolExecutor(1, thread_name_prefix="distrust-fingerprint")
    digest_of_device = pool.submit(read_device)
    pool.shutdown(wait=False)  # the thread ends after its only task
    return digest_of_device.result


def runs_beside(device: torch.device) -> bool:
    """Whether a thread digests: where the processor does not compute the model as well."""
    return device.type == "cuda"


@torch.no_grad()
def describe(
    weights: Iterable[tuple[str, Tensor]], model: str, block: Tensor | None = None
) -> Iterator[tuple[str, str, tuple[int, ...], Iterator[Any]]]:
    """Weights in the form that :func:`distrust.engines.loading.fingerprint` takes.

    Raises ModelError for one that is not finite: the first loss would not be, either.
    """
    for name, weight in weights:
        # A sum is quicker, and finite only if every term is; but it may overflow.
        if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
            raise loading.not_finite(model, name)
        yield name, dtype_name(weight), tuple(weight.shape), _pieces(weight.detach(), block)


def _pieces(weight: Tensor, block: Tensor | None) -> Iterator[Any]:
    """The bytes of a weight; with a block through it, each piece valid until the next is asked for."""
    weight = weight.cpu() if block is None else weight
    flat = weight.contiguous().reshape(-1).view(torch.uint8)
    if block is None:
        yield flat.numpy().data
        return
    for piece in flat.split(len(block)):  # type: ignore[no-untyped-call]
        yield block[: len(piece)].copy_(piece).numpy().data
