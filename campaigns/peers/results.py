"""The counts: by saver, accident and outcome, and as a Markdown table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from campaigns.peers.accidents import ALL, Accident
from campaigns.peers.all_subjects import SUBJECTS
from campaigns.peers.outcomes import Outcome
from campaigns.peers.subjects import Subject
from campaigns.peers.trials import Cell

NOTES = (
    "Each cell: how often, of so many trials. *Stopped, naming it*: resuming raised an error that names the "
    "damage; *died otherwise*: an error that does not. *Older one*: it resumed from the checkpoint before. "
    "*Other values*: it resumed with values that were never saved (a trainer: to other losses and weights). "
    "*All lost*: nothing is left to resume from, the older checkpoint included. A missing file: one of the "
    "checkpoint's files at random; for a saver of one file, the whole checkpoint."
)


class Results:
    """The outcomes of every trial so far."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[Outcome]] = {}

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Count a trial."""
        self.counts.setdefault((cell.subject.name, cell.accident.name), Counter())[outcome] += 1

    def of(self, subject: Subject, accident: Accident) -> Counter[Outcome]:
        """The outcomes of a cell."""
        return self.counts.get((subject.name, accident.name), Counter())

    def subjects(self, accidents: Iterable[Accident] = ALL) -> list[Subject]:
        """Those that were tried."""
        accidents = list(accidents)
        return [one for one in SUBJECTS if any(self.of(one, accident) for accident in accidents)]

    def accidents(self) -> list[Accident]:
        """Those that were tried."""
        return [accident for accident in ALL if any(self.of(one, accident) for one in SUBJECTS)]


def markdown(results: Results, versions: Mapping[str, str], about: str) -> str:
    """A row for each saver, a column for each accident."""
    accidents = results.accidents()
    rows = [
        ["", *(accident.name for accident in accidents)],
        ["---"] * (len(accidents) + 1),
        *([_name(one), *(_cell(results.of(one, accident)) for accident in accidents)]
          for one in results.subjects()),
    ]  # fmt: skip
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    shown = ", ".join(f"{package} {version}" for package, version in versions.items())
    return "\n\n".join([f"{about}. {shown}.", NOTES, table]) + "\n"


def _name(subject: Subject) -> str:
    return f"**{subject.name}**" if subject.ours else subject.name


def _cell(outcomes: Counter[Outcome]) -> str:
    if not outcomes:
        return ""
    parts = [f"{outcome.value} {outcomes[outcome]}" for outcome in Outcome if outcomes[outcome]]
    return f"{', '.join(parts)} of {outcomes.total()}"
