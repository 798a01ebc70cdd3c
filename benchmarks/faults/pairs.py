"""Tools of ours started twice at once on one output, and killed at random and started again.

A good end of a pair is one right output and one refusal, or two right outputs; of a kill, that what
lies under the output's name meanwhile is the right output or is refused, and that the same command
again makes it. Right is what the command alone wrote.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attempt import Attempt, Ended
from material import SHAPE, TRAINING

# By tool: {clean} is the folder of material.make(), {out} the place for the output.
TOKENIZER = (
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model {clean}/tokenizer "
    "--tokenizer-library own"
)
COMMANDS = {
    "train-tokenizer": "--input {clean}/corpus.jsonl --vocab-size 400 --output-dir {out}/x",
    "preprocess": f"--input {{clean}}/corpus.jsonl --output-prefix {{out}}/x {TOKENIZER}",
    "merge": "--input {clean}/corpus_text_document {clean}/corpus_text_document "
    "--output-prefix {out}/x",
    "materialize": f"--output {{out}}/x --samples 64 --train-iters 4 {SHAPE} {TRAINING}",
    "convert": "--loader megatron --saver hf --load-dir {clean}/run --save-dir {out}/x",
}
# What an output is found by: where one of these is missing, readers refuse it.
FOUND_BY = {
    "train-tokenizer": ("x/tokenizer.json", "x/tokenizer_config.json", "x/tokenizer.model"),
    "preprocess": ("x_text_document.bin", "x_text_document.idx"),
    "merge": ("x.bin", "x.idx"),
    "materialize": ("x.json",),
    "convert": ("x",),
}
BAD = ("lost", "half-written", "left over", "hung", "silent", "traceback")
COLUMNS = ("right", "refused", *BAD)


@dataclass(frozen=True)
class Outcome:
    """One pair, or one kill.

    Attributes:
        kind: the tool, and what was done.
        how: of COLUMNS. "right": both of a pair, or the second start after a kill, made the right
            output; "refused": one of a pair was, beside the right output. "lost": in the end there
            is no output; "half-written": after a kill one is found that is not right; "left over":
            in the end something lies beside it; "silent": it is wrong, at exit code 0.
        said: what the programs printed.
    """

    kind: str
    how: str
    said: str


def run(clean: Path, rounds: int, seed: int) -> Iterator[Outcome]:
    """Pairs and kills of every tool, so many of each, in turn.

    Args:
        clean: the folder of material.make().
    """
    choose = random.Random(seed)
    for tool in COMMANDS:
        with tempfile.TemporaryDirectory(prefix="pairs-") as name:
            bench = _Bench(tool, clean, Path(name) / "out")
            for _ in range(rounds):
                yield Outcome(f"{tool}, twice at once", *bench.pair(choose))
                yield Outcome(f"{tool}, killed", *bench.kill(choose))


class _Bench:
    """One tool, its time, and its right output."""

    def __init__(self, tool: str, clean: Path, out: Path):
        self._tool, self._clean, self._out = tool, clean, out
        begin = time.monotonic()
        ended = self._start().end()
        if ended.how != "accepted":
            raise RuntimeError(f"{tool}: {ended.how}, {ended.said}")
        self._seconds, self._right = time.monotonic() - begin, self._contents()

    def pair(self, choose: random.Random) -> tuple[str, str]:
        """On nothing, or both replace an output; the second at once, or during the first."""
        more = choose.choice(((), ("--overwrite",)))
        if not more:
            shutil.rmtree(self._out)
        first = self._start(*more)
        time.sleep(choose.choice((0, choose.random())) * self._seconds)
        second = self._start(*more)
        ends = [first.end(), second.end()]
        return self._judged(ends), "".join(ended.said for ended in ends)

    def kill(self, choose: random.Random) -> tuple[str, str]:
        """At any moment while it replaces an output; then the same command again."""
        killed = self._start("--overwrite")
        time.sleep(choose.random() * self._seconds)
        killed.kill()
        ends = [killed.end()]
        found = self._contents()
        wrong = self._is_found() and any(found.get(name) != x for name, x in self._right.items())
        ends.append(self._start("--overwrite").end())
        how = "half-written" if wrong else self._judged(ends)
        return how, "".join(ended.said for ended in ends)

    def _start(self, *more: str) -> Attempt:
        words = COMMANDS[self._tool].split()
        words = [word.format(clean=self._clean, out=self._out) for word in words]
        return Attempt([self._tool, *words, *more])

    def _is_found(self) -> bool:
        return all((self._out / name).exists() for name in FOUND_BY[self._tool])

    def _contents(self) -> dict[str, bytes]:
        """What each file holds; a summary has rates, which differ."""
        files = (path for path in self._out.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self._out)): b""
            if path.name.endswith("_summary.json")
            else path.read_bytes()
            for path in files
        }

    def _judged(self, ends: Sequence[Ended]) -> str:
        hows = {ended.how for ended in ends}
        for bad in ("hung", "traceback"):
            if bad in hows:
                return bad
        found = self._contents()
        if found == self._right:
            return "refused" if "refused" in hows else "right"
        if not self._is_found():
            return "lost"
        if all(found.get(name) == content for name, content in self._right.items()):
            return "left over"
        return "silent" if "accepted" in hows else "half-written"
