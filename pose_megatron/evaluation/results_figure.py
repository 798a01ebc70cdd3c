"""Curves of results against context length, drawn."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from pose_megatron.evaluation.results import SHARES, Curve, lengths_of

# What the axis of a metric says.
_AXES = {
    "passkey": "passkeys found",
    "ruler": "mean over RULER's tasks",
    "seconds": "seconds of a step",
    "memory": "peak memory of a step, MiB",
}
_DEPTHS = 10  # bins of a needle's depth
_LABEL = 0.09  # width of a length's label, as a share of the axis
_TICKS = 16  # at most, on an axis of values


def _tasks_of(curves: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(task for curve in curves for task in curve.tasks))


def plot(
    curves: Sequence[Curve],
    metric: str,
    path: Path,
    window: int | None = None,
    title: str | None = None,
) -> None:
    """Draws the curves; passkeys also by depth in the haystack, and RULER's tasks one by one.

    Args:
        path: PNG or SVG, the same bytes for the same curves.
        window: in tokens, to be marked.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if metric in SHARES:
        columns = min(3, len(curves) if len(curves) != 4 else 2)
        rows = -(-len(curves) // columns)
        width, height = (
            (3.2, 2.6) if metric == "passkey" else (4.5, 1 + 0.3 * len(_tasks_of(curves)))
        )
        figure = pyplot.figure(
            figsize=(max(7, width * columns), 4 + height * rows), dpi=150, layout="constrained"
        )
        above, below = figure.subfigures(2, squeeze=False, height_ratios=(4, height * rows)).ravel()
        axes = above.subplots()
        grid = below.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        (_draw_depths if metric == "passkey" else _draw_tasks)(below, grid, curves)
    else:
        figure = pyplot.figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        axes = figure.subplots()
    _draw_curves(axes, curves, metric, window)
    if title:
        axes.set_title(title, fontsize=10)
    # no day, and no random ids
    with matplotlib.rc_context({"svg.hashsalt": metric}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _draw_curves(axes, curves: Sequence[Curve], metric: str, window: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve, marker in zip(curves, "osD^vP*X<>" * len(curves), strict=False):
        row, label = curve.points, textwrap.fill(curve.label, 60)
        lengths = sorted(row)
        values = [row[n][metric] for n in lengths]
        (line,) = axes.plot(lengths, values, marker=marker, label=label, linewidth=1.8)
        if all({"low", "high"} <= row[n].keys() for n in lengths):
            low, high = ([row[n][side] for n in lengths] for side in ("low", "high"))
            axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    lengths = lengths_of(curves)
    values = [row[metric] for curve in curves for row in curve.points.values()]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, _apart(lengths))
    if metric in SHARES:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    else:
        axes.set_yscale("log")
        for decade in (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,):
            ticks = [t * 10**e for e in range(-3, 7) for t in decade]
            ticks = [t for t in ticks if min(values) * 0.9 <= t <= max(values) * 1.1]
            if len(ticks) <= _TICKS:
                break
        if len(ticks) < 3:
            finite = [value for value in values if math.isfinite(value)] or [1]
            ticks = list(MaxNLocator(5, min_n_ticks=3).tick_values(min(finite), max(finite)))
        axes.set_yticks(ticks, [f"{t:,g}" for t in ticks])
    axes.minorticks_off()
    if window:
        axes.axvline(window, color="grey", linestyle=":", linewidth=1)
        at, side = (0.02, "bottom") if metric in SHARES else (0.98, "top")
        axes.text(
            window,
            at,
            f" window of {window:,}",
            color="grey",
            va=side,
            fontsize=8,
            transform=axes.get_xaxis_transform(),
        )
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel(_AXES.get(metric, metric))
    axes.grid(alpha=0.3)
    if all(curve.label == curve.name for curve in curves):
        axes.legend(fontsize=8)
    else:  # long labels would hide the curves
        axes.figure.legend(fontsize=8, loc="outside lower center")


def _apart(lengths: Sequence[int]) -> list[str]:
    """Labels of lengths on a logarithmic axis; none where it would touch the next one."""
    least = math.log(lengths[-1] / lengths[0]) * _LABEL
    labels, right = [], math.inf
    for n in reversed(lengths):
        near = right - math.log(n) < least
        labels.append("" if near else f"{n:,}")
        right = right if near else math.log(n)
    return labels[::-1]


def _draw_depths(figure, grid, curves: Sequence[Curve]) -> None:
    """A map for each curve: context length across, depth of the needle down."""
    lengths, maps = lengths_of(curves), []
    for curve in curves:
        share = [[math.nan] * len(lengths) for _ in range(_DEPTHS)]
        for column, n in enumerate(lengths):
            answers = curve.points.get(n, {}).get("answers", ())
            for i in range(_DEPTHS):
                found = [
                    found
                    for depth, found, _ in answers
                    if min(int(depth * _DEPTHS), _DEPTHS - 1) == i
                ]
                if found:
                    share[i][column] = sum(found) / len(found)
        maps.append(share)
    _draw_maps(figure, grid, curves, lengths, maps)
    for axes in grid[: len(curves)]:
        axes.set_yticks([-0.5, _DEPTHS / 2 - 0.5, _DEPTHS - 0.5], ["0", "0.5", "1"], fontsize=7)
    grid[0].set_ylabel("depth of the needle", fontsize=8)


def _draw_tasks(figure, grid, curves: Sequence[Curve]) -> None:
    """A map for each curve: context length across, tasks down, the shares in per cent."""
    lengths, tasks = lengths_of(curves), _tasks_of(curves)
    maps = [
        [
            [curve.tasks.get(task, {}).get(n, {}).get("ruler", math.nan) for n in lengths]
            for task in tasks
        ]
        for curve in curves
    ]
    _draw_maps(figure, grid, curves, lengths, maps)
    for axes, share in zip(grid, maps, strict=False):
        axes.set_yticks(range(len(tasks)), tasks, fontsize=7)
        for row, line in enumerate(share):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    color = "black" if value > 0.6 else "white"
                    text = f"{100 * value:.0f}"
                    axes.text(column, row, text, color=color, fontsize=7, ha="center", va="center")


def _draw_maps(figure, grid, curves: Sequence[Curve], lengths: list[int], maps) -> None:
    """
    Args:
        maps: for each curve rows of shares, one for each context length; NaN where there is none.
    """
    for axes in grid[len(curves) :]:
        axes.set_axis_off()
    for axes, curve, share in zip(grid, curves, maps, strict=False):
        image = axes.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        axes.set_title(textwrap.fill(curve.label, 44), fontsize=8)
    bar = figure.colorbar(image, ax=list(grid), shrink=0.9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
