"""What the paper claims, and what it does not ask, as differences between two figures: losses in
nats, or shares of pairs that a model does not recall."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from experiments import farther, recipes
from profiles import Profile

ALIKE = 0.05  # nats: a difference that is called none
BROKEN = 0.5  # nats: one that is called a failure
# shares of pairs: so few are called none, and so many a failure, all in all and of far ones
MISSED, LOST, LOST_FAR = 0.1, 0.5, 0.8


class Figure(NamedTuple):
    """A model's figure at a context length.

    Attributes:
        name: the model's, in the table.
        beyond: of pairs, only those that stand more than so many tokens back.
    """

    name: str
    length: int
    beyond: int = 0


@dataclass(frozen=True)
class Claim:
    """The figure of `one` less that of `other` is at most `limit`.

    Attributes:
        one, other: two models differ by seed; one model at two lengths, by document. Without the
            other it is the figure of one.
        alike: whether it is the size of the difference that counts.
    """

    text: str
    table: str
    one: Figure
    other: Figure | None
    limit: float
    alike: bool = False


def claims(profile: Profile) -> Iterator[Claim]:
    """All of them, in the order of the tables."""
    window, (main, second) = profile.window, profile.factors
    at = main * window

    def than(text: str, table: str, one: str, other: str, limit: float, length: int = at) -> Claim:
        return Claim(text, table, Figure(one, length), Figure(other, length), limit)

    base = "as it was"
    yield Claim(
        f"the base model loses at least {BROKEN} nats more at {main} L than at L",
        *("table-1", Figure(base, window), Figure(base, at), -BROKEN),
    )
    for factor in (main, second):
        pose, there, to = f"PoSE to {factor} L", factor * window, f"to {factor} L"
        yield Claim(
            f"{pose} loses there at most {ALIKE} nats more than at L",
            *("table-1", Figure(pose, there), Figure(pose, window), ALIKE),
        )
        text = f"{pose} loses there at most {ALIKE} nats more than full length"
        yield than(text, "table-1", pose, f"full length {to}", ALIKE, there)
        text = f"{pose} loses there less than random positions"
        yield than(text, "table-1", pose, f"random positions {to}", 0.0, there)
        text = f"beyond the paper: {pose} loses there less than plain windows"
        yield than(text, "table-1", pose, f"plain windows {to}", 0.0, there)
    text = f"Table 3 in spirit: PoSE to {main} L loses at L at most {ALIKE} nats more than the base"
    yield than(text, "table-1", f"PoSE to {main} L", base, ALIKE, window)

    def recall(text: str, one: Figure, limit: float, other: Figure | None = None) -> Claim:
        return Claim(text, "figure-2b", one, other, limit)

    at_first = Figure(base, window)
    text = f"the base model misses at least {LOST:.0%} more of the pairs at {main} L than at L"
    yield recall(text, at_first, -LOST, Figure(base, at))
    text = (
        f"the base model misses at least {LOST_FAR:.0%} more of the pairs over 2 L back than at L"
    )
    yield recall(text, at_first, -LOST_FAR, Figure(base, at, 2 * window))
    for how in ("no interpolation", "linear"):
        pose, plain = f"PoSE, {how}", f"plain windows, {how}"
        text = f"{pose}: it misses at most {MISSED:.0%} of pairs at {main} L"
        yield recall(text, Figure(pose, at), MISSED)
        text = f"beyond the paper: {pose}: it misses fewer of them than plain windows"
        yield recall(text, Figure(pose, at), 0.0, Figure(plain, at))
    last = main - 1
    for how in ("PoSE", "PoSE, 3 chunks", f"PoSE to {farther(main)} L"):
        pose = Figure(f"{how}, no interpolation", at, last * window)
        text = f"{pose.name}: it misses at most {MISSED:.0%} of pairs over {last} L back"
        yield recall(f"beyond the paper: {text}", pose, MISSED)

    for family in ("llama", "gptj"):
        for scaling in ("linear", "ntk", "yarn"):
            what = f"{family}, {scaling}"
            text = f"{what}: at {main} L PoSE loses less than interpolation without training"
            yield than(text, "figure-4", f"{what}, PoSE", f"{what}, not trained", 0.0)

    for factor in profile.far:
        name = f"PoSE, yarn, to {factor} L"
        yield Claim(
            f"{name}: it loses there at most {ALIKE} nats more than at L",
            *("table-2", Figure(name, factor * window), Figure(name, window), ALIKE),
        )

    for content in ("contiguous", "aligned"):
        yield Claim(
            f"at {main} L text {content} is within {ALIKE} nats of uniform",
            *("table-4", Figure(f"text {content}", at), Figure("text uniform", at), ALIKE, True),
        )

    yield Claim(
        f"at {main} L three chunks are within {ALIKE} nats of two",
        *("table-5", Figure("3 chunks", at), Figure("2 chunks", at), ALIKE, True),
    )
    text = f"at {main} L random positions lose at least {BROKEN} nats more than two chunks"
    yield than(text, "table-5", "2 chunks", "every token its own (random positions)", -BROKEN)

    for name in recipes(profile):
        text = f"beyond the paper: at {main} L, {name} loses less than two chunks"
        yield than(text, "recipes", name, "2 chunks", 0.0)
