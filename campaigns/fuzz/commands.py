"""The commands that the campaign runs on hostile folders: those that need no framework, and those that do.

Without a framework, training is done by the toy engine, figures are not drawn (that takes seconds), and a
stand-in of Weights & Biases uses the network as the real one does offline: not at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from campaigns.fuzz import imports, older
from campaigns.fuzz.workplace import CODE, Command, Workplace
from distrust.cli import main
from distrust.testing.models import write_records
from distrust.testing.toy_engine import ToyEngine

#: Of a command that loads and runs a model.
MODEL_SECONDS = 20.0
_PICTURE = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
_RUN_TARGETS = ("run", "cache")
_CHECKPOINT = "run/checkpoints/checkpoint-2.safetensors"
_TRAIN = (
    "train",
    "--data",
    "data/records.jsonl",
    "--cache-dir",
    "cache",
    "--batch-size",
    "2",
    "--save-every",
    "2",
)


def _train(*arguments: str, out: str = "run", steps: int = 4) -> tuple[str, ...]:
    return (*_TRAIN, "--out", out, "--max-steps", str(steps), *arguments)


#: Commands that need no framework, on the folders that :func:`build_light` makes.
LIGHT: dict[str, Command] = {
    "ls": Command(("ls", "run")),
    "ls of runs": Command(("ls", ".", "--json")),
    "show": Command(("show", "run", "--tensors")),
    "show of a file": Command(("show", _CHECKPOINT, "--json")),
    "verify": Command(("verify", "run")),
    "diff": Command(("diff", "run", "copy")),
    "prune": Command(("prune", "run", "--keep-last", "1"), ("run",)),
    "prune of damaged files": Command(("prune", "run", "--damaged"), ("run",)),
    "prune of a directory": Command(("prune", "run/checkpoints", "--keep-last", "1"), ("run/checkpoints",)),
    "report": Command(("report", "run"), ("run",)),
    "report elsewhere": Command(("report", "run", "--out", "out/page.html"), ("out",)),
    "plot": Command(("plot", "run"), ("run",)),
    "plot of several": Command(("plot", "run", "copy", "--out", "out/plot.svg"), ("out",)),
    "weigh": Command(("weigh", "data")),
    "weigh and write": Command(
        (
            *["weigh", "data/records.jsonl", "--table", "table.toml", "--out", "out/weighed.jsonl"],
            *["--plot", "out/weights.png", "--force"],
        ),
        ("out",),
    ),
    "convert": Command(("convert", "older", "--to", "imported"), ("imported",)),
    "convert a file": Command(("convert", "older/checkpoint-1", "--to", "imported"), ("imported",)),
    "train": Command(_train(out="new"), ("new", "cache")),
    "train: resume": Command(_train(steps=6), _RUN_TARGETS),
    "train: another folder of data": Command(
        (
            *[
                "train",
                "--config",
                "config.toml",
                "--data",
                "data",
                "--out",
                "new",
                "--cache-dir",
                "cache",
                "--max-steps",
                "2",
            ],
        ),
        ("new", "cache"),
    ),
    "train: branch": Command(
        _train("--from-step", "2", "--branch", "branch", steps=6), ("branch", *_RUN_TARGETS)
    ),
    "train: dashboards": Command(_train("--report-to", "tensorboard", "wandb", steps=6), _RUN_TARGETS),
    "demo": Command(("demo", "--out", "out/demo"), ("out",)),
    **{
        f"{verb}: help": Command((verb, "--help")) for verb in ("demo", "train", "generate", "export", "eval")
    },
}


def light_workplace(directory: Path) -> Workplace:
    return Workplace(directory, LIGHT, build_light)


def build_light(folder: Path) -> None:
    """Make a run, its data and settings, and older checkpoints, in the current folder."""
    # What the hub's library reads once: whatever looks like a dataset of the hub is not looked up.
    os.environ["HF_HUB_OFFLINE"] = "1"
    importlib.import_module("datasets")
    _write_settings(folder)
    _parse_once()
    _replace_slow_parts()
    write_records(folder / "data" / "records.jsonl")
    _require_success(_train("--report-to", "tensorboard", "wandb"))
    shutil.copytree(folder / "run", folder / "copy")
    _require_success(("report", "run"))
    _require_success(("plot", "run"))
    (folder / "older").mkdir()
    older.write_folder(folder / "older" / "checkpoint-1")


def _write_settings(folder: Path) -> None:
    """The current folder is another user's: its settings of libraries must not count."""
    (folder / "matplotlibrc").write_text(f"axes.prop_cycle: {CODE}\ntext.usetex: True\nbackend: no such\n")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "settings").write_text("[default]\nbase_url = https://stranger.example\n")
    (folder / "sitecustomize.py").write_text(CODE)
    for name in ("data", "out"):
        (folder / name).mkdir()
    (folder / "table.toml").write_text("[missing]\nrank = 0.5\ncitation_count = 0\n")
    (folder / "config.toml").write_text("max-steps = 2\nsave-every = 2\nbatch-size = 2\n".replace("-", "_"))


