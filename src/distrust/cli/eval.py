"""The command ``distrust eval``: the losses of a trained model on data."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from distrust.cli import targets
from distrust.cli.arguments import NEWEST_INTACT, add_checkpoint_options, attributes, parser, print_json
from distrust.config import TrainConfig
from distrust.errors import DataError, printable, quote_untrusted
from distrust.option_values import BUNDLED, MAX_RECORD_BYTES, as_names


def main(arguments: list[str]) -> int:
    """Evaluate a trained model."""
    options = _options(arguments)
    targets.checks(options.target)  # a misspelt name fails before the slow imports below

    from distrust import engines
    from distrust.reporting.console import ConsoleReporter
    from distrust.training.data_sources import read_evaluation
    from distrust.training.evaluation import evaluate
    from distrust.training.events import Preparing

    file, checkpoint = engines.read_checkpoint(options.target, step=options.step, best=options.best)
    names = ("eval_data", "eval_split", "source_column", "batch_size", "max_record_bytes", "cache_dir")
    replaced = attributes(options, *names)
    device = attributes(options, "device")
    changes: dict[str, Any] = device | {name: v for name, v in replaced.items() if v is not None}
    if "eval_data" in changes or "eval_split" in changes:
        changes["eval_fraction"] = 0.0  # evaluate on the given data, not on a share of the training data
    config = replace(engines.config_of(file, model=options.model), **changes)
    if "eval_data" not in changes:
        _introduce_data(config)
    trained_on = engines.fingerprint_of(file, "data")  # to recognize evaluation on training data
    with ConsoleReporter(log_every=1, stream=sys.stderr) as console:  # standard output is for the result

        def report(task: str, completed: int, total: int) -> None:
            console(Preparing(task, completed, total))

        with engines.base_model_errors(file, config.model, overridden=options.model is not None):
            data = read_evaluation(config, report=report)  # loads the model's tokenizer
        engine = engines.engine_of(file, checkpoint, model=options.model, changes=device)
        measure = partial(evaluate, data=data, config=config, trained_on=trained_on)
        results = {"checkpoint": measure(engine)}
        if options.compare:
            del engine  # one model in memory at a time
            base = engines.create_engine(config)
            results = {"base": measure(base), **results}
    if options.json:
        print_json({**attributes(file, "path", "step"), **results})
        return 0
    print(printable(f"step {file.step}: {file.path}"))
    for name, metrics in results.items():  # base first, if compared
        if options.compare:
            print(f"{name}:")
        _print(metrics)
    return 0


def _introduce_data(config: TrainConfig) -> None:
    """Name the data that the checkpoint chooses: it may be a stranger's, so only files are opened."""
    names = as_names(config.eval_data)
    if not names and (config.eval_split or config.eval_fraction):
        names = as_names(config.data)
    for name in names:
        if name != BUNDLED and not (os.path.isfile(name) or os.path.isdir(name)):
            raise DataError(
                f"{quote_untrusted(name)}: the checkpoint names it as the evaluation data, and it is no file "
                "or folder here; give --data, which may also name a pipe or a dataset of the hub"
            )
        line = f"evaluating on {quote_untrusted(name)}, as the checkpoint says"
        print(printable(line), file=sys.stderr)


def _print(metrics: dict[str, float]) -> None:
    print(f"{metrics['examples']:,} examples, {metrics['tokens']:,} trained tokens")
    rows = [("all", "loss")]
    rows += [("weighted", "weighted_loss")] if "eval_weighted_loss" in metrics else []
    classes = [name.removeprefix("eval_loss/") for name in metrics if name.startswith("eval_loss/")]
    rows += [(printable(name), f"loss/{name}") for name in classes]
    width = max(len(label) for label, _ in rows)  # names of classes vary
    print(f"{'':{width}}  {'loss':>8}  {'perplexity':>10}")
    for label, name in rows:
        loss, perplexity = metrics[f"eval_{name}"], metrics[f"eval_{name.replace('loss', 'perplexity', 1)}"]
        print(f"{label:{width}}  {loss:>8.4f}  {perplexity:>10.4g}")


def _options(arguments: list[str]) -> argparse.Namespace:
    arg = parser(
        "eval",
        description="Prints cross-entropy in nats per token, plain and, if the run is weighted, weighted by "
        "provenance, and perplexity, in total and by source class. Columns have the names that the run used.",
        examples=[
            "distrust eval runs/train --data held-out.jsonl",
            "distrust eval runs/train --data held-out.jsonl --best --compare",
            "distrust eval runs/train --data held-out.jsonl --source-column status --json",
        ],
    )
    arg.add_argument("target", type=targets.target, help=NEWEST_INTACT)
    data = "what to evaluate on; default: the evaluation data of the run"
    arg.add_argument("--data", nargs="+", dest="eval_data", metavar="DATA", help=data)
    split = "split of a hub dataset, or of a folder whose files name splits"
    arg.add_argument("--split", dest="eval_split", metavar="SPLIT", help=split)
    arg.add_argument("--source-column", help="column of the source class; default: that of the run")
    arg.add_argument("--batch-size", type=int, help="examples per batch; default: that of the run")
    limit = "a larger record is an error; default: %(default)s (16 MiB)"
    arg.add_argument("--max-record-bytes", type=int, metavar="N", default=MAX_RECORD_BYTES, help=limit)
    cache = "folder for tokenized data; default: $DISTRUST_CACHE, or distrust in the user's cache folder"
    arg.add_argument("--cache-dir", metavar="FOLDER", help=cache)
    add_checkpoint_options(arg, device=True)
    arg.add_argument("--compare", action="store_true", help="also evaluate the base model")
    arg.add_argument("--json", action="store_true", help="print one object")
    return arg.parse_args(arguments)
