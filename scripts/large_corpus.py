"""Does a corpus larger than memory train in constant memory? Generates one, trains on it, watches the
process.

    python scripts/large_corpus.py --gib 0.25 4 --picture docs/large_corpus.png

For each size: a JSON Lines corpus of synthetic text (fixed seed, documents of about 5 KiB), then a few
hundred steps of a small model on it in a process of its own. Its memory is read from /proc while it checks,
tokenizes and trains: RssAnon is what it holds, RssFile what it has mapped from files, which the system can
reclaim. The tokenizer is a small one of words, so that most of the time is not spent in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30
PHASES = ("start", "checking", "loading", "tokenizing", "training")
COLOURS = {
    "start": "0.85",
    "checking": "#9ecae1",
    "loading": "0.7",
    "tokenizing": "#fdae6b",
    "training": "#a1d99b",
}
WORDS = 4000


@dataclass
class Measured:
    """Memory of a run on a corpus of one size, over time."""

    gib: float
    examples: int = 0
    seconds: list[float] = field(default_factory=list)
    anonymous: list[float] = field(default_factory=list)
    mapped: list[float] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)

    def peak(self, phase: str, of: list[float]) -> float:
        return max((value for value, at in zip(of, self.phases, strict=True) if at == phase), default=0.0)

    def seconds_in(self, phase: str) -> float:
        at = [second for second, name in zip(self.seconds, self.phases, strict=True) if name == phase]
        return at[-1] - at[0] if at else 0.0


def words() -> list[str]:
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
    return sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3 * WORDS)})[:WORDS]


def write_corpus(path: Path, nbytes: int) -> int:
    """Write documents of random paragraphs; returns their number."""
    rng = random.Random(1)
    vocabulary = words()
    weights = [1 / (rank + 3) for rank in range(WORDS)]
    paragraphs = [" ".join(rng.choices(vocabulary, weights, k=160)) + "." for _ in range(5000)]
    written = count = 0
    with path.open("w", encoding="utf-8", buffering=MIB) as file:
        while written < nbytes:
            count += 1
            record = {
                "text": f"document {count} " + " ".join(rng.choices(paragraphs, k=4)),
                "authority_weight": round(0.99 * rng.random(), 3),
                "provenance_entropy": round(4 * rng.random(), 3),
            }
            written += file.write(json.dumps(record) + "\n")
    return count


def write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<eos>", ".", *map(str, range(10)), "document", *words()]
    tokens = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
        )
    ).save_pretrained(folder)


def train(model: str, data: str, out: str, cache: str, steps: str) -> None:
    """The watched process: trains, and prints which phase starts."""
    from distrust import DistrustTrainer, TrainConfig
    from distrust.training.events import Event, Preparing, RunStarted

    phases = ["start"]

    def say(event: Event) -> None:
        phase = phases[-1]
        if isinstance(event, RunStarted):
            phase = "training"
        elif isinstance(event, Preparing) and event.task.split()[0] in PHASES:
            phase = event.task.split()[0]
        if phase != phases[-1]:
            phases.append(phase)
            print(phase, flush=True)

    config = TrainConfig(
        model=model,
        data=data,
        out=out,
        cache_dir=cache,
        max_steps=int(steps),
        batch_size=4,
        lora_rank=4,
        save_every=100,
        keep_last=1,
    )
    DistrustTrainer(config, observers=[say]).train()


def watch(process: subprocess.Popen[str], measured: Measured) -> None:
    phase = ["start"]

    def listen() -> None:
        assert process.stdout is not None
        phase.extend(line.strip() for line in process.stdout)

    threading.Thread(target=listen, daemon=True).start()
    began = time.monotonic()
    while process.poll() is None:
        with contextlib.suppress(OSError, KeyError):
            lines = Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines()
            status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
            anonymous, mapped = int(status["RssAnon"][0]) / 1024, int(status["RssFile"][0]) / 1024
            measured.seconds.append(time.monotonic() - began)
            measured.anonymous.append(anonymous)
            measured.mapped.append(mapped)
            measured.phases.append(phase[-1])
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the training failed with {process.returncode}")


def measure(gib: float, folder: Path, steps: int) -> Measured:
    measured = Measured(gib)
    data, model = folder / "data.jsonl", folder / "model"
    began = time.monotonic()
    measured.examples = write_corpus(data, int(gib * GIB))
    print(f"{gib:g} GiB: {measured.examples} examples made in {time.monotonic() - began:.0f} s", flush=True)
    write_model(model)
    arguments = [str(model), str(data), str(folder / "run"), str(folder / "cache"), str(steps)]
    process = subprocess.Popen(
        [sys.executable, __file__, "--train", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        watch(process, measured)
    finally:
        process.kill()
        process.wait()
    return measured


def table(runs: list[Measured]) -> str:
    lines = [
        "| corpus | examples | phase | seconds | peak RssAnon | peak RssFile |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {run.gib:g} GiB | {run.examples} | {phase} | {run.seconds_in(phase):.0f} "
        f"| {run.peak(phase, run.anonymous):.0f} MiB | {run.peak(phase, run.mapped):.0f} MiB |"
        for run in runs
        for phase in PHASES
    ]
    if len(runs) > 1:
        first, last = runs[0], runs[-1]
        grown = last.peak("training", last.anonymous) - first.peak("training", first.anonymous)
        per_example = grown * MIB / (last.examples - first.examples)
        lines += ["", f"In training, {per_example:.0f} bytes of RssAnon more for each example more."]
    return "\n".join(lines)


def picture(runs: list[Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(runs), figsize=(5.5 * len(runs), 3.6), sharey=True, squeeze=False
    )
    for axes, run in zip(all_axes[0], runs, strict=True):
        for phase in PHASES:
            at = [second for second, name in zip(run.seconds, run.phases, strict=True) if name == phase]
            if at:
                axes.axvspan(at[0], at[-1], color=COLOURS[phase], label=phase, lw=0)
        axes.plot(run.seconds, run.anonymous, color="black", label="RssAnon")
        axes.plot(run.seconds, run.mapped, color="black", ls=":", label="RssFile (reclaimable)")
        axes.set(title=f"a corpus of {run.gib:g} GiB", xlabel="seconds", ylabel="MiB")
    top = max(max(*run.anonymous, *run.mapped) for run in runs)
    all_axes[0][0].set_ylim(0, 1.1 * top)
    figure.legend(*all_axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=7, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, nargs="+", default=[0.25, 4.0], help="sizes of the corpora")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="where they are made; what is made is deleted again")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--train", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(*arguments.train)
        return
    runs = []
    for gib in arguments.gib:
        folder = Path(tempfile.mkdtemp(prefix="large-corpus-", dir=arguments.folder))
        try:
            runs.append(measure(gib, folder, arguments.steps))
        finally:
            shutil.rmtree(folder)
    print(table(runs))
    if arguments.picture:
        picture(runs, arguments.picture)


if __name__ == "__main__":
    main()
