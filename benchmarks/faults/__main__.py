"""How our programs end on damaged and hostile files, started twice at once, and killed.

Prints counts, and each that ends badly by name. Folders and files of every kind that the tools read
are made by the tools themselves, of one small model. Then a copy is damaged at random, or something
hostile is put into it, and the programs that read it run, each bounded in memory and time. A good
end is a sentence and an exit code, or the same result, byte for byte, as of the clean files; for
pairs and kills see pairs.py. The exit code is 1 where code of a file was executed, a program
hung, passed its memory or ended in a traceback, a change was not seen for no reason that UNSEEN in
damages.py gives, or an output was lost or wrong after a pair or a kill.
"""

import argparse
import fnmatch
import hashlib
import itertools
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

import damages
import hostile_code
import hostile_files
import material
import pairs
from attempt import MEBIBYTES, SECONDS, Ended, attempt

from pose_megatron.checkpoints.megatron.torch_dist_metadata import read_metadata

BAD = ("executed", "hung", "memory", "killed", "traceback", "unseen")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/faults --damages 360 --large",
    )
    parser.add_argument("--damages", type=int, default=54, help="how many [54]")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn with [0]")
    parser.add_argument(
        "--large", action="store_true", help="hostile files that unpack to 10 GB, not 1"
    )
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="hostile files with these words in the name"
    )
    parser.add_argument(
        "--pairs", type=int, default=2, help="pairs and kills, so many of each for every tool [2]"
    )
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        room = Room(Path(name))
        if args.damages:
            run_damages(room, args.damages, args.seed)
        run_hostile(room, args.large, args.only)
        counts = run_pairs(room.clean, args.pairs, args.seed)
    room.print_table()
    print_counts(counts, pairs.COLUMNS)
    if args.output:
        figures = room.figures() | {"pairs": {kind: dict(hows) for kind, hows in counts.items()}}
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    bad = sum(hows[how] for hows in counts.values() for how in pairs.BAD)
    return 1 if room.bad() or bad else 0


class Room:
    """The clean material, a copy to spoil, and the counts."""

    def __init__(self, root: Path):
        self._root = root
        self.clean = material.make(root / "clean")
        self.marker = root / "executed"
        self._right: dict[str, tuple[Ended, str]] = {}
        self._counts: dict[str, Counter[str]] = {}
        self._named: list[str] = []
        self._most = 0.0

    def fresh_copy(self) -> Path:
        copy = self._root / "in"
        shutil.rmtree(copy, ignore_errors=True)
        return shutil.copytree(self.clean, copy, symlinks=True)

    def run(self, program: str, folder: Path) -> tuple[Ended, str]:
        """How a program ends, and a digest of its result."""
        out = self._root / "out"
        shutil.rmtree(out, ignore_errors=True)
        where = {"clean": self.clean, "in": folder, "out": out}
        ended = attempt([word.format(**where) for word in program.split()])
        self._most = max(self._most, ended.mebibytes)
        said = ended.said.replace(str(folder), "") if program.startswith("inspect") else ""
        return ended, _digest(out) + said

    def right(self, program: str) -> str:
        """The result of the clean files; the same twice, or comparing means nothing."""
        if program not in self._right:
            first, second = (self.run(program, self.fresh_copy()) for _ in range(2))
            if first[0].how != "accepted" or first[1] != second[1]:
                raise RuntimeError(f"{program}: {first[0].how}, {first[0].said}")
            self._right[program] = first
        return self._right[program][1]

    def count(self, kind: str, how: str, name: str, program: str, ended: Ended) -> None:
        self._counts.setdefault(kind, Counter())[how] += 1
        if how in BAD or how.startswith("unseen"):
            self._named.append(f"{how}: {name}; {program.split()[0]}: {ended.last_line[:300]}")
            print(self._named[-1], flush=True)

    def bad(self) -> int:
        return sum(counts[how] for counts in self._counts.values() for how in BAD)

    def figures(self) -> dict:
        return {
            "counts": {kind: dict(counts) for kind, counts in self._counts.items()},
            "named": self._named,
            "most_mebibytes": round(self._most),
        }

    def print_table(self) -> None:
        print(f"\nbounds: {MEBIBYTES} MiB, {SECONDS} s; most taken: {self._most:.0f} MiB\n")
        print_counts(self._counts, COLUMNS)
        reasons = Counter(
            how.removeprefix("unseen, ")
            for counts in self._counts.values()
            for how in counts.elements()
            if how.startswith("unseen, ")
        )
        for reason, number in reasons.items():
            print(f"\nnot seen, {number}: {reason}")


