"""Which relative distances a position sampler shows the model: a PNG and its numbers."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron.positions.coverage import Curve, coverage
from pose_megatron.positions.laws import SAMPLERS
from pose_megatron.positions.sampler import PoseSampler

FIGURE_5 = ("full", "pose", "pose,num-chunks=3", "randpos")
OPTIONS = {"num-chunks": int, "content": str, "skip-law": str, "plain-fraction": float}


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
    parser.add_argument("--window", type=int, default=2048, help="L in tokens (default: 2048)")
    parser.add_argument("--target", type=int, default=16384, help="T in tokens (default: 16384)")
    parser.add_argument("--source", type=int, help="document length in tokens (default: T)")
    parser.add_argument(
        "--sentence",
        type=int,
        default=25,
        help="pose-boundary, longrecipe: mean tokens between cuts (default: 25)",
    )
    parser.add_argument("--samples", type=int, default=4000, help="drawn (default: 4000)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--output", default="coverage.png", help="PNG; the JSON is beside it")
    parser.add_argument("--title")
    return parser.parse_args()


def build_sampler(text: str, flags: argparse.Namespace) -> PoseSampler:
    """A sampler from its words on the command line."""
    name, *words = text.split(",")
    options = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in OPTIONS:
            raise ValueError(f"{text}: option '{key}' is none of {', '.join(OPTIONS)}")
        try:
            options[key.replace("-", "_")] = OPTIONS[key](value)
        except ValueError:
            raise ValueError(
                f"{text}: {key} wants {OPTIONS[key].__name__}, not '{value}'"
            ) from None
    return PoseSampler(
        flags.window, flags.target, name, seed=flags.seed, boundaries=(0,), **options
    )


def label(text: str, sampler: PoseSampler) -> str:
    """The sampler's words, with what the paper calls its curves by."""
    name, *words = text.split(",")
    if SAMPLERS[name].in_chunks:
        words = [w for w in words if not w.startswith("num-chunks")]
        name = f"{name}, {sampler.num_chunks} chunks"
    return ", ".join(
        ["full (plain)" if name == "full" else name, *(word.replace("=", " ") for word in words)]
    )


def plot(curves: dict[str, Curve], flags: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), dpi=150)
    for name, curve in curves.items():
        x = range(1, len(curve.probability))
        (line,) = axes.plot(x, curve.probability[1:], label=name, linewidth=1.4)
        if curve.samples:
            spread = 2 * curve.standard_error[1:]
            axes.fill_between(
                x,
                curve.probability[1:] - spread,
                curve.probability[1:] + spread,
                color=line.get_color(),
                alpha=0.25,
                linewidth=0,
            )
    axes.axvline(flags.window, color="grey", linestyle=":", linewidth=1)
    axes.text(flags.window, 1.02, " window L", color="grey", fontsize=8)
    axes.set_xlim(0, flags.target)
    axes.set_ylim(0, 1.08)
    axes.set_xlabel("relative distance (tokens)")
    axes.set_ylabel("probability that a sample contains it")
    axes.set_title(
        flags.title or f"Coverage, L = {flags.window:,} to T = {flags.target:,}", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def table(curves: dict[str, Curve], window: int) -> str:
    bands = {name: curve.bands(window) for name, curve in curves.items()}
    heads = list(next(iter(bands.values())))
    lines = ["| mean over distances | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    lines += [
        f"| {name} | " + " | ".join(f"{row[head]:.3f}" for head in heads) + " |"
        for name, row in bands.items()
    ]
    return "\n".join(lines)


def main() -> None:
    flags = parse()
    try:
        if flags.samples < 1 or flags.sentence < 1:
            raise ValueError("--samples and --sentence must be at least 1")
        samplers = {}
        for text in flags.samplers:
            sampler = build_sampler(text, flags)
            samplers[label(text, sampler)] = sampler
        source = flags.target if flags.source is None else flags.source
        if source < flags.window:
            raise ValueError(f"--source {source} is shorter than --window {flags.window}")
        curves = {
            name: coverage(sampler, source, flags.samples, flags.sentence)
            for name, sampler in samplers.items()
        }
        path = Path(flags.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        plot(curves, flags, path)
        path.with_suffix(".json").write_text(
            json.dumps(
                {
                    "window": flags.window,
                    "target": flags.target,
                    "source": source,
                    "curves": [
                        {
                            "sampler": name,
                            "samples": curve.samples,
                            "bands": curve.bands(flags.window),
                            "probability": [round(p, 6) for p in curve.probability.tolist()],
                            "standard_error": [round(e, 6) for e in curve.standard_error.tolist()],
                        }
                        for name, curve in curves.items()
                    ],
                }
            )
        )
    except (ValueError, OSError) as error:
        sys.exit(f"plot_coverage.py: error: {error}")
    print(f"{table(curves, flags.window)}\n\n{path}  {path.with_suffix('.json')}")


if __name__ == "__main__":
    sys.exit(main())
