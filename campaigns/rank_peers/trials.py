"""One trial: a training on some ranks, an accident, and the same command again."""

from __future__ import annotations

import random
import re
import shutil
import socket
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from signal import SIGKILL

from campaigns.campaign import require
from campaigns.peers.accidents import flip_a_bit
from campaigns.rank_peers.programs import SAVE_EVERY, STEPS
from campaigns.ranks.processes import Program, Server, lives, send

RANKS = 2
#: A rank that waits longer for a dead one counts as hung, and is killed.
WAIT_SECONDS = 20.0
HANG_SECONDS = 120.0
_POLL_SECONDS = 0.002


class Outcome(Enum):
    """How the resumed run ended, the best first; the value is the term in the table."""

    EQUAL = "as undisturbed"
    OTHER = "other losses or weights"
    ERROR = "stopped with an error"


@dataclass(frozen=True)
class Result:
    """What a training printed, and how it ended."""

    failed: bool
    losses: dict[int, float]
    digest: str | None
    errors: str


class Trainings:
    """The trainings of one peer."""

    def __init__(self, server: Server, peer: str, folder: Path) -> None:
        self.peer = peer
        self._server = server
        self._folder = folder  # with the model and the data
        self._references: dict[int, Result] = {}  # by the number of ranks
        self._numbers = 0

    def reference(self, count: int = RANKS) -> Result:
        if count not in self._references:
            out = self._new_folder()
            self._references[count] = self._finish(self.start(out, count), out)
            require(not self._references[count].failed, f"{out}: {self._references[count].errors}")
            shutil.rmtree(out)
        return self._references[count]

    def kill_a_rank(self, rng: random.Random, *, resume_on: int = RANKS) -> tuple[Outcome, float]:
        """SIGKILL one rank within a save; returns also the seconds until the other one had ended."""
        out = self._new_folder()
        pids = self.start(out, RANKS)
        self._wait_for_save(out, rng.randint(2, STEPS // SAVE_EVERY - 2), pids)
        time.sleep(rng.uniform(0, 0.02))
        victim = rng.choice(pids)
        send(victim, SIGKILL)
        seconds = self._end(pids)
        outcome = self._resume(out, resume_on)
        return outcome, seconds

    def flip_a_bit(self, rng: random.Random) -> Outcome:
        """A bit of the newest checkpoint changes between two attempts."""
        out = self._new_folder()
        pids = self.start(out, RANKS)
        self._wait_for_save(out, STEPS // SAVE_EVERY - 3, pids)
        for pid in pids:
            send(pid, SIGKILL)
        self._end(pids)
        *_, last = self._saves(out)
        if last.is_dir():  # it may be half-written; the one before it is complete
            shutil.rmtree(last)
            *_, last = self._saves(out)
        files = [path for path in (last, *last.rglob("*")) if path.is_file()]
        flip_a_bit(sorted(files), rng)
        return self._resume(out, RANKS)

    def start(self, out: Path, count: int) -> list[int]:
        arguments = [self.peer, str(self._folder), str(out)]
        program = Program("campaigns.rank_peers.programs", arguments)
        programs = [program._replace(environment=variables) for variables in rank_variables(count)]
        return [self._server.start(one, out=_log(out, "out"), err=_log(out, "err")) for one in programs]

    def _new_folder(self) -> Path:
        self._numbers += 1
        return self._folder / f"{self.peer}-{self._numbers}"

    def _resume(self, out: Path, count: int) -> Outcome:
        for name in ("out", "err"):
            _log(out, name).unlink(missing_ok=True)
        result = self._finish(self.start(out, count), out)
        shutil.rmtree(out)
        expected = self.reference()
        if result.failed:
            return Outcome.ERROR
        same = all(expected.losses[step] == loss for step, loss in result.losses.items())
        return Outcome.EQUAL if same and result.digest == expected.digest else Outcome.OTHER

    def _finish(self, pids: list[int], out: Path) -> Result:
        began = time.monotonic()
        while any(map(lives, pids)) and time.monotonic() - began < HANG_SECONDS:
            failed = any(self._server.codes().get(pid) for pid in pids)
            if failed and time.monotonic() - began > WAIT_SECONDS:
                break
            time.sleep(_POLL_SECONDS)
        self._server.end_all()
        while any(pid not in self._server.codes() for pid in pids):
            time.sleep(_POLL_SECONDS)
        failed = any(self._server.codes()[pid] != 0 for pid in pids)
        text = _log(out, "out").read_text()
        losses = {int(step): float(loss) for step, loss in re.findall(r"^loss (\d+) (\S+)$", text, re.M)}
        digest = re.search(r"^digest (\S+)$", text, re.M)
        return Result(failed, losses, digest[1] if digest else None, _log(out, "err").read_text())

    def _wait_for_save(self, out: Path, number: int, pids: list[int]) -> None:
        """Wait until the save of this number has begun, as its folder or temporary file shows."""
        step = number * SAVE_EVERY
        patterns = (f"*-{step}", f"checkpoints/.checkpoint-{step}.*", f"checkpoints/checkpoint-{step}.*")
        while all(map(lives, pids)) and not any(next(out.glob(pattern), None) for pattern in patterns):
            time.sleep(_POLL_SECONDS / 4)

    def _end(self, pids: list[int]) -> float:
        began = time.monotonic()
        while any(map(lives, pids)) and time.monotonic() - began < WAIT_SECONDS:
            time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - began
        self._server.end_all()
        return seconds

    @staticmethod
    def _saves(out: Path) -> list[Path]:
        paths = [*out.glob("*-[0-9]*"), *out.glob("checkpoints/checkpoint-[0-9]*.safetensors")]
        return sorted(paths, key=lambda path: int(re.findall(r"\d+", path.name)[0]))


def _log(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name}.{name}.txt")


def run_mixture(server: Server, folder: Path) -> str:
    """What DCP loads of a step that was saved twice, the second time without one rank's part."""
    out = folder / "mixture"
    for phase in ("save", "load"):
        variables = rank_variables(RANKS)
        arguments = [phase, str(out / "step-1")]
        programs = [Program("campaigns.rank_peers.mixture", arguments, one) for one in variables]
        pids = [server.start(one, out=_log(out, "out"), err=_log(out, "err")) for one in programs]
        while any(pid not in server.codes() for pid in pids):
            time.sleep(_POLL_SECONDS)
    rows = re.search(r"^rows (.+)$", _log(out, "out").read_text(), re.M)
    return f"rows {rows[1]}, without an error" if rows else "nothing, with an error"


def rank_variables(count: int) -> list[dict[str, str]]:
    """What torchrun sets, for each rank; nothing for a single process."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