COLUMNS = ("refused", "no effect", *BAD)


def print_counts(rows: dict[str, Counter[str]], columns: Sequence[str]) -> None:
    print("\n| | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for kind, counts in rows.items():
        print(f"| {kind} | " + " | ".join(str(counts[how]) for how in columns) + " |")


def run_pairs(clean: Path, rounds: int, seed: int) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    total = 2 * rounds * len(pairs.COMMANDS)
    for outcome in _with_progress("pairs, kills", pairs.run(clean, rounds, seed), total):
        counts.setdefault(outcome.kind, Counter())[outcome.how] += 1
        if outcome.how in pairs.BAD:
            print(f"{outcome.how}: {outcome.kind}: {outcome.said[-1000:]}", flush=True)
    return counts


def run_damages(room: Room, count: int, seed: int) -> None:
    for damage in _with_progress("damaged", damages.draw(room.clean, count, seed)):
        for program in damage.target.programs:
            right = room.right(program)
            folder = room.fresh_copy()
            damage.apply(folder)
            ended, result = room.run(program, folder)
            how = ended.how
            if how == "accepted":
                how = "no effect" if result == right else _unseen(damage, program)
            room.count(damage.target.name, how, str(damage), program, ended)


def run_hostile(room: Room, large: bool, only: str) -> None:
    cases = (hostile_code.code(room.marker), hostile_files.files(room.clean, large))
    chosen = (case for case in itertools.chain(*cases) if only in f"{case.kind}: {case.name}")
    for case in _with_progress("hostile", chosen):
        folder = room.fresh_copy()
        case.put(folder)
        for program in case.programs:
            ended, _ = room.run(program, folder)
            how = ended.how
            if room.marker.exists():
                room.marker.rmdir()
                how = "executed"
            elif how == "accepted":
                how = "no effect" if case.harmless or _passes_over(program) else "unseen"
            room.count(case.kind, how, case.name, program, ended)


def _with_progress(what: str, items: Iterable, total: int | None = None) -> Iterator:
    """The items; done, rate and time left go to stderr, also without a terminal."""
    found, seconds = items if total else list(items), 0.1 if sys.stderr.isatty() else 30
    return iter(tqdm(found, desc=what, total=total, mininterval=seconds))


def _passes_over(program: str) -> bool:
    """Whether a program may end well beside something hostile that it does not read."""
    describes = program.startswith("inspect") and not {"--verify", "--diff"} & {*program.split()}
    return describes or "--load-fallback" in program


def _unseen(damage: damages.Damage, program: str) -> str:
    for pattern, words, reason in damages.UNSEEN:
        if fnmatch.fnmatch(f"{damage.kind} {damage.file}", pattern) and words in program:
            return f"unseen, {reason}"
    return "unseen"


def _digest(folder: Path) -> str:
    """Of every file's name and bytes, but summaries have rates. Of tensors of a checkpoint it is
    their bytes in the order of their names: the order in the files differs from run to run."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.name == ".metadata":
            for name, content in _stored(file):
                digest.update(name.encode() + content)
        elif file.suffix != ".distcp" and not file.name.endswith("_summary.json"):
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _stored(metadata: Path) -> Iterator[tuple[str, bytes]]:
    """What a checkpoint's files hold, by name and place."""
    index = read_metadata(metadata)
    places = [
        (f"{chunk.key} {chunk.corner}", chunk.file, chunk.offset, chunk.length)
        for tensor in index.tensors.values()
        for chunk in tensor.chunks
    ]
    places += [(key, *place) for key, place in index.objects.items()]
    for name, file, offset, length in sorted(places):
        with open(metadata.parent / file, "rb") as opened:
            opened.seek(offset)
            yield name, opened.read(length)


if __name__ == "__main__":
    sys.exit(main())
