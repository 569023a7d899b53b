"""All steps, in the order of their value: checks first, which run side by side, then figures, each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu import gradients, runs, saves, speed
from benchmarks.gpu.setting import Setting
from benchmarks.training.trainers import LIBRARIES

PACKED = {"dtype": "bfloat16", "packing": True}
#: Ways of training that must each be exact.
MODES: dict[str, dict[str, Any]] = {
    "bfloat16, packed": PACKED,
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "gradient checkpointing": {**PACKED, "gradient_checkpointing": True},
    "all weights": {"dtype": "bfloat16", "lora_rank": 0},
    "4 bit": {**PACKED, "quantization": "4bit"},
    "compiled": {**PACKED, "compile": True},
}
NEEDS = {"4 bit": ("bitsandbytes",)}
OURS = "distrust, packing"
PEERS = ("transformers + peft, flattened", "transformers + peft, liger", "TRL, packing")
VARIANTS = ("distrust, packing, 4 bit", "distrust, packing, not deterministic")
#: Of LoRA on 8B, and of all weights of 1B with their moments: bytes, tensors.
STATES = {"0.5 GB": (504_000_000, 1344), "14.8 GB": (14_800_000_000, 600)}


@dataclass(frozen=True)
class Step:
    """A process that measures, within its seconds; ``run`` imports torch only when it is called."""

    name: str  # group and case, as ``resume: float32``
    run: Callable[[Setting], dict[str, Any]]
    seconds: float = 60
    alone: bool = True  # nothing may run beside it
    libraries: tuple[str, ...] = ()  # that must be installed

    @property
    def missing(self) -> list[str]:
        """Libraries that are not installed."""
        return [library for library in self.libraries if find_spec(library) is None]

    @property
    def group(self) -> str:
        """The first half of the name."""
        return self.name.partition(":")[0]


check = partial(Step, seconds=170, alone=False)


def _check_modes(*modes: str) -> Iterator[Step]:
    for group, run in (("resume", runs.resume), ("determinism", gradients.repeat)):
        for mode in modes:
            options, libraries = MODES[mode], NEEDS.get(mode, ())
            name, seconds = f"{group}: {mode}", 600 if "compile" in options else 170
            yield check(name, partial(run, options=options), seconds=seconds, libraries=libraries)


def _checks() -> Iterator[Step]:
    yield from _check_modes(*(mode for mode in MODES if mode != "compiled"))
    yield check("overlap: 1 GB", partial(saves.overlap, is_gathered=True))
    yield check("overlap: 1 GB, tensor by tensor", partial(saves.overlap, is_gathered=False))
    for dtype in ("float32", "bfloat16"):
        yield check(f"padded: {dtype}", partial(gradients.compare_with_padded, dtype=dtype))
    yield check("tests: on the device", runs.tests, seconds=240, libraries=("pytest", "hypothesis"))


def _speeds(size: str, *trainers: str) -> Iterator[Step]:
    for name in trainers:
        run, libraries = partial(speed.train, size=size, trainer=name), tuple(LIBRARIES.get(name, ()))
        yield Step(f"speed {size}: {name}", run, 120, libraries=libraries)


def _stall(size: str) -> Step:
    nbytes, tensors = STATES[size]
    return Step(f"stall: {size}", partial(saves.stall, nbytes=nbytes, tensors=tensors))


def _files() -> Iterator[Step]:
    yield Step("ceilings: disk", saves.measure_disk)
    for name, library in saves.LIBRARIES.items():
        yield Step(f"files: {name}", partial(saves.round_trip, name=name), libraries=library.modules)


STEPS = (
    Step("ceilings: device", saves.measure_device),
    *_checks(),
    *_speeds("1B", OURS, *PEERS),
    Step("weighting: 1B", partial(speed.compare_weighting, size="1B")),
    _stall("0.5 GB"),
    # Before there is a model of 8B, which takes the room of its checkpoints.
    *_speeds("1B", "distrust, all weights, saves"),
    *_speeds("8B", OURS, *PEERS),
    *_files(),
    _stall("14.8 GB"),
    *_speeds("1B", *VARIANTS, "transformers + peft"),
    *_speeds("8B", VARIANTS[0]),
    *_check_modes("compiled"),  # takes minutes
)
GROUPS = list(dict.fromkeys(step.group for step in STEPS))


def select(text: str) -> list[Step]:
    """The group or step of that name; if there is none, all whose names begin with it.

    Raises:
        LookupError: there is none of these either.
    """
    named = [step for step in STEPS if text in (step.name, step.group)]
    if chosen := named or [step for step in STEPS if step.name.startswith(text)]:
        return chosen
    names = [*GROUPS, *(step.name for step in STEPS)]
    close = [name for name in names if text.lower() in name.lower()] or get_close_matches(text, names)
    raise LookupError(f"there is no such step; close to it: {', '.join(map(repr, close)) or 'none'}")
