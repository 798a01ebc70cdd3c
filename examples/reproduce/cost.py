"""Figure 3: what a step costs, from the figures of benchmarks/full_length.py."""

import statistics
from collections.abc import Iterator

from pose_megatron.evaluation.claims import Interval, Verdict, at_most, mean_of

LIKE = 1.1  # times: a cost that is called the same
_NAMES = {"pose": "PoSE", "full": "full length"}


def cost_rows(found: dict) -> Iterator[dict]:
    """Seconds and memory of a step, by the length that is trained for."""
    length = found["settings"]["seq_length"]
    made = {name: found[name] for name in ("device", "date", "threads")}
    made |= {"command": "python benchmarks/full_length.py", "ranks": 1}
    made["versions"] = {name: found[name] for name in ("torch", "megatron-core")}
    for row in found["results"]:
        of = {"name": _NAMES[row["kind"]], "context_length": row["target"], "made": made}
        of |= {"hidden_size": found["settings"]["hidden_size"], "window": length}
        yield {"metric": "seconds", **of, "seconds": row["seconds"]}
        yield {"metric": "memory", **of, "memory": row["bytes"] / 2**20}


def cost_verdicts(found: dict) -> Iterator[Verdict]:
    """Whether PoSE costs as much for every target, and full length more than its share."""
    length, factors = found["settings"]["seq_length"], found["settings"]["factors"]
    steps = {(row["kind"], row["target"] // length): row["steps"] for row in found["results"]}
    far, near = steps["pose", factors[-1]], steps["pose", factors[0]]
    same = times(far, near)
    text = f"Figure 3: to {factors[-1]} L a step of PoSE takes at most {LIKE} times that to "
    yield at_most(f"{text}{factors[0]} L", same, LIKE, _told(same))
    more = times(steps["full", factors[-1]], far)
    text = f"Figure 3: to {factors[-1]} L a full-length step takes at least {factors[-1]} times "
    yield at_most(f"{text}PoSE's", -more, -factors[-1], _told(more))


def times(one: list[float], other: list[float]) -> Interval:
    """How many times as long one takes as the median of the other."""
    return mean_of([seconds / statistics.median(other) for seconds in one])


def _told(value: Interval) -> str:
    return f"{value.mean:.2f} times ({value.low:.2f} to {value.high:.2f}, {value.n} steps)"
