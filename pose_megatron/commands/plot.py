"""Results against context length: a PNG and a Markdown table."""

import argparse
from pathlib import Path

from pose_megatron.commands.results_flags import add_results_flags
from pose_megatron.evaluation import results, results_figure, results_table
from pose_megatron.runtime.cli import command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reads the JSON lines of the evaluation tools. Results of one name that differ "
        "in more than\nthe context length (data, stride, needles, iteration, ...) are kept apart, "
        "and labels say\nin what; of equal ones the last counts.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/plot_results.py results.jsonl --output perplexity.png",
    )
    add_results_flags(parser)
    parser.add_argument("--output", default="results.png", help="PNG; the table is .md beside it")
    parser.add_argument("--metric", choices=results.METRICS, default="perplexity")
    parser.add_argument("--title")
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    curves = results.read(flags.results, flags.metric, flags.apart)
    output = Path(flags.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    text = results_table.values(curves, flags.metric).markdown()
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    results_figure.plot(curves, flags.metric, output, flags.window, flags.title)
    print(text + f"\n{output}  {output.with_suffix('.md')}")
