"""The command ``distrust eval``: the losses of a trained model on data."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distrust.checkpoint.catalog import resolve
from distrust.cli.arguments import NEWEST_INTACT, add_checkpoint_options, attributes, parser, print_json
from distrust.reporting.display import printable


def main(arguments: list[str]) -> int:
    """Evaluate a trained model."""
    options = _options(arguments)
    resolve(options.target)  # a misspelt name fails before the slow imports below

    from distrust import engines
    from distrust.reporting.console import ConsoleReporter
    from distrust.training.data_sources import read_evaluation
    from distrust.training.evaluation import evaluate
    from distrust.training.events import Preparing

    file, checkpoint = engines.read_checkpoint(options.target, step=options.step, best=options.best)
    replaced = attributes(options, "eval_data", "eval_split", "source_column", "batch_size")
    changes: dict[str, Any] = {name: value for name, value in replaced.items() if value is not None}
    if "eval_data" in changes or "eval_split" in changes:
        changes["eval_fraction"] = 0.0  # evaluate on the given data, not on a share of the training data
    config = replace(engines.config_of(file, model=options.model), **changes)
    trained_on = engines.fingerprint_of(file, "data")  # to recognize evaluation on training data
    with ConsoleReporter(log_every=1, stream=sys.stderr) as console:  # standard output is for the result

        def report(task: str, completed: int, total: int) -> None:
            console(Preparing(task, completed, total))

        data = read_evaluation(config, report=report)
        engine = engines.engine_of(file, checkpoint, model=options.model)
        measure = partial(evaluate, data=data, config=config, trained_on=trained_on)
        results = {"checkpoint": measure(engine)}
        if options.compare:
            del engine  # one model in memory at a time
            base = engines.create_engine(replace(config, compile=False))
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


def _print(metrics: dict[str, float]) -> None:
    print(f"{metrics['examples']:,} examples, {metrics['tokens']:,} trained tokens")
    rows = [("all", "loss"), ("weighted", "weighted_loss")]
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
        description="Prints cross-entropy in nats per token, plain and weighted by provenance, and "
        "perplexity, in total and by source class. Columns have the names that the run used.",
        examples=[
            "distrust eval runs/train --data held-out.jsonl",
            "distrust eval runs/train --data held-out.jsonl --best --compare",
            "distrust eval runs/train --data held-out.jsonl --source-column status --json",
        ],
    )
    arg.add_argument("target", type=Path, help=NEWEST_INTACT)
    data = "what to evaluate on; default: the evaluation data of the run"
    arg.add_argument("--data", nargs="+", dest="eval_data", metavar="DATA", help=data)
    split = "split of a hub dataset, or of a folder whose files name splits"
    arg.add_argument("--split", dest="eval_split", metavar="SPLIT", help=split)
    arg.add_argument("--source-column", help="column of the source class; default: that of the run")
    arg.add_argument("--batch-size", type=int, help="examples per batch; default: that of the run")
    add_checkpoint_options(arg)
    arg.add_argument("--compare", action="store_true", help="also evaluate the base model")
    arg.add_argument("--json", action="store_true", help="print one object")
    return arg.parse_args(arguments)