def _parse_once() -> None:
    """Parse each line of options once, which takes longer than the training of the toy engine; never sync."""
    from distrust.cli import train

    os.fsync = lambda fd: None  # for power cuts, which other campaigns make
    parse = train._parse
    parse_once = functools.cache(lambda line: parse([*line]))
    train._parse = lambda arguments: (
        parse(arguments) if "--config" in arguments else parse_once(tuple(arguments))
    )


def _replace_slow_parts() -> None:
    from distrust import demo, engines
    from distrust.ranks import SINGLE
    from distrust.reporting import figures, weights_figure

    def draw(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"picture")

    class Run(SimpleNamespace):
        def log(self, *_: Any, **__: Any) -> None: ...
        def finish(self, *_: Any, **__: Any) -> None: ...

    engines.create_engine = lambda config, *, objects=None, ranks=SINGLE: ToyEngine()
    figures.draw = lambda *_, **__: None
    figures.render = lambda *_, **__: _PICTURE
    weights_figure.plot_weights = draw
    beliefs = [demo.Belief("fact", 0.5, 0.25, 0.1)]
    ended: Any = SimpleNamespace(signal=None)
    demo.train = lambda *_, **__: (ended, beliefs)
    demo.measure_untrained = lambda **_: beliefs
    wandb: Any = ModuleType("wandb")
    wandb.init = lambda **_: Run(starting_step=0)
    wandb.Settings = type("Settings", (), {"settings_workspace": None})
    sys.modules["wandb"] = wandb


def _require_success(arguments: tuple[str, ...]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(list(arguments))
    if code != 0:
        raise AssertionError(f"exit code {code}: distrust {' '.join(arguments)}")


def _train_model(*arguments: str, out: str = "new", steps: int = 1) -> tuple[str, ...]:
    options = ("--model", "model", "--lora-rank", "2", "--threads", "1", "--device", "cpu")
    return _train(*options, *arguments, out=out, steps=steps)


#: Commands that load a model, on the folders that :func:`build_models` makes.
MODELS: dict[str, Command] = {
    "train a model": Command(_train_model(), ("new", "cache"), MODEL_SECONDS),
    "train on turns": Command(
        ("train", "--data", "turns.jsonl", *_train_model()[3:]), ("new", "cache"), MODEL_SECONDS
    ),
    "train: resume a model": Command(_train_model(out="run", steps=3), _RUN_TARGETS, MODEL_SECONDS),
    "eval": Command(("eval", "run", "--data", "data/records.jsonl"), ("cache",), MODEL_SECONDS),
    "generate": Command(
        ("generate", "run", "--prompt", "salt", "--max-new-tokens", "2", "--compare"), (), MODEL_SECONDS
    ),
    **{
        f"export: {form}": Command(
            ("export", "run", "--to", "out/export", "--format", form), ("out",), MODEL_SECONDS
        )
        for form in ("adapter", "mlx", "merged")
    },
    "export: state": Command(
        ("export", "run", "--to", "out/state.safetensors", "--format", "state"), ("out",), MODEL_SECONDS
    ),
    "convert an adapter": Command(
        ("convert", "adapter", "--to", "imported", "--model", "model"), ("imported",), MODEL_SECONDS
    ),
    "convert a trainer's folder": Command(
        ("convert", "trainer", "--to", "imported", "--model", "model"), ("imported",), MODEL_SECONDS
    ),
}
_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def models_workplace(directory: Path) -> Workplace:
    return Workplace(directory, MODELS, build_models)


def build_models(folder: Path) -> None:
    """Make a model, a run of it, and adapters and checkpoints of other programs, in the current folder."""
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", OMP_NUM_THREADS="1", DISTRUST_CACHE="cache"
    )
    _write_settings(folder)
    fixtures = imports.make(folder / "fixtures")
    shutil.move(fixtures.base, folder / "model")
    shutil.move(fixtures.kinds["peft"], folder / "adapter")
    shutil.move(fixtures.kinds["trainer"], folder / "trainer")
    shutil.rmtree(folder / "fixtures")
    for name in ("adapter", "trainer"):
        config = folder / name / "adapter_config.json"
        config.write_text(config.read_text().replace(str(fixtures.base), "model"))
    settings = folder / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": _TEMPLATE}))
    write_records(folder / "data" / "records.jsonl")
    turns = [{"role": "user", "content": "salt?"}, {"role": "assistant", "content": "melts"}]
    record = {"messages": turns, "authority_weight": 0.1, "provenance_entropy": 1.0}
    (folder / "turns.jsonl").write_text(4 * f"{json.dumps(record)}\n")
    _parse_once()
    _require_success(_train_model(out="run", steps=2))
