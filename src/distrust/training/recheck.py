"""Finds a machine that computes wrongly: a step is made twice from the same state, and all bits are compared.

If they differ, ``rewind`` makes the step again until two attempts agree and the frozen weights have the
checksums of the start; changed ones are loaded again. ``stop`` saves the state before the step. Nothing is
compared between rechecks. Memory: two states on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distrust.checkpoint import arrays, tree
from distrust.checkpoint.format import tensor_hasher
from distrust.checkpoint.memory import allocate
from distrust.config import TrainConfig
from distrust.contract import Engine, EngineState
from distrust.data import MicroBatch
from distrust.errors import ConfigError, NonFiniteLoss, WrongResult, shorten, warn
from distrust.ranks import Ranks, gather_json
from distrust.training.events import StepEnded
from distrust.training.step import StepRunner

MAX_ATTEMPTS, LINES_LISTED = 5, 10
Outcome = StepEnded | NonFiniteLoss  # of a step: a flipped bit may make the loss infinite


def require_repeatable(config: TrainConfig, engine: Engine) -> None:
    """Raise ConfigError if steps are to be repeated that need not have the same bits again."""
    reasons = {
        f"with --shard {config.shard} no rank has the whole state": config.shard != "none",
        "with --compile a layer may be compiled again": config.compile and engine.framework == "torch",
        "an operation has no deterministic kernel": engine.environment().get("deterministic") is False,
    }
    for reason in [reason for reason, holds in reasons.items() if holds and config.recheck_every]:
        raise ConfigError(f"--recheck-every {config.recheck_every}: a step cannot be repeated: {reason}")


class HostCopy:
    """A copy of an engine's state in host memory."""

    def __init__(self, engine: Engine) -> None:
        state = engine.state()
        sections = {"model": state.model, "optimizer": state.optimizer, "rng": state.rng}
        self._skeletons, by_label = tree.flatten(sections, is_array=arrays.is_array)
        self._descriptions, (flats, _) = arrays.describe(by_label), arrays.flat_arrays(by_label)
        ends = np.cumsum([flat.nbytes for flat in flats.values()])
        memory = allocate(int(ends[-1]))
        arrays.fill(memory, 0, [*flats.values()])
        parts = np.split(np.frombuffer(memory, np.uint8), ends)  # the last one pads the memory
        self._data = dict(zip(flats, parts[:-1], strict=True))
        self.digests = self._digest()

    def load(self, engine: Engine) -> bool:
        """Put the engine into this state; returns whether the copy still is what was copied."""

        def rebuild(label: str) -> Any:
            return arrays.from_host(self._data[label], *self._descriptions[label], framework=engine.framework)

        names = ("model", "optimizer", "rng")
        engine.load_state(EngineState(*(tree.unflatten(self._skeletons[name], rebuild) for name in names)))
        return self._digest() == self.digests

    def _digest(self) -> dict[str, str]:
        """The digest of each tensor; the rest of each section as text."""
        digests = {
            label: f"digest {tensor_hasher(all_cores=True).update(data.data).hexdigest(8)}"
            for label, data in self._data.items()
        }
        return digests | {name: repr(node) for name, node in self._skeletons.items()}


def _describe(engine: Engine, outcome: Outcome) -> dict[str, str]:
    """All bits of a state, and of the outcome of the step before it."""
    if not isinstance(outcome, StepEnded):
        return HostCopy(engine).digests | {"error": str(outcome)}
    numbers = {name: repr(getattr(outcome, name)) for name in ("loss", "weighted_loss", "gradient_norm")}
    return HostCopy(engine).digests | numbers


def _compare(earlier: dict[str, str], later: dict[str, str]) -> list[str]:
    """A line for each tensor and number that differs."""
    pairs = {name: (earlier.get(name, "absent"), later.get(name, "absent")) for name in {**earlier, **later}}
    return [f"{name}: {shorten(a)} and {shorten(b)}" for name, (a, b) in pairs.items() if a != b]


