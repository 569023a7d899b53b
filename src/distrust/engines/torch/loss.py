"""Cross-entropy with a weight for each token."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from distrust.data import IGNORED


def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain and weighted cross-entropy of each token, in nats and float32.

    Args:
        logits: [b, t, vocabulary]: at each token, of the next one.
        labels: int64[b, t]: each token where it is learned, else -100. Not shifted.
        weights: float32[b, t]: each token's weight. Not shifted.

    Returns:
        float32[b, t - 1] each: cross-entropy, and weight times cross-entropy.
    """
    wanted = labels[:, 1:]
    predicted = logits[:, :-1].float()
    plain = cross_entropy(
        predicted.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(wanted.shape)
    return plain, plain * weights[:, 1:]
