"""The command ``python -m campaigns.integrations``: which subjects are disturbed, and the reports."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from campaigns import integrations
from campaigns.campaign import Campaign, Case, parser, require, run
from campaigns.integrations.protocol import OURS, PROGRAM
from campaigns.integrations.report import Results
from campaigns.integrations.subjects import SUBJECTS
from campaigns.integrations.trials import Bench, Outcome, Subject, random_instants
from campaigns.session import Forks

PACKAGES = ("transformers", "trl", "peft", "accelerate", "torch", "lightning", "mlx-lm")


def forks(imports: Sequence[str]) -> Forks:
    return Forks(PROGRAM, imports, name="a fork")


def main(arguments: Sequence[str] | None = None) -> int:
    cli = parser(integrations.__doc__, writes=True, faults=["generators"])
    cli.add_argument("--subjects", default="", help="only those whose name this matches")
    cli.add_argument("--ours-only", action="store_true", help="leave the Trainer's own resume out")
    cli.add_argument("--markdown", type=Path, help="write the table into this file")
    return run("integrations", cli, _body, cases=len(SUBJECTS), arguments=arguments)


def _body(campaign: Campaign) -> None:
    options, results = campaign.options, Results()
    subjects = [subject for subject in SUBJECTS if re.search(options.subjects, subject.name)]
    require(bool(subjects), "--subjects matches none")
    imports = dict.fromkeys(name for subject in subjects for name in subject.imports)
    directory = Path(tempfile.mkdtemp(prefix="integrations-", dir=options.directory))
    benches: dict[str, Bench] = {}
    try:
        with forks([*imports]) as launcher:
            for case in campaign.cases():
                subject = subjects[case.number % len(subjects)]
                if subject.name not in benches:
                    folder = directory / str(len(benches))
                    broken = options.fault is not None
                    benches[subject.name] = Bench(subject, launcher, folder, broken=broken)
                _one_case(campaign, case, subject, benches[subject.name], results)
    finally:
        if options.markdown:
            options.markdown.write_text(results.markdown(_about(campaign)))
    shutil.rmtree(directory)  # not after a counterexample: its folder is evidence


def _one_case(campaign: Campaign, case: Case, subject: Subject, bench: Bench, results: Results) -> None:
    instants = random_instants(case.rng, bench.seconds, bench.events)
    for keeper in subject.keepers:
        if campaign.options.ours_only and keeper != OURS:
            continue
        trial = bench.run(case.number, keeper, instants)
        results.add(subject.name, keeper, trial)
        campaign.count(f"kills, kept by {keeper}", trial.kills)
        campaign.count(f"resumes, kept by {keeper}", trial.resumes)
        campaign.count(f"runs kept by {keeper}: {trial.outcome.value}")
        if trial.outcome is Outcome.STOPPED:
            campaign.count(f"  {trial.differences[0].split(':')[0]}")
        violation = f"{subject.name}: {trial.outcome.value}: {', '.join(trial.differences)}"
        require(keeper != OURS or trial.outcome in (Outcome.EQUAL, Outcome.NOT_RESUMED), violation)


def _about(campaign: Campaign) -> str:
    shown = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"Seed {campaign.options.seed}. {shown}."


if __name__ == "__main__":
    sys.exit(main())
