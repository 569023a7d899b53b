"""What the generators of random numbers are seeded by."""

from __future__ import annotations

from blake3 import blake3


def micro_step_seed(*, seed: int, step: int, micro_step: int) -> int:
    """63 bits of these three: what is drawn in a micro-step depends on nothing that happened before."""
    digest = blake3(f"micro-step {seed} {step} {micro_step}".encode()).digest(8)
    return int.from_bytes(digest, "little") >> 1
