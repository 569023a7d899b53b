"""Memory of a long run, with and without resets: a plot, and whether both end in the same state.

    python scripts/memory_run.py
    python scripts/memory_run.py --steps 3000 --reload-every 500 --picture memory.png

Three trainings of the bundled model, each in a fresh process, with the same config except for the resets:

- plain: nothing leaks; growth here comes from the allocator and the libraries;
- leaking: a hook on the model keeps a copy of its outputs, like a forgotten debugging aid. It uses no random
  number and changes no bit, so the run must end like the plain one; only its memory grows;
- reset: the same leak, with --reload-every.

Memory is what is resident at the end of each step. After each reset it is taken one step later, with the
memory of a step. Exit code 1 if a reset leaves more than `--tolerance` above the level after the first one,
or if the three runs do not end with the same state digest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrust.checkpoint.memory import resident_bytes

MIB = 2**20
TITLES = {
    "leaking": "a leak of {leak:g} MiB a step",
    "reset": "the same leak, memory reset every {every} steps",
    "plain": "no leak, no reset",
}
COLOURS = {"leaking": "#d55e00", "reset": "#0072b2", "plain": "#888888"}


def train(out: Path, *, steps: int, leak: float, reload_every: int | None) -> dict[str, Any]:
    """One training, in this process; returns resident bytes by step, the resets, and the digest."""
    from distrust import DistrustTrainer, TrainConfig
    from distrust.engines.torch.engine import TorchEngine
    from distrust.training.events import MemoryReset, StepEnded

    resident: list[int] = []
    resets: list[int] = []

    def watch(event: Any) -> None:
        if isinstance(event, StepEnded):
            resident.append(resident_bytes())
        elif isinstance(event, MemoryReset):
            resets.append(event.step)

    def leaking(config: TrainConfig) -> TorchEngine:
        engine = TorchEngine(config)
        if leak:
            leaked: list[Any] = []  # held by the hook, which the model holds

            def keep(_module: Any, _inputs: Any, outputs: Any) -> None:
                logits = outputs.logits.detach().flatten()
                item_count = int(leak * MIB) // logits.element_size()
                leaked.append(logits.repeat(1 + item_count // len(logits))[:item_count].clone())

            engine.model.register_forward_hook(keep)
        return engine

    config = TrainConfig(
        out=str(out),
        max_steps=steps,
        batch_size=4,
        lora_dropout=0.1,
        save_every=0,
        threads=1,
        reload_every=reload_every,
    )
    ended = DistrustTrainer(config, engine=leaking, observers=[watch]).train()
    return {"resident": resident, "resets": resets, "digest": ended.state_digest}


def draw(runs: Mapping[str, dict[str, Any]], titles: Mapping[str, str], path: Path) -> None:
    """Plot resident memory over the steps of each run.

    Args:
        runs: name -> what :func:`train` returned.
        titles: name -> label in the legend.
        path: of the PNG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10}):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for name, title in titles.items():
            levels = [level / MIB for level in runs[name]["resident"]]
            axes.plot(range(1, len(levels) + 1), levels, color=COLOURS[name], label=title, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("resident memory, MiB")
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
        figure.savefig(path, dpi=150)


def main() -> int:
    """Run the trainings, draw the plot, and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--reload-every", type=int, default=150)
    parser.add_argument("--leak", type=float, default=0.5, help="MiB a step")
    parser.add_argument("--tolerance", type=float, default=0.05, help="as a share of the first level")
    parser.add_argument("--picture", type=Path, default=Path("docs/memory.png"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(train(Path(options.child), **json.loads(sys.stdin.read()))))
        return 0
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"leak": 0.0, "reload_every": None},
        "leaking": {"leak": options.leak, "reload_every": None},
        "reset": {"leak": options.leak, "reload_every": options.reload_every},
    }
    with tempfile.TemporaryDirectory(prefix="distrust-") as folder:
        runs = {
            name: _train_in_subprocess(Path(folder, name), steps=options.steps, **kind)
            for name, kind in kinds.items()
        }
    titles = {
        name: title.format(leak=options.leak, every=options.reload_every) for name, title in TITLES.items()
    }
    draw(runs, titles, options.picture)
    for name, run in runs.items():
        first, last = run["resident"][0] / MIB, run["resident"][-1] / MIB
        print(f"{name:8} {run['digest']}  {first:.0f} MiB at step 1, {last:.0f} at step {options.steps}")
    levels = [runs["reset"]["resident"][step] for step in runs["reset"]["resets"]]  # one step later
    ratios = [level / levels[0] for level in levels]
    for step, level, ratio in zip(runs["reset"]["resets"], levels, ratios, strict=True):
        print(f"reset at step {step}: {level / MIB:.1f} MiB, {ratio:.3f} of the first one's")
    same = len({run["digest"] for run in runs.values()}) == 1
    print("one state digest" if same else "NOT one state digest")
    return 0 if same and max(ratios) <= 1 + options.tolerance else 1


def _train_in_subprocess(out: Path, **options: Any) -> dict[str, Any]:
    """:func:`train` in a fresh process."""
    process = subprocess.run(
        [sys.executable, __file__, "--child", str(out)],
        input=json.dumps(options),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())
