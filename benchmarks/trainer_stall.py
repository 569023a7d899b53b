"""How long a save stops the Trainer of transformers: its own save, and DistrustCheckpoints.

    python -m benchmarks.trainer_stall
    python -m benchmarks.trainer_stall --repeats 9 --states 'LoRA, 20 MiB'

Both train the same model in this process, in turn. The stall is all the time that the loop spends in the
Trainer's ``_save_checkpoint`` or, for ours, in any of our methods: per-step work and waiting for a copy
included. Before a step that saves, the loop sleeps until the write before has surely ended: this is what a
usual interval between saves does. Ours then still verifies and syncs in the background, which takes processor
time from the steps; the Trainer's own save syncs nothing. The last save of a run, which blocks, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

OURS, THEIRS = "distrust", "the Trainer's own"
TOKENS = 16
SAVES = 4  # of a run; the first is not counted: files and buffers are new
STEPS_PER_SAVE = 2
WRITE_BYTES_PER_SECOND = 100e6  # slower than any disk here


@dataclass(frozen=True)
class State:
    """A model and what is trained of it."""

    name: str
    mib: float  # of weights and two moments
    lora_rank: int = 0  # all weights if 0
    width: int = 0  # of a new model; 0 for the bundled one

    def model(self) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        from distrust.bundled import MODEL

        if self.width:
            sizes = {"hidden_size": self.width, "intermediate_size": 3 * self.width}
            layers = {"num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 1024}
            return LlamaForCausalLM(LlamaConfig(**sizes, **layers))
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
        if not self.lora_rank:
            return base
        return get_peft_model(base, LoraConfig(r=self.lora_rank, target_modules="all-linear"))


STATES = (
    State("LoRA, 2 MiB", 2, lora_rank=12),
    State("LoRA, 20 MiB", 20, lora_rank=120),
    State("all weights, 22 MiB", 22),
    State("all weights, 250 MiB", 250, width=512),
)


class Stopwatch:
    """Sums the seconds spent in methods that it was told to watch; calls within another are counted once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def watch(self, owner: Any, name: str) -> None:
        """Replace a method of an object by one that is timed."""
        method = getattr(owner, name)

        def run(*arguments: Any, **options: Any) -> Any:
            with self._time():
                return method(*arguments, **options)

        setattr(owner, name, run)

    @contextmanager
    def _time(self) -> Iterator[None]:
        self._depth += 1
        began = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += time.perf_counter() - began


def measure(state: State, saver: str, folder: Path) -> dict[str, float]:
    """The stall of a save in a run of its own, in seconds, and the bytes of one checkpoint."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from distrust.integrations.transformers import DistrustCheckpoints

    stopwatch, marks = Stopwatch(), list[float]()
    pause = 0.1 + state.mib * 2**20 / WRITE_BYTES_PER_SECOND

    class Pause(TrainerCallback):  # type: ignore[misc]
        """Waits before a step that saves, and notes the stall so far."""

        def on_step_begin(self, args: Any, trained: Any, control: Any, **_: Any) -> None:
            if trained.global_step % STEPS_PER_SAVE == STEPS_PER_SAVE - 1:
                time.sleep(pause)
                marks.append(stopwatch.seconds)

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=(SAVES + 1) * STEPS_PER_SAVE, save_steps=STEPS_PER_SAVE,
        save_strategy="steps", save_total_limit=2, report_to=[], per_device_train_batch_size=1,
        disable_tqdm=True, logging_strategy="no", use_cpu=True,
    )  # fmt: skip
    tokens = list(range(TOKENS))
    rows = [{"input_ids": tokens, "labels": tokens}] * (STEPS_PER_SAVE * (SAVES + 1) + 1)
    trainer = Trainer(state.model(), arguments, train_dataset=rows, callbacks=[Pause()])
    if saver == OURS:
        DistrustCheckpoints(folder / "checkpoints").attach(trainer)
        (callback,) = (
            each
            for each in trainer.callback_handler.callbacks
            if type(each).__module__.startswith("distrust.")
        )
        for event in (
            "on_epoch_begin",
            "on_step_begin",
            "on_substep_end",
            "on_pre_optimizer_step",
            "on_optimizer_step",
            "on_step_end",
        ):
            stopwatch.watch(callback, event)
    stopwatch.watch(trainer, "_maybe_log_save_evaluate")  # nothing is logged or evaluated
    trainer.train()
    # The first save made its files and buffers. Between two marks there are one save and the steps around it.
    stalls = [later - earlier for earlier, later in pairwise(marks[1:])]
    return {"seconds": statistics.median(stalls), "bytes": _size(folder, saver)}


def _size(folder: Path, saver: str) -> float:
    if saver == OURS:
        return max(path.stat().st_size for path in folder.glob("checkpoints/*.safetensors"))
    checkpoint = max(folder.glob("checkpoint-*"), key=os.path.getmtime)
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def compare(
    states: Sequence[State], repeats: int, directory: Path | None, say: Callable[[str], None]
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Measure both savers in turn; figures by state and saver."""
    measured: dict[str, dict[str, list[dict[str, float]]]] = {}
    for state in states:
        figures = measured[state.name] = {OURS: [], THEIRS: []}
        for repeat in range(repeats):
            for saver in (OURS, THEIRS) if repeat % 2 else (THEIRS, OURS):
                with tempfile.TemporaryDirectory(dir=directory) as folder:
                    figures[saver].append(measure(state, saver, Path(folder)))
            say(f"{state.name}: {repeat + 1} of {repeats}")
    return measured


def print_table(measured: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    print("| trained | MiB | the Trainer's own save, ms | distrust, ms | ratio, median | range |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, figures in measured.items():
        our_stalls, trainer_stalls = (
            [each["seconds"] for each in figures[saver]] for saver in (OURS, THEIRS)
        )
        ratios = [trainer / our for our, trainer in zip(our_stalls, trainer_stalls, strict=True)]
        size = statistics.median(each["bytes"] for each in figures[OURS]) / 2**20
        cells = [
            name,
            f"{size:.1f}",
            *(f"{1000 * statistics.median(each):.1f}" for each in (trainer_stalls, our_stalls)),
        ]
        cells += [f"{statistics.median(ratios):.1f}", f"{min(ratios):.1f} to {max(ratios):.1f}"]
        print(f"| {' | '.join(cells)} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer_stall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [state.name for state in STATES]
    parser.add_argument(
        "--states", nargs="+", choices=names, default=names, metavar="STATE", help=", ".join(names)
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of both, in turn; default: 5")
    parser.add_argument(
        "--directory", type=Path, help="on the disk to measure; default: the temporary folder"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    options = parser.parse_args(arguments)
    states = [state for state in STATES if state.name in options.states]
    measured = compare(states, options.repeats, options.directory, lambda text: print(text, file=sys.stderr))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))
    print(f"{options.repeats} repeats, {SAVES - 1} saves each, {os.cpu_count()} cores")
    print_table(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
