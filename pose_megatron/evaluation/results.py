"""Results of evaluations: JSON lines out, and curves of like results in.

A result is one JSON object: name, metric (one of METRICS), context_length in tokens, the metric's
value under its own name, and whatever else its program has to say: what else it measured, and under
which conditions. Results of one name under one set of conditions are a curve; what differs is kept
apart, and told in the label. Those of RULER's tasks say their task, and a curve holds the mean.
"""

import contextlib
import fcntl
import json
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pose_megatron.errors import ConfigError

SHARES = ("passkey", "ruler")  # of what was asked for
COSTS = ("seconds", "memory")  # of a training step
METRICS = ("perplexity", *SHARES, *COSTS)
# What an evaluation finds, and how it was made; all else that a result says is a condition. So are
# `tokens` and `documents`, how many are scored: sliding windows have the same at all lengths.
_FOUND = {
    "context_length",
    "loss",
    "standard_error",
    "by_document",
    "by_seed",
    "low",
    "high",
    "digits",
    "answers",
    "task",
    "made",
    *METRICS,
}
_NUMBERS = {"loss", "standard_error", "low", "high", "digits"}
# Conditions that are the model's: other names have others.
_MODEL = {
    *("load", "iteration", "rope_scaling", "rope_scaling_factor", "rope_scaling_config"),
    *("target", "flags", "seeds"),
}
_UNKNOWN = "not recorded"


@dataclass
class Curve:
    """Results that differ in context length alone.

    Attributes:
        label: the name, and those conditions in which other curves differ.
        points: {context length in tokens: result}; where there are tasks, their mean, at the
            lengths that have all of them.
        tasks: {task: {context length in tokens: result}}, of metric ruler.
    """

    name: str
    conditions: dict[str, Any]
    points: dict[int, dict] = field(default_factory=dict)
    tasks: dict[str, dict[int, dict]] = field(default_factory=dict)
    label: str = ""

    @property
    def lengths(self) -> list[int]:
        """All context lengths, those too that only some tasks have."""
        return sorted({*self.points, *(n for rows in self.tasks.values() for n in rows)})

    @property
    def results(self) -> list[dict]:
        """All results, by task."""
        some = self.tasks.values() if self.tasks else [self.points]
        return [row for rows in some for row in rows.values()]

    def add(self, length: int, row: dict) -> None:
        """A result at a context length; the last of equals counts."""
        if row["metric"] != "ruler":
            self.points[length] = row
            return
        self.tasks.setdefault(str(row["task"]), {})[length] = row
        self.conditions["tasks"] = sorted(self.tasks)
        shared = sorted(set.intersection(*map(set, self.tasks.values())))
        found = {n: [rows[n]["ruler"] for rows in self.tasks.values()] for n in shared}
        self.points = {n: {"ruler": sum(some) / len(some)} for n, some in found.items()}


def append(path: str | None, rows: Iterable[dict]) -> None:
    """Adds results to a file of JSON lines; does nothing without a path.

    Lines stay whole: several evaluators append one after the other, what one that was killed left
    unfinished stays a line of its own, and a full disk takes back what was begun.
    """
    if not path:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        try:
            while lines:
                lines = lines[os.write(file, lines) :]
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def read(files: Sequence[str], metric: str, apart: bool = False) -> list[Curve]:
    """The curves of a metric, in the order of the files; the last of equals counts.

    Args:
        apart: unlike results of one name may be curves of their own even where they could be taken
            for one.

    Raises:
        ConfigError: a file is missing, or a line is not a result; or results of one name that share
            no context length, as the points of one curve would, differ in something else.
    """
    return read_all(files, apart, [metric])[metric]


def read_all(
    files: Sequence[str], apart: bool = False, metrics: Sequence[str] = METRICS
) -> dict[str, list[Curve]]:
    """The curves of each metric that files have results of, in the order of `metrics`.

    Raises:
        ConfigError: as `read`; none of the metrics has results.
    """
    curves: dict[str, dict[str, Curve]] = {metric: {} for metric in metrics}
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"{file}: no such file")
        for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                metric = row["metric"]
                if metric in curves:
                    row |= {name: float(row[name]) for name in {metric, *(_NUMBERS & row.keys())}}
                    length = operator.index(row["context_length"])
                    curve = Curve(str(row["name"]), _conditions(row))
                    key = json.dumps([curve.name, curve.conditions], sort_keys=True)
                    curves[metric].setdefault(key, curve).add(length, row)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise ConfigError(f"{file}:{number}: not a result ({error!r})") from None
    found = {metric: list(some.values()) for metric, some in curves.items() if some}
    if not found:
        wanted = ", ".join(metrics) if len(metrics) > 1 else f"metric '{metrics[0]}'"
        raise ConfigError(f"{', '.join(files)}: no results of {wanted}")
    for some in found.values():
        if not apart:
            _refuse_one_curve_of_unlike(some)
        _label(some)
    return found


def _conditions(row: dict) -> dict[str, Any]:
    found = {*_FOUND, "name", "metric"}
    if row.get("measured") == "by position":
        found.add("tokens")  # by the width of the bin
    return {name: value for name, value in row.items() if name not in found}


def _namesakes(curves: Sequence[Curve]) -> list[list[Curve]]:
    """Curves by name."""
    named: dict[str, list[Curve]] = {}
    for curve in curves:
        named.setdefault(curve.name, []).append(curve)
    return list(named.values())


def lengths_of(curves: Sequence[Curve]) -> list[int]:
    """All context lengths of curves, ascending."""
    return sorted({length for curve in curves for length in curve.lengths})


def differing(curves: Sequence[Curve]) -> list[str]:
    """Names of the conditions in which curves differ."""
    names = dict.fromkeys(name for curve in curves for name in curve.conditions)
    return [
        name
        for name in names
        if len({json.dumps(_value(curve, name), sort_keys=True) for curve in curves}) > 1
    ]


def _value(curve: Curve, name: str) -> Any:
    """The condition's value; None where the result is silent, which is not null."""
    return [curve.conditions[name]] if name in curve.conditions else None


def _refuse_one_curve_of_unlike(curves: Sequence[Curve]) -> None:
    """Where namesakes share no context length, they were meant as one curve."""
    for namesakes in _namesakes(curves):
        lengths = [length for curve in namesakes for length in curve.lengths]
        if len(namesakes) == 1 or len(set(lengths)) < len(lengths):
            continue
        one, other = namesakes[:2]
        told = "; ".join(
            f"{name} {shown(one, name)} and {shown(other, name)}"
            for name in differing([one, other])[:6]
        )
        raise ConfigError(
            f"{one.name}: its results at {_listed(one)} and at {_listed(other)} tokens are no "
            f"curve, they differ in {told}. Evaluate all context lengths in one run, or with other "
            "flags alike; or draw them as curves of their own, with --apart"
        )


def _listed(curve: Curve) -> str:
    return ", ".join(f"{length:,}" for length in curve.lengths)


def _label(curves: Sequence[Curve]) -> None:
    """Labels the curves so that each says in what it differs from others."""
    how = [name for name in differing(curves) if name not in _MODEL]
    for namesakes in _namesakes(curves):
        own = differing(namesakes)
        for curve in namesakes:
            said = (f"{name} {shown(curve, name)}" for name in dict.fromkeys(own + how))
            curve.label = ", ".join([curve.name, *said])


def shown(curve: Curve, name: str) -> str:
    """A condition's value for a person."""
    value = curve.conditions.get(name, _UNKNOWN)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
