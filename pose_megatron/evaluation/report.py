"""Curves of results, as results.py reads them, in a Markdown table and a plot."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from pose_megatron.evaluation.results import Curve


def _lengths_of(curves: Sequence[Curve]) -> list[int]:
    return sorted({length for curve in curves for length in curve.points})


def markdown(curves: Sequence[Curve], metric: str) -> str:
    """One row per curve, one column per context length."""
    lengths, form = _lengths_of(curves), "{:.0%}" if metric == "passkey" else "{:.2f}"
    lines = [
        "| | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---|" + "---:|" * len(lengths),
    ]
    for curve in curves:
        row, label = curve.points, curve.label.replace("|", "\\|")
        cells = [form.format(row[n][metric]) if n in row else "" for n in lengths]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(
    curves: Sequence[Curve],
    metric: str,
    path: Path,
    window: int | None = None,
    title: str | None = None,
) -> None:
    """Draws the curves; passkeys also by depth in the haystack.

    Args:
        path: PNG.
        window: training window L in tokens, to be marked.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if metric == "passkey":
        columns = min(3, len(curves) if len(curves) != 4 else 2)
        rows = -(-len(curves) // columns)
        figure = pyplot.figure(
            figsize=(max(7, 3.2 * columns), 4 + 2.6 * rows), dpi=150, layout="constrained"
        )
        above, below = figure.subfigures(2, squeeze=False, height_ratios=(4, 2.6 * rows)).ravel()
        axes = above.subplots()
        _draw_depths(below, curves, rows, columns)
    else:
        figure = pyplot.figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        axes = figure.subplots()
    _draw_curves(axes, curves, metric, window)
    if title:
        axes.set_title(title, fontsize=10)
    figure.savefig(path)


def _draw_curves(axes, curves: Sequence[Curve], metric: str, window: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve, marker in zip(curves, "osD^vP*X<>" * len(curves), strict=False):
        row, label = curve.points, textwrap.fill(curve.label, 60)
        lengths = sorted(row)
        values = [row[n][metric] for n in lengths]
        (line,) = axes.plot(lengths, values, marker=marker, label=label, linewidth=1.8)
        if metric == "passkey":
            low, high = ([row[n][side] for n in lengths] for side in ("low", "high"))
            axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    lengths = _lengths_of(curves)
    values = [row[metric] for curve in curves for row in curve.points.values()]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    if metric == "passkey":
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    else:
        axes.set_yscale("log")
        ticks = [t * 10**e for e in range(-1, 7) for t in (1, 1.5, 2, 3, 4, 5, 7)]
        ticks = [t for t in ticks if min(values) * 0.9 <= t <= max(values) * 1.1]
        if len(ticks) < 3:
            finite = [value for value in values if math.isfinite(value)] or [1]
            ticks = list(MaxNLocator(5, min_n_ticks=3).tick_values(min(finite), max(finite)))
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    if window:
        axes.axvline(window, color="grey", linestyle=":", linewidth=1)
        at, side = (0.02, "bottom") if metric == "passkey" else (0.98, "top")
        axes.text(
            window,
            at,
            " training window",
            color="grey",
            va=side,
            fontsize=8,
            transform=axes.get_xaxis_transform(),
        )
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("passkeys found" if metric == "passkey" else metric)
    axes.grid(alpha=0.3)
    if all(curve.label == curve.name for curve in curves):
        axes.legend(fontsize=8)
    else:  # long labels would hide the curves
        axes.figure.legend(fontsize=8, loc="outside lower center")


def _draw_depths(figure, curves: Sequence[Curve], rows: int, columns: int) -> None:
    """A map for each curve: context length across, depth of the needle down."""
    lengths, bins = _lengths_of(curves), 10
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes in grid[len(curves) :]:
        axes.set_axis_off()
    for axes, curve in zip(grid, curves, strict=False):
        cells = [
            [
                [
                    found
                    for depth, found, _ in curve.points.get(n, {}).get("answers", ())
                    if min(int(depth * bins), bins - 1) == i
                ]
                for n in lengths
            ]
            for i in range(bins)
        ]
        share = [
            [sum(cell) / len(cell) if cell else float("nan") for cell in line] for line in cells
        ]
        image = axes.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        axes.set_yticks([-0.5, bins / 2 - 0.5, bins - 0.5], ["0", "0.5", "1"], fontsize=7)
        axes.set_title(textwrap.fill(curve.label, 44), fontsize=8)
    grid[0].set_ylabel("depth of the needle", fontsize=8)
    bar = figure.colorbar(image, ax=list(grid), shrink=0.9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
