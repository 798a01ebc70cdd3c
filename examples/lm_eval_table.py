"""What lm_eval found for two models, side by side, as a Markdown table.

    python examples/lm_eval_table.py BASE_1 BASE_2 ... EXTENDED_1 EXTENDED_2 ...

Folders as examples/lm_eval.sh makes them: one for each task of the first model, then for the same
tasks of the second. ± is the standard error of a mean over questions. Both models answer the same
questions, so the difference is a mean of differences, and its error is smaller than the two errors
beside it suggest.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple


class Answers(NamedTuple):
    """One metric of one task: its value for each question, by the question's number."""

    shots: int
    values: dict[int, float]


def answers(folder: Path) -> dict[tuple[str, str], Answers]:
    """By task and metric, all that are means over questions. A group's tasks are apart."""
    whole = json.loads(next(folder.glob("out_*.json")).read_text())
    found = {}
    for file in sorted(folder.glob("samples_*.jsonl")):
        task = file.name.removeprefix("samples_").rpartition("_")[0]
        rows = [json.loads(line) for line in file.open()]
        said = whole["results"][task]
        for metric in dict.fromkeys(name for row in rows for name in row["metrics"]):
            for kind in dict.fromkeys(row["filter"] for row in rows):
                some = {r["doc_id"]: r.get(metric) for r in rows if r["filter"] == kind}
                mean = said.get(f"{metric},{kind}")
                if not all(isinstance(value, int | float) for value in (mean, *some.values())):
                    continue
                if abs(statistics.fmean(some.values()) - mean) < 1e-6:
                    name = metric if kind == "none" else f"{metric}, {kind}"
                    found[task, name] = Answers(whole["n-shot"][task], some)
    return found


def cell(values: list[float], sign: str = "") -> str:
    """Mean and standard error, in percent."""
    mean = f"{100 * statistics.fmean(values):{sign}.2f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.2f}"


def main(folders: list[Path]) -> None:
    print("| task | shots | metric | questions | base | extended | difference |")
    print("|---|---:|---|---:|---:|---:|---:|")
    half = len(folders) // 2
    for before, after in zip(folders[:half], folders[half:], strict=True):
        base, extended = answers(before), answers(after)
        # What is no mean may look like one for one of them, by chance.
        for task, metric in (key for key in base if key in extended):
            shots, values = base[task, metric]
            other = extended[task, metric].values
            if values.keys() != other.keys():
                sys.exit(f"{before} and {after} hold other questions; remove both and run again")
            one, two = list(values.values()), [other[question] for question in values]
            change = [b - a for a, b in zip(one, two, strict=True)]
            cells = [task, shots, metric, len(one), cell(one), cell(two), cell(change, "+")]
            print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main([*map(Path, sys.argv[1:])])
