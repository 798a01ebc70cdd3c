"""Tables of texts, in Markdown: curves of results against context length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pose_megatron.evaluation.results import Curve, lengths_of


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first column says what a row is, and its title may be empty."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        first, *others = self.header
        lines = [
            "| " + " | ".join([first, *others]).lstrip() + " |",
            "|---|" + "---:|" * len(others),
        ]
        rows = ([" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in self.rows)
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def values(curves: Sequence[Curve], metric: str) -> Table:
    """The metric itself."""
    forms = {"passkey": "{:.0%}", "ruler": "{:.1%}", "seconds": "{:.3f}", "memory": "{:,.0f}"}
    form = forms.get(metric, "{:.2f}")
    return by_length(curves, lambda row: form.format(row[metric]))


def by_length(curves: Sequence[Curve], cell: Callable[[dict], str]) -> Table:
    """One row per curve, one column per context length; below each curve its tasks.

    Args:
        cell: what stands for a result.
    """
    lengths = lengths_of(curves)
    lines = []
    for curve in curves:
        rows = {curve.label: curve.points}
        if curve.tasks:
            rows = {f"{curve.label}, mean of {len(curve.tasks)}": curve.points}
            rows |= {f"{curve.label}, {task}": row for task, row in curve.tasks.items()}
        for label, row in rows.items():
            lines.append([label, *(cell(row[n]) if n in row else "" for n in lengths)])
    return Table(["", *(f"{n:,}" for n in lengths)], lines)
