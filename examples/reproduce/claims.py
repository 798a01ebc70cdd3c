"""What the paper claims, and what it does not ask, as differences between two figures: losses in
nats, or shares of pairs that a model does not recall."""

from collections.abc import Iterator
from dataclasses import dataclass

from experiments import recipes
from profiles import Profile

ALIKE = 0.05  # nats: a difference that is called none
BROKEN = 0.5  # nats: one that is called a failure
MISSED, LOST = 0.1, 0.5  # shares of pairs: so few are called none, and so many a failure


@dataclass(frozen=True)
class Claim:
    """The figure of `one` less that of `other` is at most `limit`.

    Attributes:
        one, other: (name, context length) in the table. Two models differ by seed; one model at two
            lengths, by document. Without the other it is the figure of one.
        alike: whether it is the size of the difference that counts.
    """

    text: str
    table: str
    one: tuple[str, int]
    other: tuple[str, int] | None
    limit: float
    alike: bool = False


def claims(profile: Profile) -> Iterator[Claim]:
    """All of them, in the order of the tables."""
    window, (main, second) = profile.window, profile.factors
    at = main * window

    def than(text: str, table: str, one: str, other: str, limit: float, length: int = at) -> Claim:
        return Claim(text, table, (one, length), (other, length), limit)

    base = "as it was"
    yield Claim(
        f"the base model loses at least {BROKEN} nats more at {main} L than at L",
        *("table-1", (base, window), (base, at), -BROKEN),
    )
    for factor in (main, second):
        pose, there, to = f"PoSE to {factor} L", factor * window, f"to {factor} L"
        yield Claim(
            f"{pose} loses there at most {ALIKE} nats more than at L",
            *("table-1", (pose, there), (pose, window), ALIKE),
        )
        text = f"{pose} loses there at most {ALIKE} nats more than full length"
        yield than(text, "table-1", pose, f"full length {to}", ALIKE, there)
        text = f"{pose} loses there less than random positions"
        yield than(text, "table-1", pose, f"random positions {to}", 0.0, there)
        text = f"beyond the paper: {pose} loses there less than plain windows"
        yield than(text, "table-1", pose, f"plain windows {to}", 0.0, there)
    text = f"Table 3 in spirit: PoSE to {main} L loses at L at most {ALIKE} nats more than the base"
    yield than(text, "table-1", f"PoSE to {main} L", base, ALIKE, window)

    def recall(text: str, one: str, limit: float, other: str | None = None) -> Claim:
        return Claim(text, "figure-2b", (one, at), (other, at) if other else None, limit)

    text = f"the base model misses at least {LOST:.0%} more of the pairs at {main} L than at L"
    yield Claim(text, "figure-2b", (base, window), (base, at), -LOST)
    for how in ("no interpolation", "linear"):
        pose, plain = f"PoSE, {how}", f"plain windows, {how}"
        yield recall(f"{pose}: it misses at most {MISSED:.0%} of pairs at {main} L", pose, MISSED)
        text = f"beyond the paper: {pose}: it misses fewer of them than plain windows"
        yield recall(text, pose, 0.0, plain)

    for family in ("llama", "gptj"):
        for scaling in ("linear", "ntk", "yarn"):
            what = f"{family}, {scaling}"
            text = f"{what}: at {main} L PoSE loses less than interpolation without training"
            yield than(text, "figure-4", f"{what}, PoSE", f"{what}, not trained", 0.0)

    for factor in profile.far:
        name = f"PoSE, yarn, to {factor} L"
        yield Claim(
            f"{name}: it loses there at most {ALIKE} nats more than at L",
            *("table-2", (name, factor * window), (name, window), ALIKE),
        )

    for content in ("contiguous", "aligned"):
        yield Claim(
            f"at {main} L text {content} is within {ALIKE} nats of uniform",
            *("table-4", (f"text {content}", at), ("text uniform", at), ALIKE, True),
        )

    yield Claim(
        f"at {main} L three chunks are within {ALIKE} nats of two",
        *("table-5", ("3 chunks", at), ("2 chunks", at), ALIKE, True),
    )
    text = f"at {main} L random positions lose at least {BROKEN} nats more than two chunks"
    yield than(text, "table-5", "2 chunks", "every token its own (random positions)", -BROKEN)

    for name in recipes(profile):
        text = f"beyond the paper: at {main} L, {name} loses less than two chunks"
        yield than(text, "recipes", name, "2 chunks", 0.0)
