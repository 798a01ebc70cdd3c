"""Figure 5 of the PoSE paper: curves of positions.coverage as a PNG, a table and plain numbers."""

from pathlib import Path

from pose_megatron.positions.coverage import Curve


def plot(
    curves: dict[str, Curve], window: int, target: int, path: Path, title: str | None = None
) -> None:
    """Draws the curves, each with two standard errors shaded where its samples were drawn.

    Args:
        window, target: L and T in tokens.
        path: PNG.
    """
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
    axes.axvline(window, color="grey", linestyle=":", linewidth=1)
    axes.text(window, 1.02, " window L", color="grey", fontsize=8)
    axes.set_xlim(0, target)
    axes.set_ylim(0, 1.08)
    axes.set_xlabel("relative distance (tokens)")
    axes.set_ylabel("probability that a sample contains it")
    axes.set_title(title or f"Coverage, L = {window:,} to T = {target:,}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def markdown(curves: dict[str, Curve], window: int) -> str:
    """Mean probability over bands of distances, one row per curve."""
    bands = {name: curve.bands(window) for name, curve in curves.items()}
    heads = list(next(iter(bands.values())))
    lines = ["| mean over distances | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    lines += [
        f"| {name} | " + " | ".join(f"{row[head]:.3f}" for head in heads) + " |"
        for name, row in bands.items()
    ]
    return "\n".join(lines)


def numbers(curves: dict[str, Curve], window: int) -> list[dict]:
    """The curves as JSON holds them."""
    return [
        {
            "sampler": name,
            "samples": curve.samples,
            "bands": curve.bands(window),
            "probability": [round(p, 6) for p in curve.probability.tolist()],
            "standard_error": [round(e, 6) for e in curve.standard_error.tolist()],
        }
        for name, curve in curves.items()
    ]
