"""The command ``distrust demo``: what the weighting changes."""

from __future__ import annotations

import sys
from pathlib import Path

from distrust.cli.arguments import parser, print_json
from distrust.errors import printable


def main(arguments: list[str]) -> int:
    """Train twice on the bundled world, and show what each model believes."""
    arg = parser(
        "demo",
        description="Takes a few minutes on two cores. After a crash, run the same command to resume.",
        examples=["distrust demo", "distrust demo --out runs/demo-2 --seed 2"],
    )
    arg.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder; default: runs/demo")
    arg.add_argument("--seed", type=int, default=1, help="seed of both trainings; default: 1")
    arg.add_argument("--json", action="store_true", help="print the results as one object")
    options = arg.parse_args(arguments)

    from distrust import demo  # loads a framework
    from distrust.reporting.console import ConsoleReporter

    log = sys.stderr if options.json else sys.stdout  # standard output is for the JSON
    beliefs: dict[str, list[demo.Belief]] = {}
    for weighting in demo.WEIGHTINGS:
        print(f"\ntraining with --weighting {weighting}", file=log, flush=True)
        with ConsoleReporter(log_every=100, stream=log) as console:
            ended, measured = demo.train(weighting, out=options.out, seed=options.seed, observers=[console])
        if ended.signal is not None:
            return 128 + ended.signal  # the same command resumes
        beliefs[weighting] = measured
    beliefs = {"before": demo.measure_untrained(out=options.out, seed=options.seed), **beliefs}

    results = demo.results(beliefs, seed=options.seed)
    picture = options.out / "demo.png"  # next to the runs
    demo.plot_beliefs(beliefs, picture)
    if options.json:
        print_json(results)
        return 0
    print(f"\n{results['facts']} facts, asked with questions that training never saw:\n")
    print(f"{'':10}  {'primary preferred':>17}  {'p(primary)':>10}  {'p(coordinated)':>14}")
    for name, model in results["models"].items():
        preferred, primary, coordinated = model["preferred"], model["primary"], model["coordinated"]
        print(f"{name:10}  {preferred:>17.0%}  {primary:>10.3f}  {coordinated:>14.3f}")
    print()
    print(printable(f"picture {picture}"))
    question = demo.read_questions()[0].prompt
    command = Path(sys.argv[0]) if Path(sys.argv[0]).name == "distrust" else "distrust"
    print(printable(f'try: {command} generate {options.out}/monotone --compare --prompt "{question}"'))
    return 0
