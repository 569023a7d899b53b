"""What tokenizing conversations costs, beside ``datasets.map`` with ``apply_chat_template``.

    python -m benchmarks.tokenizing
    python -m benchmarks.tokenizing --conversations 10000 --repeats 5 --tokenizer runs/tokenizers/qwen3
    git worktree add /tmp/before COMMIT && python -m benchmarks.tokenizing --before /tmp/before

Conversations of two to six turns, random words with a fixed seed, as JSON Lines. Each measurement is a fresh
process with an empty cache; the candidates take turns, and each repeat begins with another one. The clock
runs from the file to the tokens on disk (reading and checking included), after the imports:

- distrust: a run of the public trainer up to its first step; it locates the trained tokens as well;
- datasets.map: ``load_dataset`` and ``map`` over single records, without the trained tokens;
- before: as distrust, from another working tree.

Ratios are taken within a repeat: they are steadier than the times on a shared machine. Without --tokenizer,
it is a byte-level BPE that is trained on the words, with a template in the style of ChatML.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.driver import ROOT

OURS, THEIRS, BEFORE = "distrust", "datasets.map", "before"
VOCABULARY = 4000
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words(rng: random.Random) -> list[str]:
    syllables = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(5000)]


def conversations(count: int) -> Iterator[list[dict[str, str]]]:
    rng = random.Random(0)
    vocabulary = words(rng)
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(5, 80))) + "." for _ in range(5000)]
    for _ in range(count):
        roles = ("user", "assistant") * rng.randint(1, 3)
        yield [{"role": role, "content": rng.choice(texts)} for role in roles]


def write_data(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in conversations(count))


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((turn["content"] for turns in conversations(500) for turn in turns), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def measure(name: str, data: Path, tokenizer_folder: Path, folder: Path) -> dict[str, float]:
    """Measures one candidate, in this process; ``folder`` is empty."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return (measure_datasets if name == THEIRS else measure_distrust)(data, tokenizer, folder)


def measure_datasets(data: Path, tokenizer: Any, folder: Path) -> dict[str, float]:
    import datasets

    def tokenize(record: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.apply_chat_template(record["messages"])["input_ids"]}

    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder))
    tokenized = rows.map(tokenize, remove_columns=rows.column_names)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": sum(len(row["input_ids"]) for row in tokenized)}


def measure_distrust(data: Path, tokenizer: Any, folder: Path) -> dict[str, float]:
    from distrust import DistrustTrainer, TrainConfig
    from distrust.testing.toy_engine import ToyEngine
    from distrust.training.events import Event, RunStarted

    engine: Any = ToyEngine()
    engine.tokenizer = tokenizer
    figures: dict[str, float] = {}

    def stop_at_start(event: Event) -> None:
        if isinstance(event, RunStarted):
            figures.update(seconds=time.perf_counter() - began, tokens=event.tokens)
            trainer.stop()

    config = TrainConfig(
        model="toy",
        data=str(data),
        out=str(folder / "run"),
        cache_dir=str(folder / "cache"),
        weighting="off",
        max_length=1 << 20,
        max_steps=1,
    )
    trainer = DistrustTrainer(config, engine=engine, observers=[stop_at_start])
    began = time.perf_counter()
    trainer.train()
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all candidates in turn, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", type=int, default=100_000, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="a tokenizer with a chat template")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a working tree to compare with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        name, *paths = options.child
        print(json.dumps(measure(name, *map(Path, paths))))
        return 0
    trees = {OURS: ROOT, THEIRS: ROOT} | ({BEFORE: options.before.resolve()} if options.before else {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "data.jsonl", options.conversations)
        if options.tokenizer is None:
            make_tokenizer(folder / "tokenizer")
        tokenizer = options.tokenizer or folder / "tokenizer"
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
        for repeat in range(options.repeats):
            order = list(trees)
            for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
                measured[name].append(_measure_apart(name, trees[name], folder / "data.jsonl", tokenizer))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))
    print(f"{options.conversations:,} conversations, {options.repeats} repeats, {os.cpu_count()} cores")
    print_table(measured)
    return 0


def _measure_apart(name: str, tree: Path, data: Path, tokenizer: Path) -> dict[str, float]:
    """One measurement in a process of its own."""
    path = os.pathsep.join((str(tree / "src"), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.tokenizing", "--child", name]
        command += [str(path) for path in (data, tokenizer.resolve(), folder)]
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{name}: {(process.stderr.strip().splitlines() or ['ended'])[-1]}")
    figures: dict[str, float] = json.loads(process.stdout.strip().splitlines()[-1])
    return figures


def print_table(measured: dict[str, list[dict[str, float]]]) -> None:
    print("| | seconds: min | median | max | time / distrust: median | min to max |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    own_seconds = [figures["seconds"] for figures in measured[OURS]]
    for name, repeats in measured.items():
        seconds = [figures["seconds"] for figures in repeats]
        ratios = [peer / our for peer, our in zip(seconds, own_seconds, strict=True)]
        cells = [f"{value:.2f}" for value in (min(seconds), statistics.median(seconds), max(seconds))]
        if name != OURS:
            cells += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
        else:
            cells += ["", ""]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
