"""The paper's tables as runs of pretrain_pose.py: what each extends, and how."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from profiles import Profile

TITLES = {
    "table-1": "Table 1: PoSE beside full length, random positions and plain windows (linear)",
    "figure-2b": "Figure 2b: recall of pairs that stand anywhere in a text",
    "figure-3": "Figure 3: what a step costs, beside full length",
    "figure-4": "Figure 4: other interpolations and another architecture",
    "table-2": "Table 2: far targets",
    "table-4": "Table 4: which text the later chunks have",
    "table-5": "Table 5: how many chunks",
    "recipes": "Beyond the paper: other recipes, as many tokens each",
}


@dataclass(frozen=True)
class Experiment:
    """One way to extend the base model, in one table.

    Attributes:
        name: what tables call it.
        factor: T / L.
        scaling: --rope-scaling.
        flags: what differs from plain PoSE with two chunks.
        trained: whether it is; else it is the base model with its frequencies rescaled.
        full: whether it trains on T tokens at a time, as many in all.
        share: of the profile's steps.
        family: of the base model.
    """

    table: str
    name: str
    factor: int
    scaling: str = "linear"
    flags: Sequence[str] = ()
    trained: bool = True
    full: bool = False
    share: float = 1.0
    family: str = "llama"

    @property
    def key(self) -> str:
        """Its name among files."""
        return _hyphened(self.table, self.name)

    @property
    def rope(self) -> list[str]:
        """Flags of its interpolation."""
        factor = [] if self.scaling == "none" else ["--rope-scaling-factor", str(self.factor)]
        return ["--rope-scaling", self.scaling, *factor]

    @property
    def recalls(self) -> bool:
        """Whether it is asked for pairs; else its loss is measured."""
        return self.table == "figure-2b"

    @property
    def model(self) -> str:
        """The name of its model, which tables may share."""
        length = "full" if self.full else ""
        share = "" if self.share == 1 else f"{self.share:.2f} of the steps"
        words = [self.family, self.scaling, f"{self.factor}x", length, share, *self.flags]
        return _hyphened(*words)


def _hyphened(*words: str) -> str:
    text = " ".join(words)
    return "-".join("".join(c if c.isalnum() else " " for c in text).lower().split())


def lengths(table: str, profile: Profile) -> list[int]:
    """The context lengths that a table measures: L times powers of two."""
    reach = {"table-1": profile.factors[-1], "table-2": profile.far[-1]}
    last = reach.get(table, profile.factors[0])
    return [profile.window * 2**i for i in range(last.bit_length())]


def experiments(profile: Profile) -> Iterator[Experiment]:
    """All of them, in the order of the tables."""
    main, second = profile.factors

    def one(table: str, name: str, factor: int = main, **more) -> Experiment:
        return Experiment(table, name, factor, **more)

    plain = ["--position-sampler", "full"]
    yield one("table-1", "as it was", scaling="none", trained=False)
    yield one("table-1", "linear, not trained", trained=False)
    for factor in (main, second):
        of = f" to {factor} L"
        yield one("table-1", "full length" + of, factor, full=True, flags=plain)
        yield one("table-1", "plain windows" + of, factor, flags=plain)
        yield one(
            "table-1", "random positions" + of, factor, flags=["--position-sampler", "randpos"]
        )
        yield one("table-1", "PoSE" + of, factor)

    def recall(name: str, scaling: str, factor: int = main, **more) -> Experiment:
        return one("figure-2b", name, factor, scaling=scaling, family="recall", **more)

    yield recall("as it was", "none", trained=False)
    # far distances are all new to it: three times the steps
    none, steps = ", no interpolation", {"share": 3.0}
    yield recall("plain windows" + none, "none", flags=plain, **steps)
    yield recall("PoSE" + none, "none", **steps)
    yield recall("PoSE, 3 chunks" + none, "none", flags=["--pose-num-chunks", "3"], **steps)
    beyond = farther(main)
    yield recall(f"PoSE to {beyond} L" + none, "none", beyond, **steps)
    yield recall("linear, not trained", "linear", trained=False)
    yield recall("plain windows, linear", "linear", flags=plain)
    yield recall("PoSE, linear", "linear")

    for family in ("llama", "gptj"):
        for scaling in ("linear", "ntk", "yarn"):
            what = f"{family}, {scaling}"
            yield one(
                "figure-4", what + ", not trained", scaling=scaling, trained=False, family=family
            )
            yield one("figure-4", what + ", PoSE", scaling=scaling, family=family)

    for factor in profile.far:
        for scaling in ("linear", "ntk", "yarn"):
            yield one("table-2", f"PoSE, {scaling}, to {factor} L", factor, scaling=scaling)

    yield one("table-4", "text uniform")
    for content in ("contiguous", "aligned"):
        yield one("table-4", f"text {content}", flags=["--pose-content", content])

    yield one("table-5", "1 chunk (plain windows)", flags=plain)
    yield one("table-5", "2 chunks")
    for chunks in (3, 8):
        yield one("table-5", f"{chunks} chunks", flags=["--pose-num-chunks", str(chunks)])
    yield one(
        "table-5", "every token its own (random positions)", flags=["--position-sampler", "randpos"]
    )

    yield one("recipes", "2 chunks", scaling="yarn")
    for name, more in recipes(profile).items():
        yield one("recipes", name, scaling="yarn", **more)


def farther(factor: int) -> int:
    """A quarter farther than what is wanted: distances near a target are rarely drawn."""
    return factor * 5 // 4


def recipes(profile: Profile) -> dict[str, dict]:
    """Other ways than two chunks, by name: in what their experiments differ."""
    main = profile.factors[0]
    target = main * profile.window
    half = profile.iters * profile.batch // 2
    return {
        "plain windows": {"flags": ["--position-sampler", "full"]},
        "8 chunks, sorted-uniform": {
            "flags": "--pose-num-chunks 8 --pose-skip-law sorted-uniform".split()
        },
        "CREAM": {"flags": ["--position-sampler", "cream"]},
        "LongRecipe": {"flags": ["--position-sampler", "longrecipe"]},
        "a quarter of plain samples": {"flags": ["--pose-plain-fraction", "0.25"]},
        "a growing target": {
            "flags": ["--pose-target-schedule", f"0:{target // 4}", f"{half}:{target}"]
        },
        f"a target of {farther(main)} L": {"factor": farther(main)},
        "a third of the steps": {"share": 1 / 3},
        "three times the steps": {"share": 3.0},
    }
