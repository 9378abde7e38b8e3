"""A sheet of figures: what was measured in every round, what is required, and what the reference takes."""

import statistics
from dataclasses import dataclass, field


@dataclass(slots=True)
class Figure:
    """A row: `values` in `unit`, one a round. Without `at_least` and `at_most` it is shown only."""

    name: str
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    reference: float | None = None
    values: list[float] = field(default_factory=list)

    def line(self) -> str:
        """Median, spread and requirement, with "short" where the median does not meet it."""
        median = statistics.median(self.values)
        spread = f"{_short(min(self.values))} to {_short(max(self.values))}" if len(self.values) > 1 else ""
        required, verdict = "", ""
        if self.at_least is not None:
            required, verdict = f">= {_short(self.at_least)}", "pass" if median >= self.at_least else "short"
        elif self.at_most is not None:
            required, verdict = f"<= {_short(self.at_most)}", "pass" if median <= self.at_most else "short"
        reference = "" if self.reference is None else _short(self.reference)
        return (
            f"{self.name:44} {_short(median):>7} {self.unit:6} {spread:>18}  {required:>9} {verdict:5}  {reference:>7}"
        ).rstrip()


class Sheet:
    """Figures under headings, in the order in which they first came."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Figure]] = {}

    def add(self, heading: str, figure: Figure, value: float) -> None:
        """One more value of a figure; only its name counts once it is there."""
        self._rows.setdefault(heading, {}).setdefault(figure.name, figure).values.append(value)

    def show(self) -> None:
        """Print everything."""
        for heading, figures in self._rows.items():
            print(f"\n{heading:44} {'median':>7} {'':6} {'min to max':>18}  {'required':>15}  {'reference':>7}")
            for figure in figures.values():
                print(figure.line())


def _short(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
