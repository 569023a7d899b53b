"""Example weights by provenance, for your own trainer: numpy only.

python examples/weights.py
"""

import numpy as np

from distrust import weighting

SOURCES = ["notebook", "patent", "press release", "encyclopedia"]
AUTHORITY_WEIGHT = np.array(
    [0.05, 0.13, 0.88, 0.90]
)  # w: 0 is a primary record, 0.99 consensus; high means less training weight
PROVENANCE_ENTROPY = np.array([3.2, 2.6, 0.8, 0.4])  # H, bits: diversity of the evidence
TOKENS = np.array([420, 610, 2300, 5100])  # trained tokens of each example


def weighted_loss(token_losses: np.ndarray, weights: np.ndarray) -> float:
    """The loss to minimize: the sum of weight times cross-entropy, over all trained tokens of the step.

    Divide by the number of tokens, not by the sum of the weights: that would cancel the weighting in a batch
    with one example.
    """
    return float((weights * token_losses).sum() / len(token_losses))


def main() -> None:
    """Print the weight of each source, and a loss made with them."""
    raw = weighting.example_weights(AUTHORITY_WEIGHT, PROVENANCE_ENTROPY)
    weights = weighting.normalize(
        raw, tokens=TOKENS
    )  # mean 1 over the tokens, so that the learning rate keeps its meaning
    for source, weight in zip(SOURCES, weights, strict=True):
        print(f"{source:14} weighs {weight:.3f}")
    print(f"worth {weighting.effective_sample_size(raw):.2f} of {len(SOURCES)} equal examples")

    of_example = np.repeat(np.arange(len(SOURCES)), TOKENS)  # the example of each token
    losses = np.random.default_rng(0).uniform(1, 3, size=len(of_example))
    print(f"plain loss {losses.mean():.3f}, weighted {weighted_loss(losses, weights[of_example]):.3f}")


if __name__ == "__main__":
    main()
