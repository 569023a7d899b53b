"""What the exchange of gradients costs on many GPUs, on paper: python -m benchmarks.exchange_cost.

Computed, not measured. A rank sends, for each round of micro-batches, its gradient but for its own slice, and
at the end its slice of the sum: S·(N−1)/N·(rounds + 1) bytes. Of this, what goes to another machine shares
that machine's network card with the other GPUs in it. A round's exchange overlaps with the computation of the
next round; only the last one's, and the final gathering, are waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

#: An 8 B model with LoRA of rank 16 in all linear layers: 32 layers of these shapes (inputs, outputs).
SHAPES = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *[(4096, 14336)] * 3]
GRADIENT_BYTES = 4 * 32 * sum(16 * (inputs + outputs) for inputs, outputs in SHAPES)
PARAMETERS, TOKENS, FLOPS = 8e9, 8192, 4e14  # per micro-batch; at 40% of an H100's peak in bfloat16
#: Forward, and backward through the frozen base without gradients of its weights.
MICRO_BATCH_SECONDS = 4 * PARAMETERS * TOKENS / FLOPS
NVLINK = 300e9  # bytes a second of a GPU within a machine
GPUS = 8  # per machine


@dataclass(frozen=True)
class Case:
    """Some machines with a network card each."""

    machines: int
    card: float  # bytes a second, to and from a machine

    def exchange(self) -> float:
        """Seconds of one all-to-all, or of the all-gather, which sends as much."""
        ranks = self.machines * GPUS
        inside = GRADIENT_BYTES * (GPUS - 1) / ranks / NVLINK
        across = GPUS * GRADIENT_BYTES * (ranks - GPUS) / ranks / self.card
        return max(inside, across)

    def cost(self, rounds: int) -> float:
        """Share of a step that is waited for the exchange."""
        exchange = self.exchange()
        hidden = (rounds - 1) * max(0.0, exchange - MICRO_BATCH_SECONDS)
        waiting = hidden + 2 * exchange
        return waiting / (rounds * MICRO_BATCH_SECONDS + waiting)


def main() -> None:
    """Print the table of docs/distributed.md."""
    print(f"gradient {GRADIENT_BYTES / 1e6:.0f} MB, a micro-batch {MICRO_BATCH_SECONDS:.2f} s\n")
    print("| machines of 8 GPUs | network of a machine | one exchange | share of a step, G = N | G = 4 N |")
    print("|---|---|---|---|---|")
    cases = [Case(1, NVLINK), *(Case(n, bits * 1e9 / 8) for n in (2, 8, 32) for bits in (25, 100, 3200))]
    for case in cases:
        network = "-" if case.machines == 1 else f"{case.card * 8 / 1e9:,.0f} Gb/s"
        shares = " | ".join(f"{case.cost(rounds):.1%}" for rounds in (1, 4))
        print(f"| {case.machines} | {network} | {case.exchange() * 1e3:.1f} ms | {shares} |")


if __name__ == "__main__":
    main()