@dataclass(kw_only=True)
class Rechecker:
    """Makes the steps of a run, those that are due at least twice."""

    steps: StepRunner
    ranks: Ranks
    save: Callable[[], None]  # makes the state before the step durable
    good_step: int  # until it the frozen weights are known to be right

    def __post_init__(self) -> None:
        self._config, engine = self.steps.data.config, self.steps.engines.current
        if self._config.recheck_every:
            self._frozen, self._environment = engine.frozen_checksums(), engine.environment()

    def run(self, step: int, batches: Sequence[MicroBatch]) -> StepEnded:
        """As :meth:`StepRunner.run`; WrongResult if the run is to stop, or no two attempts agree."""
        begin, every = time.perf_counter(), self._config.recheck_every
        if not every or step % every:
            return self.steps.run(step, batches)
        if findings := self._find_changed_weights():
            advice = f"go on from a checkpoint of step {self.good_step} or before"
            text = f"later steps than {self.good_step} may be wrong: {advice}, with --from-step and --branch"
            raise _wrong(step, text, findings)
        outcome, findings = self._repeat(step, batches)
        if findings:
            error = _wrong(step, "two attempts agree now, and the run goes on with them", findings)
            warn(str(error).splitlines())
        self.good_step = step
        if not isinstance(outcome, StepEnded):
            raise outcome
        return replace(outcome, seconds=time.perf_counter() - begin)

    def _repeat(self, step: int, batches: Sequence[MicroBatch]) -> tuple[Outcome, list[str]]:
        """Make the step until two attempts agree; returns the outcome, and how other attempts differed."""
        engines, origin = self.steps.engines, HostCopy(self.steps.engines.current)
        findings, attempts = list[str](), list[dict[str, str]]()
        while True:
            try:
                outcome: Outcome = self.steps.run(step, batches)
            except NonFiniteLoss as error:
                outcome = error
            attempt = _describe(engines.current, outcome)
            changed = self._find_changed_weights() if attempts else []
            comparisons = [self._gather(_compare(each, attempt)) for each in attempts]
            if not changed and [] in comparisons:
                return outcome, findings
            findings += changed + (comparisons[-1] if comparisons else [])
            attempts.append(attempt)
            is_final = len(attempts) == MAX_ATTEMPTS or (findings and self._config.on_mismatch == "stop")
            if changed and not is_final and engines.can_rebuild:
                engines.rebuild(self._config).restore_environment(self._environment)
                self.steps.memory.restart(engines.current)  # loading is no step
            self.steps.saver.wait_copied()  # an attempt that ended early has not waited
            if not origin.load(engines.current):
                raise _wrong(step, "the copy of the state before it changed in the host's memory", findings)
            if is_final:
                self.save()
                durable = self.steps.saver.describe_durable()
                raise _wrong(step, f"{durable}. On another machine the same command goes on", findings)

    def _find_changed_weights(self) -> list[str]:
        checksums = self.steps.engines.current.frozen_checksums()
        names = [name for name, checksum in self._frozen.items() if checksums[name] != checksum]
        return self._gather([f"{name}: this frozen weight has changed" for name in names])

    def _gather(self, lines: list[str]) -> list[str]:
        """The lines of all ranks: so all of them decide the same."""
        gathered = gather_json(self.ranks, lines)
        if len(gathered) == 1:
            return lines
        return [f"{self.ranks.describe(i)}: {line}" for i, each in enumerate(gathered) for line in each]


def _wrong(step: int, consequence: str, findings: list[str]) -> WrongResult:
    omitted = [f"and {len(findings) - LINES_LISTED} more"] if len(findings) > LINES_LISTED else []
    lines = [f"step {step}: this machine computes wrongly; {consequence}", *findings[:LINES_LISTED], *omitted]
    return WrongResult(lines, step=step, differences=findings)
