"""The command ``distrust eval``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distrust.checkpoint.catalog import resolve
from distrust.cli.arguments import TARGET, add_choice_of_checkpoint, parser, print_json
from distrust.reporting.display import printable


def main(arguments: list[str]) -> int:
    """Tell the losses of a trained model on data."""
    options = _options(arguments)
    resolve(options.target)  # a wrong name is told before the frameworks are loaded

    from distrust import engines, evaluation
    from distrust.reporting.console import ConsoleReporter
    from distrust.training.events import Preparing

    file, checkpoint = engines.read_checkpoint(options.target, step=options.step, best=options.best)
    given = {name: value for name, value in _given(options).items() if value is not None}
    if "eval_data" in given or "eval_split" in given:
        given["eval_fraction"] = 0.0
    config = replace(engines.config_of(file, model=options.model), **given)
    trained_on = engines.fingerprint_of(file, "data")
    with ConsoleReporter(log_every=1, stream=sys.stderr) as console:

        def report(what: str, done: int, total: int) -> None:
            console(Preparing(what, done, total))

        sources = evaluation.read(config, report=report)
        engine = engines.engine_of(file, checkpoint, model=options.model)
        measured = partial(
            evaluation.evaluate, sources=sources, config=config, trained_on=trained_on, report=report
        )
        found = {"checkpoint": measured(engine)}
        if options.compare:
            del engine  # one model in memory at a time
            untrained = engines.create_engine(replace(config, compile=False))
            found = {"base": measured(untrained), **found}
    if options.json:
        print_json({"path": str(file.path), "step": file.step, **found})
        return 0
    print(printable(f"step {file.step}: {file.path}"))
    for name, metrics in found.items():
        if options.compare:
            print(f"{name}:")
        _print(metrics)
    return 0


def _print(metrics: dict[str, float]) -> None:
    print(f"{metrics['examples']:,} examples, {metrics['tokens']:,} learned tokens")
    rows = [("", "loss"), ("weighted", "weighted_loss")]
    rows += [(name[10:], name[5:]) for name in metrics if name.startswith("eval_loss/")]
    width = max(len(printable(shown)) for shown, _ in rows)
    print(f"{'':{width}}  {'loss':>8}  {'perplexity':>10}")
    for shown, name in rows:
        loss, perplexity = metrics[f"eval_{name}"], metrics[f"eval_{name.replace('loss', 'perplexity', 1)}"]
        print(f"{printable(shown) or 'all':{width}}  {loss:>8.4f}  {perplexity:>10.4g}")


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "eval_data": tuple(options.data) if options.data else None,
        "eval_split": options.split,
        "source_column": options.source_column,
        "batch_size": options.batch_size,
    }


def _options(arguments: list[str]) -> argparse.Namespace:
    arg = parser(
        "eval",
        description=(
            "Cross-entropy in nats a token, plain and weighted by provenance, and perplexity, of all and of "
            "each source class, too. Columns are those of the run."
        ),
        examples=[
            "distrust eval runs/train --data held-out.jsonl",
            "distrust eval runs/train --data held-out.jsonl --best --compare",
            "distrust eval runs/train --data held-out.jsonl --source-column status --json",
        ],
    )
    arg.add_argument("target", type=Path, help=f"{TARGET}; of several, the newest that is whole")
    arg.add_argument("--data", nargs="+", help="what to evaluate on; default: what the run was evaluated on")
    arg.add_argument("--split", help="of a data set of the hub, or of a folder whose files name splits")
    arg.add_argument("--source-column", help="column of the source class; default: that of the run")
    arg.add_argument("--batch-size", type=int, help="examples of a batch; default: that of the run")
    add_choice_of_checkpoint(arg)
    arg.add_argument("--compare", action="store_true", help="show the base model's losses beside it")
    arg.add_argument("--json", action="store_true", help="print one object")
    return arg.parse_args(arguments)
