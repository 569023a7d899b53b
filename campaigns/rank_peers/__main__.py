"""The command ``python -m campaigns.rank_peers``: the trials of each peer, and the table."""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from campaigns import rank_peers
from campaigns.campaign import Campaign, parser, require, run
from campaigns.child import PYTHON
from campaigns.rank_peers.programs import PEERS
from campaigns.rank_peers.trials import RANKS, WAIT_SECONDS, Outcome, Trainings, run_mixture
from campaigns.ranks.processes import Program, Server

ROUNDS = 10  # trials of each cell
COUNTS = (1, 2, 4)  # of ranks
OURS = "distrust"
NAMES = {
    OURS: "**`distrust train`**",
    "Trainer": "Trainer under DDP",
    "accelerate": "accelerate under DDP, `save_state`",
    "DCP": "torch's DDP with DCP",
}
PACKAGES = ("torch", "transformers", "accelerate")
HEADER = (
    "",
    f"SIGKILL of one of {RANKS} ranks in a save, then the same command",
    "the other rank had ended after, at most",
    "the same, resumed on 1 rank",
    "a flipped bit in the newest checkpoint",
    f"weights on {', '.join(map(str, COUNTS))} ranks",
)


@dataclass
class Row:
    """The results of one peer."""

    kills: Counter[Outcome] = field(default_factory=Counter)
    seconds: float = 0.0  # from the kill to the end of the other rank, at most
    fewer: Counter[Outcome] = field(default_factory=Counter)
    flips: Counter[Outcome] = field(default_factory=Counter)
    digests: int = 0  # different ones, on different numbers of ranks


def main(arguments: Sequence[str] | None = None, *, python: Sequence[str] = PYTHON) -> int:
    cli = parser(rank_peers.__doc__, writes=True)
    cli.add_argument("--peers", default="", help="only the peers whose name this matches")
    cli.add_argument("--rounds", type=int, default=ROUNDS, help=f"trials of each cell (default: {ROUNDS})")
    cli.add_argument("--markdown", type=Path, help="write the table into this file")
    return run("rank_peers", cli, lambda campaign: _body(campaign, python), cases=1, arguments=arguments)


def _body(campaign: Campaign, python: Sequence[str]) -> None:
    options = campaign.options
    folder = Path(tempfile.mkdtemp(prefix="rank-peers-", dir=options.directory)).resolve()
    rows: dict[str, Row] = {}
    with Server(python) as server:
        _make_model(server, folder)
        for peer in PEERS:
            if re.search(options.peers, peer):
                trainings = Trainings(server, peer, folder)
                rows[peer] = _try(campaign, trainings, random.Random(f"{options.seed}/{peer}"))
        mixture = run_mixture(server, folder) if "DCP" in rows else None
    table = _markdown(rows, mixture, options.seed)
    print(table)
    if options.markdown:
        options.markdown.write_text(table)
    shutil.rmtree(folder)


def _try(campaign: Campaign, trainings: Trainings, rng: random.Random) -> Row:
    row = Row()
    digests = {trainings.reference(count).digest for count in COUNTS}
    row.digests = len(digests)
    for _ in range(campaign.options.rounds):
        outcome, seconds = trainings.kill_a_rank(rng)
        row.kills[outcome] += 1
        row.seconds = max(row.seconds, seconds)
        row.fewer[trainings.kill_a_rank(rng, resume_on=1)[0]] += 1
        row.flips[trainings.flip_a_bit(rng)] += 1
        campaign.count(f"rounds of {trainings.peer}")
        if trainings.peer == OURS:
            counts = (row.kills, row.fewer, row.flips)
            all_equal = all(set(outcomes) == {Outcome.EQUAL} for outcomes in counts)
            require(all_equal and row.digests == 1, f"ours: {row}")
    return row


def _make_model(server: Server, folder: Path) -> None:
    err = folder / "err.txt"
    program = Program("campaigns.ranks.model", [str(folder)])
    pid = server.start(program, out=folder / "out.txt", err=err)
    while (code := server.codes().get(pid)) is None:
        time.sleep(0.01)
    require(code == 0, f"{folder}: no model: {err.read_text()}")


def _markdown(rows: dict[str, Row], mixture: str | None, seed: int) -> str:
    lines = [HEADER, ("---",) * len(HEADER), *(_cells(peer, row) for peer, row in rows.items())]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    about = f"{packages}; gloo, {os.cpu_count()} cores, Python {platform.python_version()}, seed {seed}."
    parts = [about, table]
    if mixture is not None:
        parts.append(
            "DCP, two ranks save ones as step 1, then twos as the same step, and rank 1 is killed before it "
            f"writes its part: it loads {mixture}."
        )
    return "\n\n".join(parts) + "\n"


def _cells(peer: str, row: Row) -> tuple[str, ...]:
    seconds = f"more than {WAIT_SECONDS:g} s" if row.seconds >= WAIT_SECONDS else f"{row.seconds:.1f} s"
    weights = "the same bits" if row.digests == 1 else f"{row.digests} different ones"
    return NAMES[peer], _outcomes(row.kills), seconds, _outcomes(row.fewer), _outcomes(row.flips), weights


def _outcomes(counts: Counter[Outcome]) -> str:
    shown = ", ".join(f"{outcome.value} {counts[outcome]}" for outcome in Outcome if counts[outcome])
    return f"{shown} of {counts.total()}"


if __name__ == "__main__":
    sys.exit(main())
