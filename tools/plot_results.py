"""Results against context length: a PNG and a Markdown table."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron.program import one_sentence_errors


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reads the JSON lines of the evaluation tools; the last line of a name and "
        "context length counts.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/plot_results.py results.jsonl --output perplexity.png",
    )
    parser.add_argument("results", nargs="+", help="files of JSON lines")
    parser.add_argument("--output", default="results.png", help="PNG; the table is .md beside it")
    parser.add_argument("--metric", default="perplexity")
    parser.add_argument("--window", type=int, help="mark the training window L, in tokens")
    parser.add_argument("--title")
    return parser.parse_args()


def read(files: list[str], metric: str) -> dict[str, dict[int, float]]:
    """{name: {context length: value}} in the order of the files.

    Raises:
        ValueError: a file is missing or a line is no result; names file and line.
    """
    table: dict[str, dict[int, float]] = {}
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such file")
        for number, line in enumerate(Path(file).read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                if row["metric"] == metric:
                    table.setdefault(row["name"], {})[row["context_length"]] = float(row[metric])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number}: not a result ({error!r})") from None
    if not table:
        raise ValueError(f"{', '.join(files)}: no results of metric '{metric}'")
    return table


def markdown(table: dict[str, dict[int, float]]) -> str:
    lengths = sorted({length for row in table.values() for length in row})
    lines = ["| | " + " | ".join(f"{n:,}" for n in lengths) + " |",
             "|---|" + "---:|" * len(lengths)]
    for name, row in table.items():
        cells = [f"{row[n]:.2f}" if n in row else "" for n in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(table: dict[str, dict[int, float]], metric: str, path: Path, window, title) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=150)
    for (name, row), marker in zip(table.items(), "osD^vP*X<>" * len(table), strict=False):
        lengths = sorted(row)
        axes.plot(lengths, [row[n] for n in lengths], marker=marker, label=name, linewidth=1.8)
    lengths = sorted({length for row in table.values() for length in row})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    values = [v for row in table.values() for v in row.values()]
    ticks = [t * 10**e for e in range(-1, 7) for t in (1, 1.5, 2, 3, 4, 5, 7)]
    ticks = [t for t in ticks if min(values) * 0.9 <= t <= max(values) * 1.1]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    if window:
        axes.axvline(window, color="grey", linestyle=":", linewidth=1)
        axes.text(window, max(values), " training window", color="grey", va="top", fontsize=8)
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    if title:
        axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)


@one_sentence_errors
def main() -> None:
    flags = parse()
    table = read(flags.results, flags.metric)
    output = Path(flags.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(table)
    output.with_suffix(".md").write_text(text)
    plot(table, flags.metric, output, flags.window, flags.title)
    print(text + f"\n{output}  {output.with_suffix('.md')}")


if __name__ == "__main__":
    sys.exit(main())
