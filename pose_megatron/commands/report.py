"""Results as one self-contained HTML page, and the same in Markdown."""

import argparse
from pathlib import Path

from pose_megatron.commands.results_flags import add_results_flags
from pose_megatron.errors import ConfigError
from pose_megatron.evaluation import claims, report
from pose_megatron.runtime.cli import command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reads the JSON lines of the evaluation tools, all metrics. The page has "
        "curves, maps, tables\nwith their uncertainty, settings, commands and versions, and loads "
        "nothing from anywhere.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/report.py results.jsonl --output report.html "
        "--window 4096",
    )
    add_results_flags(parser)
    parser.add_argument(
        "--output",
        default="report.html",
        help="the page; beside it the same as .md, with a picture of each metric as .svg",
    )
    parser.add_argument("--title", default="Results")
    parser.add_argument(
        "--verdicts", help="JSON list of objects with claim, verdict and numbers, shown first"
    )
    parser.add_argument(
        "--by-file", action="store_true", help="each file is a chapter of its own, by its name"
    )
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    output = Path(flags.output)
    if output.suffix != ".html":
        raise ConfigError(f"--output {output}: must end with .html")
    verdicts = claims.read_verdicts(flags.verdicts) if flags.verdicts else []
    output.parent.mkdir(parents=True, exist_ok=True)
    chapters = {"": flags.results}
    if flags.by_file:
        chapters = {Path(file).stem: [file] for file in flags.results}
        if len(chapters) < len(flags.results):
            raise ConfigError("--by-file: two of the files have one name")
    page = report.build(chapters, output, flags.title, flags.window, verdicts, flags.apart)
    page.write()
    print(f"{output}  {output.with_suffix('.md')}")
