"""Random damage to files that our programs read: what a disk, a copy or an editor does to them."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programs import INSPECT_TOKENS, MERGE, RESUME, SAMPLES, TOKENIZE, TRAIN, convert


@dataclass(frozen=True)
class Target:
    """What is damaged, and what then reads it.

    Attributes:
        name: for the table.
        files: pattern of the files that are damaged, one at a time, in the folder of make().
        programs: command lines; {in} is the damaged copy of that folder, {out} a place for results.
    """

    name: str
    files: str
    programs: tuple[str, ...]


TARGETS = [
    Target(
        "a run's checkpoint",
        "run/iter_0000002/[!_]*",  # all but the tensors
        (convert("run", "megatron"), "inspect --verify {in}/run", RESUME),
    ),
    Target(
        "its tensors",
        "run/iter_0000002/__*.distcp",
        (
            convert("run", "megatron"),
            "inspect --verify {in}/run",
            f"{RESUME} --checksums",
            RESUME,
        ),
    ),
    Target("a Hugging Face folder", "hf/*", (convert("hf", "hf"), "inspect {in}/hf")),
    Target("pytorch_model.bin", "bin/*.bin", (convert("bin", "hf"),)),
    Target("a Meta folder", "meta/*", (convert("meta", "meta"), "inspect --verify {in}/meta")),
    Target("a legacy checkpoint", "legacy/*/*/*.pt", (convert("legacy", "megatron"),)),
    Target("token files", "corpus_*", (INSPECT_TOKENS, MERGE, TRAIN)),
    Target(
        "materialised samples",
        "samples*",
        ("inspect {in}/samples", SAMPLES),
    ),
    Target("a tokenizer", "tokenizer/*", (TOKENIZE,)),
]

# Damage that no program can see, or that one is not asked to: (pattern of "KIND PATH", words of the
# program, reason).
UNSEEN = [
    ("missing */*", "", "a folder without that file is whole, too"),
    ("* *.safetensors", "", "safetensors has no checksums"),
    ("other *.distcp", "", "a whole file of another iteration is as it was written"),
    (
        "* *.distcp",
        "pretrain",
        "--checksums is a flag in training: it costs more than 5 % of a load",
    ),
    ("* corpus*", "pretrain", "training reads of a corpus what it draws; inspect reads all of it"),
    ("* samples*", "pretrain", "training reads samples one by one; inspect reads all of them"),
    ("* */tokenizer*", "", "another valid tokenizer: its files have no checksums"),
    ("* *.json", "", "another valid value: JSON has no checksums"),
]


@dataclass(frozen=True)
class Damage:
    """One file damaged in one way."""

    target: Target
    file: str  # within the folder of make()
    kind: str
    seed: int

    def apply(self, folder: Path) -> None:
        _KINDS[self.kind](folder / self.file, random.Random(self.seed))

    def __str__(self) -> str:
        return f"{self.kind} of {self.file}, seed {self.seed}"


def draw(clean: Path, count: int, seed: int) -> Iterator[Damage]:
    """Damages, so that each target, file and kind has its turn; half of them are single bits, and
    every second one of a JSON file is another value in it."""
    choose = random.Random(seed)
    for index in range(count):
        target = TARGETS[index % len(TARGETS)]
        file = choose.choice(sorted(path for path in clean.glob(target.files) if path.is_file()))
        kind = "value" if file.suffix == ".json" else "bit"
        if choose.random() < 0.5:
            kind = choose.choice([kind for kind in _KINDS if kind != "value"])
        yield Damage(target, str(file.relative_to(clean)), kind, choose.randrange(1 << 30))


def _bit(file: Path, choose: random.Random) -> None:
    content = bytearray(file.read_bytes())
    bit = choose.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def _cut(file: Path, choose: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: choose.randrange(len(content))])


def _zeros(file: Path, choose: random.Random) -> None:
    """A block that was never written."""
    content = bytearray(file.read_bytes())
    begin = choose.randrange(max(len(content) // 512, 1)) * 512
    length = len(content[begin : begin + 512])
    content[begin : begin + length] = bytes(length)
    file.write_bytes(content)


def _swap(file: Path, choose: random.Random) -> None:
    content = file.read_bytes()
    first, second, third = sorted(choose.randrange(len(content) + 1) for _ in range(3))
    file.write_bytes(
        content[:first] + content[second:third] + content[first:second] + content[third:]
    )


def _longer(file: Path, choose: random.Random) -> None:
    with open(file, "ab") as out:
        out.write(choose.randbytes(choose.randrange(1, 600)))


def _empty(file: Path, choose: random.Random) -> None:
    file.write_bytes(b"")


def _missing(file: Path, choose: random.Random) -> None:
    file.unlink()


def _noise(file: Path, choose: random.Random) -> None:
    file.write_bytes(choose.randbytes(file.stat().st_size))


def _other(file: Path, choose: random.Random) -> None:
    """The file of a neighbour: of another iteration, or another one of the same folder."""
    others = [path for path in sorted(file.parent.iterdir()) if path.is_file() and path != file]
    before = file.parent.with_name("iter_0000001") / file.name
    if others := ([before] if before.is_file() else others):
        shutil.copyfile(choose.choice(others), file)


def _value(file: Path, choose: random.Random) -> None:
    """Another JSON value in one place."""
    content = json.loads(file.read_text(encoding="utf-8"))
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(items)[:50]:
            places.append((value, key))
            if isinstance(inner, dict | list):
                visit(inner)

    visit(content)
    holder, key = choose.choice(places)
    holder[key] = choose.choice(
        [None, True, -1, 0, 2.5, 10**9, 10**30, float("nan"), "", "word", [], {}, [[]], {"a": 1}]
    )
    file.write_text(json.dumps(content), encoding="utf-8")


_KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "bit": _bit,
    "cut": _cut,
    "zeros": _zeros,
    "swap": _swap,
    "longer": _longer,
    "empty": _empty,
    "missing": _missing,
    "noise": _noise,
    "other": _other,
    "value": _value,
}
