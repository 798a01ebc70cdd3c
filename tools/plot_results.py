"""Results against context length: a PNG and a Markdown table."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron.runtime.cli import command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reads the JSON lines of the evaluation tools; the last line of a name and "
        "context length counts.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/plot_results.py results.jsonl --output perplexity.png",
    )
    parser.add_argument("results", nargs="+", help="files of JSON lines")
    parser.add_argument("--output", default="results.png", help="PNG; the table is .md beside it")
    parser.add_argument("--metric", choices=("perplexity", "passkey"), default="perplexity")
    parser.add_argument("--window", type=int, help="mark the training window L, in tokens")
    parser.add_argument("--title")
    return parser.parse_args()


def read(files: list[str], metric: str) -> dict[str, dict[int, dict]]:
    """{name: {context length: result}} in the order of the files.

    Raises:
        ValueError: a file is missing or a line is no result; names file and line.
    """
    table: dict[str, dict[int, dict]] = {}
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such file")
        for number, line in enumerate(Path(file).read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                if row["metric"] == metric:
                    row[metric] = float(row[metric])
                    table.setdefault(row["name"], {})[row["context_length"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number}: not a result ({error!r})") from None
    if not table:
        raise ValueError(f"{', '.join(files)}: no results of metric '{metric}'")
    return table


def lengths_of(table: dict[str, dict[int, dict]]) -> list[int]:
    return sorted({length for row in table.values() for length in row})


def markdown(table: dict[str, dict[int, dict]], metric: str) -> str:
    lengths, form = lengths_of(table), "{:.0%}" if metric == "passkey" else "{:.2f}"
    lines = [
        "| | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---|" + "---:|" * len(lengths),
    ]
    for name, row in table.items():
        cells = [form.format(row[n][metric]) if n in row else "" for n in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(table: dict[str, dict[int, dict]], metric: str, path: Path, window, title) -> None:
    """Curves; of passkeys also where in the haystack they were found."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if metric == "passkey":
        columns = min(3, len(table) if len(table) != 4 else 2)
        rows = -(-len(table) // columns)
        figure = pyplot.figure(
            figsize=(max(7, 3.2 * columns), 4 + 2.6 * rows), dpi=150, layout="constrained"
        )
        above, below = figure.subfigures(2, height_ratios=(4, 2.6 * rows))
        axes = above.subplots()
        draw_depths(below, table, rows, columns)
    else:
        figure = pyplot.figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        axes = figure.subplots()
    draw_curves(axes, table, metric, window)
    if title:
        axes.set_title(title, fontsize=10)
    figure.savefig(path)


def draw_curves(axes, table: dict[str, dict[int, dict]], metric: str, window) -> None:
    for (name, row), marker in zip(table.items(), "osD^vP*X<>" * len(table), strict=False):
        lengths = sorted(row)
        values = [row[n][metric] for n in lengths]
        (line,) = axes.plot(lengths, values, marker=marker, label=name, linewidth=1.8)
        if metric == "passkey":
            low, high = ([row[n][side] for n in lengths] for side in ("low", "high"))
            axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    lengths = lengths_of(table)
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


def draw_depths(figure, table: dict[str, dict[int, dict]], rows: int, columns: int) -> None:
    """A map for each name: context length across, depth of the needle down."""
    lengths, bins = lengths_of(table), 10
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


@command
def main() -> None:
    flags = parse()
    table = read(flags.results, flags.metric)
    output = Path(flags.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(table, flags.metric)
    output.with_suffix(".md").write_text(text)
    plot(table, flags.metric, output, flags.window, flags.title)
    print(text + f"\n{output}  {output.with_suffix('.md')}")


if __name__ == "__main__":
    sys.exit(main())
