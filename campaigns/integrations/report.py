"""The counts of each subject and keeper, as a Markdown table."""

from __future__ import annotations

from collections import Counter

from campaigns.integrations.protocol import OURS, THEIRS
from campaigns.integrations.trials import Outcome, Trial

KEEPERS: dict[str, str] = {OURS: "distrust", THEIRS: "the Trainer's own resume"}


class Results:
    def __init__(self) -> None:
        self._trials: dict[tuple[str, str], list[Trial]] = {}  # by subject and keeper

    def add(self, subject: str, keeper: str, trial: Trial) -> None:
        self._trials.setdefault((subject, keeper), []).append(trial)

    def markdown(self, about: str) -> str:
        rows = [
            ["run", "kept by", "runs", "kills", "resumes", *(outcome.value for outcome in Outcome)],
            ["---", "---", *["---:"] * (3 + len(Outcome))],
            *(self._row(subject, keeper, trials) for (subject, keeper), trials in self._trials.items()),
        ]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"{about}\n\n{table}\n"

    @staticmethod
    def _row(subject: str, keeper: str, trials: list[Trial]) -> list[str]:
        outcomes = Counter(trial.outcome for trial in trials)
        sums = [len(trials), sum(trial.kills for trial in trials), sum(trial.resumes for trial in trials)]
        counts = [*map(str, sums), *(str(outcomes[outcome] or "") for outcome in Outcome)]
        return [subject, KEEPERS[keeper], *counts]
