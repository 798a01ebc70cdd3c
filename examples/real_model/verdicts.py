"""What the figures of run.sh say of the claims that it was made for.

    python examples/real_model/verdicts.py RESULTS.jsonl

Losses are compared document by document, shares of passkeys by Newcombe's interval; see
pose_megatron/evaluation/claims.py. They go to RESULTS.verdicts.json, too, for tools/report.py.
"""

import argparse
from pathlib import Path

from pose_megatron.evaluation import results
from pose_megatron.evaluation.claims import (
    Interval,
    Verdict,
    at_most,
    difference_of_shares,
    mean_of,
    write_verdicts,
)

BASE, PLAIN, POSE = "as it was", "plain positions", "PoSE"
LOST_INSIDE = 0.05  # nats

Points = dict[int, dict]  # {context length: result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--window", type=int, default=8192, help="of the model as it was [8192]")
    flags = parser.parse_args()
    path = flags.results
    losses, passkeys = (
        {curve.name: curve.points for curve in results.read([str(path)], metric)}
        for metric in ("perplexity", "passkey")
    )
    verdicts = [*of_losses(losses, flags.window), *of_passkeys(passkeys)]
    write_verdicts(path.with_suffix(".verdicts.json"), verdicts)
    for verdict in verdicts:
        print(f"{verdict.verdict:12}  {verdict.claim}: {verdict.numbers}")


def of_losses(models: dict[str, Points], window: int) -> list[Verdict]:
    base, plain, pose = (models[name] for name in (BASE, PLAIN, POSE))
    broken = window * 5 // 4  # up to there the model as it was still reads
    inside = [end for end in base if end <= window]
    beyond = [end for end in base if end > broken]
    last = max(beyond)
    at_home = base[window]["by_document"]

    def differences(one: list[float], other: list[float]) -> Interval:
        return mean_of([a - b for a, b in zip(one, other, strict=True)])

    breaks = differences(base[last]["by_document"], at_home)
    found = [
        at_most(
            f"the model as it was loses at least 0.5 nats more in its last bin (to {last:,}) "
            f"than in the last one of its window",
            -breaks,
            -0.5,
            nats(breaks),
        )
    ]
    worst, end = highest((differences(pose[end]["by_document"], at_home), end) for end in beyond)
    found.append(
        at_most(
            f"with PoSE no bin beyond {broken:,} has a loss above that",
            worst,
            0.0,
            f"worst to {end:,}: {nats(worst)}",
        )
    )
    gain = differences(plain[last]["by_document"], pose[last]["by_document"])
    found.append(
        at_most(
            "the same training at plain positions loses more there than PoSE",
            -gain,
            0.0,
            nats(gain),
        )
    )
    worst, end = highest(
        (differences(pose[end]["by_document"], base[end]["by_document"]), end) for end in inside
    )
    found.append(
        at_most(
            f"inside the old window PoSE costs at most {LOST_INSIDE} nats",
            worst,
            LOST_INSIDE,
            f"worst to {end:,}: {nats(worst)}",
        )
    )
    return found


def of_passkeys(models: dict[str, Points]) -> list[Verdict]:
    def share(name: str, length: int) -> Interval:
        row = models[name][length]
        return Interval(row["passkey"], row["low"], row["high"], len(row["answers"]))

    near, far = min(models[BASE]), max(models[BASE])
    base_near, base_far = share(BASE, near), share(BASE, far)
    pose, plain = share(POSE, far), share(PLAIN, far)
    return [
        at_most(
            f"the model as it was finds fewer than one passkey in five at {far:,}",
            base_far,
            0.2,
            percent(base_far),
        ),
        at_most(
            f"with PoSE they are found there at least as often as it found them at {near:,}",
            difference_of_shares(base_near, pose),
            0.0,
            f"{percent(pose)} against {percent(base_near)}",
        ),
        at_most(
            "and more often than after the same training at plain positions",
            difference_of_shares(plain, pose),
            0.0,
            f"{percent(pose)} against {percent(plain)}",
        ),
    ]


def highest(values) -> tuple[Interval, int]:
    return max(values, key=lambda value: value[0].mean)


def nats(value: Interval) -> str:
    return value.in_nats("documents")


def percent(share: Interval) -> str:
    return f"{share.mean:.0%} ({share.low:.0%} to {share.high:.0%})"


if __name__ == "__main__":
    main()
