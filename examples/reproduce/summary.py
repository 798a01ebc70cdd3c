"""What the runs of a reproduction say: means over seeds, verdicts on claims, and a report."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from claims import Claim, Figure, claims
from cost import cost_rows, cost_verdicts
from experiments import TITLES, Experiment
from profiles import Profile

from pose_megatron.evaluation import report
from pose_megatron.evaluation.claims import (
    Interval,
    Verdict,
    at_most,
    difference_of_shares,
    mean_of,
    write_verdicts,
)
from pose_megatron.evaluation.shares import interval


def write(
    folder: Path, profile: Profile, runs: Mapping[Path, Experiment], cost: Path | None = None
) -> None:
    """The tables as TABLE.jsonl, verdicts.json, report.html and report.md in the folder.

    Args:
        cost: what benchmarks/full_length.py has found.
    """
    tables = Tables(profile, runs)
    rows = {table: list(tables.rows(table)) for table in tables.names}
    verdicts = [tables.verdict(claim) for claim in claims(profile) if tables.decides(claim)]
    if cost:
        found = json.loads(cost.read_text(encoding="utf-8"))
        rows["figure-3"] = list(cost_rows(found))
        verdicts += cost_verdicts(found)
    chapters = {}
    for table, title in TITLES.items():
        if table in rows:
            file = folder / f"{table}.jsonl"
            lines = (json.dumps(row) + "\n" for row in rows[table])
            file.write_text("".join(lines), encoding="utf-8")
            chapters[title] = [str(file)]
    write_verdicts(folder / "verdicts.json", verdicts)
    title = f"The PoSE paper in small: L = {profile.window}"
    page = report.build(chapters, folder / "report.html", title, profile.window, verdicts)
    page.write()
    print(page.markdown())


class Tables:
    """The results of all runs.

    Attributes:
        names: the tables that there are.
    """

    def __init__(self, profile: Profile, runs: Mapping[Path, Experiment]):
        self.profile = profile
        self._experiments = {(e.table, e.name): e for e in runs.values()}
        self.names = list(dict.fromkeys(table for table, _ in self._experiments))
        # by table and name, for each seed: {context length: result}
        self._results: dict[tuple[str, str], list[dict[int, dict]]] = {}
        for file, e in runs.items():
            rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            by_length = {row["context_length"]: row for row in rows}
            self._results.setdefault((e.table, e.name), []).append(by_length)

    def rows(self, table: str) -> Iterator[dict]:
        """A result of each name and context length: the mean over seeds."""
        for (of, name), seeds in self._results.items():
            if of != table:
                continue
            experiment = self._experiments[of, name]
            for length, first in seeds[0].items():
                found = [rows[length] for rows in seeds]
                yield {
                    "name": name,
                    "seeds": len(found),
                    "target": experiment.factor * self.profile.window,
                    "rope_scaling": experiment.scaling,
                    "flags": " ".join(experiment.flags),
                    "context_length": length,
                    **(recalled(found) if experiment.recalls else self._lost(found)),
                    "made": first.get("made"),
                }

    def _lost(self, found: Sequence[dict]) -> dict:
        losses = [row["loss"] for row in found]
        loss, error = statistics.fmean(losses), found[0]["standard_error"]
        if len(losses) > 1:
            error = statistics.stdev(losses) / math.sqrt(len(losses))
        return {
            "metric": "perplexity",
            "measured": "in sliding windows",
            "stride": self.profile.window,
            "documents": found[0]["documents"],
            "perplexity": math.exp(loss),
            "loss": loss,
            "standard_error": error,
            "by_seed": losses,
        }

    def decides(self, claim: Claim) -> bool:
        """Whether there are the results that a claim is about."""
        sides = filter(None, (claim.one, claim.other))
        return all((claim.table, side.name) in self._results for side in sides)

    def verdict(self, claim: Claim) -> Verdict:
        if self._experiments[claim.table, claim.one.name].recalls:
            return self._verdict_on_recall(claim)
        assert claim.other
        same = claim.one.name == claim.other.name
        losses = self._by_document if same else self._by_seed
        one, other = (losses(claim.table, side) for side in (claim.one, claim.other))
        if not same:  # a model without seeds is the same for each
            n = max(len(one), len(other))
            one, other = (some * n if len(some) == 1 else some for some in (one, other))
        found = mean_of([a - b for a, b in zip(one, other, strict=True)])
        numbers = found.in_nats("documents" if same else "seeds")
        return at_most(claim.text, _size(found) if claim.alike else found, claim.limit, numbers)

    def _verdict_on_recall(self, claim: Claim) -> Verdict:
        found = self._missed(claim.table, claim.one)
        if claim.other:
            found = difference_of_shares(found, self._missed(claim.table, claim.other))
        numbers = f"{found.mean:.0%} ({found.low:.0%} to {found.high:.0%})"
        return at_most(claim.text, found, claim.limit, numbers)

    def _missed(self, table: str, side: Figure) -> Interval:
        """The share of pairs that are not recalled."""
        rows = self._seeds(table, side)
        if side.beyond:
            rows = [beyond(row, side.beyond) for row in rows]
        found = share_recalled(rows)
        return Interval(1 - found.mean, 1 - found.high, 1 - found.low, found.n)

    def _by_seed(self, table: str, side: Figure) -> list[float]:
        return [row["loss"] for row in self._seeds(table, side)]

    def _by_document(self, table: str, side: Figure) -> list[float]:
        """Means over seeds."""
        each = [row["by_document"] for row in self._seeds(table, side)]
        return [statistics.fmean(some) for some in zip(*each, strict=True)]

    def _seeds(self, table: str, side: Figure) -> list[dict]:
        return [rows[side.length] for rows in self._results[table, side.name]]


def share_recalled(seeds: Sequence[dict]) -> Interval:
    """From results of passkeys, with the wider interval: of the spread between seeds, or of what
    the answers leave open, which are to the same questions."""
    shares, low, high = ([row[key] for row in seeds] for key in ("passkey", "low", "high"))
    low, high = statistics.fmean(low), statistics.fmean(high)
    if len(shares) > 1:
        spread = mean_of(shares)
        low, high = min(low, max(spread.low, 0.0)), max(high, min(spread.high, 1.0))
    return Interval(statistics.fmean(shares), low, high, len(shares))


def beyond(row: dict, tokens: int) -> dict:
    """A result of passkeys with the share of those alone that stand more than `tokens` back."""
    by_text: dict[int, list[bool]] = {}
    for i, (depth, found, _) in enumerate(row["answers"]):
        if (1 - depth) * row["context_length"] > tokens:
            by_text.setdefault(i // row["needles"], []).append(found)
    low, high = interval([*by_text.values()])
    share = statistics.fmean(found for some in by_text.values() for found in some)
    return row | {"passkey": share, "low": low, "high": high}


def recalled(seeds: Sequence[dict]) -> dict:
    """What is said of a model at a context length."""
    found, first = share_recalled(seeds), seeds[0]
    return {
        **{name: first[name] for name in ("metric", "needle", "needles", "trials")},
        "passkey": found.mean,
        "low": found.low,
        "high": found.high,
        "by_seed": [row["passkey"] for row in seeds],
        "answers": [answer for row in seeds for answer in row["answers"]],
    }


def _size(value: Interval) -> Interval:
    """Of a value that may be negative, how far it is from 0."""
    near, far = sorted(map(abs, (value.low, value.high)))
    return Interval(abs(value.mean), 0.0 if value.low <= 0 <= value.high else near, far, value.n)
