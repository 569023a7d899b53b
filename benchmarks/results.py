"""What was measured: medians, and ratios within a repeat."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from benchmarks.states import Spec

NOT_INSTALLED = "not installed"


@dataclass(frozen=True, slots=True)
class Figure:
    """The name of a number.

    Attributes:
        case: its name.
        name: of the figure.
    """

    case: str
    name: str = "seconds"


#: One of several figures: the smallest that was measured.
Figures = Figure | tuple[Figure, ...]


@dataclass(slots=True)
class Results:
    """Figures by state, case, name and repeat, and the reasons for missing ones.

    Attributes:
        samples: state -> case -> figure -> repeat -> value.
        failures: state -> case -> reason.
    """

    samples: dict[str, dict[str, dict[str, dict[int, float]]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, spec: Spec, repeat: int, case: str, figures: dict[str, float]) -> None:
        """Add what one turn measured."""
        of_case = self.samples.setdefault(spec.text, {}).setdefault(case, {})
        for name, value in figures.items():
            of_case.setdefault(name, {})[repeat] = value

    def fail(self, spec: Spec, case: str, reason: str) -> None:
        """Note why a case has no figures."""
        self.failures.setdefault(spec.text, {})[case] = reason

    def repeats(self, spec: Spec, figure: Figure) -> dict[int, float]:
        """Every value, by repeat."""
        return self.samples.get(spec.text, {}).get(figure.case, {}).get(figure.name, {})

    def values(self, spec: Spec, figure: Figure) -> list[float]:
        """Every value."""
        return list(self.repeats(spec, figure).values())

    def median(self, spec: Spec, figure: Figure) -> float | None:
        """The median, if there is any."""
        values = self.values(spec, figure)
        return statistics.median(values) if values else None

    def least(self, spec: Spec, figures: Figures) -> Figure | None:
        """The figure with the smallest median, if any was measured."""
        choices = (figures,) if isinstance(figures, Figure) else figures
        medians = {choice: self.median(spec, choice) for choice in choices}
        measured = {choice: value for choice, value in medians.items() if value is not None}
        return min(measured, key=lambda choice: measured[choice]) if measured else None

    def ratios(self, spec: Spec, above: Figures, below: Figures) -> list[float]:
        """``above / below`` within each repeat."""
        over, under = self.least(spec, above), self.least(spec, below)
        if over is None or under is None:
            return []
        bottoms = self.repeats(spec, under)
        return [
            top / bottoms[repeat] for repeat, top in self.repeats(spec, over).items() if bottoms.get(repeat)
        ]

    def ratio(self, spec: Spec, above: Figures, below: Figures) -> float | None:
        """The median of the ratios."""
        ratios = self.ratios(spec, above, below)
        return statistics.median(ratios) if ratios else None
