"""The counts by saver, accident and outcome: a Markdown table, and a picture, a panel for each accident."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from campaigns.peers.accidents import ALL, COMMON, Accident
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
    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[Outcome]] = {}

    def add(self, cell: Cell, outcome: Outcome) -> None:
        self.counts.setdefault((cell.subject.name, cell.accident.name), Counter())[outcome] += 1

    def of(self, subject: Subject, accident: Accident) -> Counter[Outcome]:
        return self.counts.get((subject.name, accident.name), Counter())

    def subjects(self, accidents: Iterable[Accident] = ALL) -> list[Subject]:
        accidents = list(accidents)
        return [one for one in SUBJECTS if any(self.of(one, accident) for accident in accidents)]

    def accidents(self) -> list[Accident]:
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


INK, QUIET = "#222222", "#70757a"
#: Colour and label of each. From blue, where nothing is lost, to red and black, where it is; grey where a
#: person must act.
STYLES = {
    Outcome.NOTHING_LOST: ("#0072b2", "nothing lost"),
    Outcome.FELL_BACK_SAYING: ("#7db8da", "resumed from the older one, and said so"),
    Outcome.FELL_BACK: ("#c9dfec", "resumed from the older one, silently"),
    Outcome.FOUND: ("#c8ccd0", "stopped with an error that names it"),
    Outcome.DIED: ("#8f959b", "died of another error"),
    Outcome.CRASHED: ("#5c6166", "crashed or hung"),
    Outcome.BEGAN_ANEW: ("#e69f00", "found none"),
    Outcome.OTHER_VALUES_SAYING: ("#f0a37a", "resumed with other values, with a warning"),
    Outcome.OTHER_VALUES: ("#d55e00", "resumed with other values, unnoticed"),
    Outcome.ALL_LOST: ("#222222", "all lost, the older one too"),
}
DARK = {Outcome.NOTHING_LOST, Outcome.CRASHED, Outcome.DIED, Outcome.OTHER_VALUES, Outcome.ALL_LOST}
#: A narrower share has no room for its number.
LEAST_SHARE_WITH_NUMBER = 0.04


def draw(results: Results, path: Path, *, about: str) -> None:
    """Draw the results into a PNG; ``about`` says on which machine and with which versions."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    style = {
        "font.size": 10, "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "xtick.color": QUIET, "ytick.color": INK, "text.color": INK,
    }  # fmt: skip
    with mpl.rc_context(style):
        canvas = Canvas(figsize=(14.5, 8.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        canvas.suptitle(
            "What is left after an accident to the newest checkpoint: share of the trials",
            x=0.01, ha="left", fontsize=14, fontweight="bold",
        )  # fmt: skip
        for axes, accident in zip(canvas.subplots(2, 3).flat, COMMON, strict=False):
            rows = [(one.name, one, results.of(one, accident)) for one in results.subjects([accident])]
            _panel(axes, accident.name, accident.note, rows)
        _panel(canvas.axes[-1], "trainers only", "a fixed part", _rows_of_trainers(results))
        occurring = {outcome for outcomes in results.counts.values() for outcome in outcomes}
        # Below the panels, outside of the layout.
        canvas.legend(
            handles=[Patch(color=STYLES[x][0], label=STYLES[x][1]) for x in Outcome if x in occurring],
            loc="upper left", bbox_to_anchor=(0.0, 0.0), ncols=4, frameon=False, fontsize=9.5,
        )  # fmt: skip
        canvas.text(0.99, -0.1, about, ha="right", va="top", fontsize=7.5, color=QUIET)
        canvas.savefig(path, format="png", dpi=130, bbox_inches="tight", pad_inches=0.15, facecolor="white")


def _rows_of_trainers(results: Results) -> list[tuple[str, Subject, Any]]:
    return [
        (f"{accident.name}\n{one.name}", one, results.of(one, accident))
        for accident in ALL
        if accident not in COMMON
        for one in results.subjects([accident])
    ]


def _panel(axes: Any, title: str, note: str, rows: list[tuple[str, Subject, Any]]) -> None:
    axes.set_title(title, pad=22)
    axes.annotate(
        note, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=QUIET
    )
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    for tick, (_, subject, _) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if subject.ours else "normal")
    if not rows:
        axes.text(0.5, 0.5, "not tried in this run", ha="center", va="center", color=QUIET)
        return
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    for position, (_, _, outcomes) in enumerate(rows):
        _bar(axes, position, outcomes)


def _bar(axes: Any, position: int, outcomes: Any) -> None:
    begin, total = 0.0, outcomes.total()
    for outcome in Outcome:
        share = outcomes[outcome] / total
        if not share:
            continue
        axes.barh(position, share, left=begin, height=0.7, color=STYLES[outcome][0], edgecolor="white")
        if share >= LEAST_SHARE_WITH_NUMBER:
            colour = "white" if outcome in DARK else INK
            axes.text(
                begin + share / 2, position, str(outcomes[outcome]), ha="center", va="center", fontsize=9,
                color=colour,
            )  # fmt: skip
        begin += share
