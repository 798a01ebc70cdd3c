"""Which relative distances a position sampler shows the model: a PNG and its numbers."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pose_megatron.errors import ConfigError
from pose_megatron.positions.coverage import coverage
from pose_megatron.positions.laws import SAMPLERS
from pose_megatron.positions.sampler import PoseSampler
from pose_megatron.runtime.cli import command, positive
from pose_megatron.runtime.ranges import LARGEST_SEED, real, whole

FIGURE_5 = ("full", "pose", "pose,num-chunks=3", "randpos")
OPTIONS: dict[str, Callable[[str], Any]] = {
    "num-chunks": positive,
    "content": str,
    "skip-law": str,
    "plain-fraction": real(at_least=0, at_most=1),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Probability that one sample contains each relative distance. Exact for plain\n"
        "windows and two chunks, else from drawn samples, with two standard errors shaded.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python tools/plot_coverage.py --output coverage.png     (the PoSE paper's Figure 5)\n"
        "  python tools/plot_coverage.py --target 131072 pose pose,num-chunks=8 \\\n"
        "      pose,num-chunks=8,skip-law=sorted-uniform cream --output coverage128k.png",
    )
    parser.add_argument(
        "samplers",
        nargs="*",
        default=list(FIGURE_5),
        metavar="sampler[,option=value...]",
        help=f"one of {', '.join(SAMPLERS)}, with any of {', '.join(OPTIONS)} (default: the "
        "paper's four)",
    )
    parser.add_argument("--window", type=positive, default=2048, help="L in tokens (default: 2048)")
    parser.add_argument(
        "--target", type=positive, default=16384, help="T in tokens (default: 16384)"
    )
    parser.add_argument("--source", type=positive, help="document length in tokens (default: T)")
    parser.add_argument(
        "--sentence",
        type=positive,
        default=25,
        help="pose-boundary, longrecipe: mean tokens between two cuts (default: 25)",
    )
    parser.add_argument("--samples", type=positive, default=4000, help="drawn (default: 4000)")
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED), default=1234)
    parser.add_argument("--output", default="coverage.png", help="PNG; the JSON is beside it")
    parser.add_argument("--title")
    return parser.parse_args()


def build_sampler(text: str, flags: argparse.Namespace) -> PoseSampler:
    """The sampler that an argument such as `pose,num-chunks=3` describes.

    Raises:
        ConfigError: an unknown sampler or option, or a value out of range.
    """
    name, *settings = text.split(",")
    options: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in OPTIONS:
            raise ConfigError(f"{text}: option '{key}' is none of {', '.join(OPTIONS)}")
        try:
            options[key.replace("-", "_")] = OPTIONS[key](value)
        except argparse.ArgumentTypeError as reason:
            raise ConfigError(f"{text}: {key} {reason}") from None
    return PoseSampler(
        flags.window, flags.target, name, seed=flags.seed, boundaries=(0,), **options
    )


def label(text: str, sampler: PoseSampler) -> str:
    """The name of a sampler's curve: its argument, with the number of chunks as in the paper."""
    name, *settings = text.split(",")
    if SAMPLERS[name].in_chunks:
        settings = [s for s in settings if not s.startswith("num-chunks")]
        name = f"{name}, {sampler.num_chunks} chunks"
    first = "full (plain)" if name == "full" else name
    return ", ".join([first, *(setting.replace("=", " ") for setting in settings)])


@command
def main() -> None:
    flags = parse()
    from pose_megatron.evaluation import coverage_figure

    samplers = {}
    for text in flags.samplers:
        sampler = build_sampler(text, flags)
        samplers[label(text, sampler)] = sampler
    source = flags.target if flags.source is None else flags.source
    if source < flags.window:
        raise ConfigError(f"--source {source} is shorter than --window {flags.window}")
    curves = {
        name: coverage(sampler, source, flags.samples, flags.sentence)
        for name, sampler in samplers.items()
    }
    path = Path(flags.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    coverage_figure.plot(curves, flags.window, flags.target, path, flags.title)
    numbers = coverage_figure.numbers(curves, flags.window)
    described = {"window": flags.window, "target": flags.target, "source": source}
    path.with_suffix(".json").write_text(
        json.dumps(described | {"curves": numbers}), encoding="utf-8"
    )
    table = coverage_figure.markdown(curves, flags.window)
    print(f"{table}\n\n{path}  {path.with_suffix('.json')}")
