"""Results of evaluations: a file of JSON lines in, a Markdown table and a plot out.

A result is one JSON object: name, metric (one of METRICS), context_length in tokens, the metric's
value under its own name, and whatever else its program has to say.
"""

import contextlib
import fcntl
import json
import operator
import os
from collections.abc import Iterable
from pathlib import Path

from pose_megatron.errors import ConfigError

METRICS = ("perplexity", "passkey")


def append(path: str | None, rows: Iterable[dict]) -> None:
    """Adds results to a file of JSON lines; does nothing without a path.

    Lines stay whole: several evaluators append one after the other, what one that was killed left
    unfinished stays a line of its own, and a full disk takes back what was begun.
    """
    if not path:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        try:
            while lines:
                lines = lines[os.write(file, lines) :]
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def read(files: list[str], metric: str) -> dict[str, dict[int, dict]]:
    """{name: {context length: result}}, in the order of the files; the last of equals counts.

    Raises:
        ConfigError: a file is missing, or a line is not a result; names file and line.
    """
    table: dict[str, dict[int, dict]] = {}
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"{file}: no such file")
        for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                if row["metric"] == metric:
                    row[metric] = float(row[metric])
                    length = operator.index(row["context_length"])
                    table.setdefault(str(row["name"]), {})[length] = row
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise ConfigError(f"{file}:{number}: not a result ({error!r})") from None
    if not table:
        raise ConfigError(f"{', '.join(files)}: no results of metric '{metric}'")
    return table


def _lengths_of(table: dict[str, dict[int, dict]]) -> list[int]:
    return sorted({length for row in table.values() for length in row})


def markdown(table: dict[str, dict[int, dict]], metric: str) -> str:
    """One row per name, one column per context length."""
    lengths, form = _lengths_of(table), "{:.0%}" if metric == "passkey" else "{:.2f}"
    lines = [
        "| | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---|" + "---:|" * len(lengths),
    ]
    for name, row in table.items():
        cells = [form.format(row[n][metric]) if n in row else "" for n in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(
    table: dict[str, dict[int, dict]],
    metric: str,
    path: Path,
    window: int | None = None,
    title: str | None = None,
) -> None:
    """Draws a curve for each name; passkeys also by depth in the haystack.

    Args:
        path: PNG.
        window: training window L in tokens, to be marked.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if metric == "passkey":
        columns = min(3, len(table) if len(table) != 4 else 2)
        rows = -(-len(table) // columns)
        figure = pyplot.figure(
            figsize=(max(7, 3.2 * columns), 4 + 2.6 * rows), dpi=150, layout="constrained"
        )
        above, below = figure.subfigures(2, squeeze=False, height_ratios=(4, 2.6 * rows)).ravel()
        axes = above.subplots()
        _draw_depths(below, table, rows, columns)
    else:
        figure = pyplot.figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        axes = figure.subplots()
    _draw_curves(axes, table, metric, window)
    if title:
        axes.set_title(title, fontsize=10)
    figure.savefig(path)


def _draw_curves(axes, table: dict[str, dict[int, dict]], metric: str, window: int | None) -> None:
    for (name, row), marker in zip(table.items(), "osD^vP*X<>" * len(table), strict=False):
        lengths = sorted(row)
        values = [row[n][metric] for n in lengths]
        (line,) = axes.plot(lengths, values, marker=marker, label=name, linewidth=1.8)
        if metric == "passkey":
            low, high = ([row[n][side] for n in lengths] for side in ("low", "high"))
            axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    lengths = _lengths_of(table)
    values = [row[n][metric] for row in table.values() for n in row]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    if metric == "passkey":
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    else:
        axes.set_yscale("log")
        ticks = [t * 10**e for e in range(-1, 7) for t in (1, 1.5, 2, 3, 4, 5, 7)]
        ticks = [t for t in ticks if min(values) * 0.9 <= t <= max(values) * 1.1]
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
    axes.legend(fontsize=8)


def _draw_depths(figure, table: dict[str, dict[int, dict]], rows: int, columns: int) -> None:
    """A map for each name: context length across, depth of the needle down."""
    lengths, bins = _lengths_of(table), 10
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes in grid[len(table) :]:
        axes.set_axis_off()
    for axes, (name, row) in zip(grid, table.items(), strict=False):
        cells = [
            [
                [
                    found
                    for depth, found, _ in row.get(n, {}).get("answers", ())
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
        axes.set_title(name, fontsize=8)
    grid[0].set_ylabel("depth of the needle", fontsize=8)
    bar = figure.colorbar(image, ax=list(grid), shrink=0.9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
