"""Every tool, killed at each of its steps on disk: whole or refused, and the next start ends it.

A step is a call that changes a folder or puts something on disk; the n-th one of a process kills
it, for every n that there is. What readers then find under the output's name is the old output, the
new one, or nothing, and the same command once more makes it the new one and leaves nothing else.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pose_megatron.checkpoints.convert import convert
from pose_megatron.commands import merge, train_tokenizer
from pose_megatron.data import materialized
from pose_megatron.preprocessing.preprocess import PreprocessingJob, preprocess
from pose_megatron.runtime import cli
from tests.conftest import STDLIB, write_corpus
from tests.functional_tests.families import CASES, make

STEPS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
Found = dict[str, bytes] | None


def forked(work: Callable[[], object], kill_at: int = 0) -> tuple[int, str]:
    """Does the work in another process, killed before a step; its exit code, and what it said."""
    receiver, sender = os.pipe()
    if not (child := os.fork()):
        code = 99
        try:
            os.close(receiver)
            os.dup2(sender, 1)
            os.dup2(sender, 2)
            sys.stdout = sys.stderr = os.fdopen(sender, "w", buffering=1)
            # What another test has joined ends there: leaving it in a fork waits for ever.
            cli._process_group = lambda: None
            _die_at(kill_at)
            code = work() or 0
        except (ValueError, OSError) as error:
            print(error)
            code = 1
        finally:
            os._exit(code)
    os.close(sender)
    with open(receiver) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def _die_at(step: int) -> None:
    steps = itertools.count(1)

    def counted(real, only_flushes):
        def call(*arguments, **options):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            # A kill loses nothing that was written, flushed to disk or not.
            return None if only_flushes else real(*arguments, **options)

        return call

    for name, real in {name: getattr(os, name) for name in STEPS}.items():
        setattr(os, name, counted(real, name == "fsync"))


def contents(paths: Iterator[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(paths) if path.is_file()}


def tool(main: Callable[[], int], *words) -> int:
    sys.argv = ["tool", *map(str, words)]
    return main()


class Merging:
    """Shards a and b into c, where there is an older c."""

    def __init__(self, folder: Path):
        self.shards = [write_corpus(folder / name, [[i, 2, 3]] * 5) for i, name in enumerate("ab")]

    def old(self, out: Path):
        return tool(merge.main, "--input", self.shards[1], "--output-prefix", out / "c")

    def new(self, out: Path):
        words = ("--input", *self.shards, "--output-prefix", out / "c", "--overwrite")
        return tool(merge.main, *words)

    def views(self, out: Path) -> list[Found]:
        return [contents(out.glob("c.*")) if (out / "c.idx").exists() else None]


class Materializing:
    """Other samples in the place of old ones."""

    def __init__(self, folder: Path):
        pass

    def _write(self, out: Path, first: int):
        rows = [dict.fromkeys(materialized.PARTS.values(), _row(first + i)) for i in range(4)]
        words = {"window": 8, "target": 99, "samples": 4, "law": "", "positions": {}}
        materialized.write(str(out / "m"), rows, 99, words, overwrite=first > 0)

    def old(self, out: Path):
        self._write(out, 0)

    def new(self, out: Path):
        self._write(out, 10)

    def views(self, out: Path) -> list[Found]:
        return [contents(out.glob("m[_.]*")) if (out / "m.json").exists() else None]


def _row(first: int):
    import numpy as np

    return np.arange(first, first + 8)


class Preprocessing:
    """A corpus of two keys."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name, texts in (("old", ["x y"] * 3), ("new", ["y", "z x"])):
            lines = (json.dumps({"text": text, "title": text[0]}) + "\n" for text in texts)
            (folder / f"{name}.jsonl").write_text("".join(lines))
        (folder / "tok").mkdir()
        (folder / "tok" / "tokenizer.json").write_text(_letters())
        (folder / "tok" / "tokenizer_config.json").write_text("{}")

    def _run(self, out: Path, name: str):
        preprocess(
            PreprocessingJob(
                [str(self.folder / f"{name}.jsonl")],
                str(out / "c"),
                "HuggingFaceTokenizer",
                str(self.folder / "tok"),
                ("text", "title"),
                tokenizer_library="own",
                overwrite=name == "new",
            )
        )

    def old(self, out: Path):
        self._run(out, "old")

    def new(self, out: Path):
        self._run(out, "new")

    def views(self, out: Path) -> list[Found]:
        pairs = (f"c_{key}_document" for key in ("text", "title"))
        return [
            contents(out.glob(f"{pair}.*")) if (out / f"{pair}.idx").exists() else None
            for pair in pairs
        ]


def _letters() -> str:
    import tokenizers

    return tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"x": 0, "y": 1, "z": 2, " ": 3, "?": 4}, unk_token="?")
    ).to_str()


class TrainingATokenizer:
    """One of another size."""

    def __init__(self, folder: Path):
        import sysconfig

        self.corpus = folder / "corpus.jsonl"
        library = Path(sysconfig.get_path("stdlib"))
        rows = ({"text": (library / f"{name}.py").read_text()[:3000]} for name in STDLIB[:8])
        self.corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _train(self, out: Path, size: int, *more):
        words = ("--input", self.corpus, "--output-dir", out / "t", "--vocab-size", size, *more)
        return tool(train_tokenizer.main, *words)

    def old(self, out: Path):
        return self._train(out, 380)

    def new(self, out: Path):
        return self._train(out, 390, "--overwrite")

    def views(self, out: Path) -> list[Found]:
        for_transformers = contents((out / "t").glob("*.json"))
        return [
            for_transformers if len(for_transformers) == 2 else None,
            contents((out / "t").glob("*.model")) or None,
        ]


class Converting:
    """Another model in the place of an old one."""

    def __init__(self, folder: Path):
        self.folder = folder
        make(CASES["LLaMA 2"], folder / "old")
        make(CASES["Mistral"], folder / "new")

    def _convert(self, out: Path, name: str):
        load, save = self.folder / name, out / "hf"
        convert(load, save, loader="hf", saver="hf", overwrite=name == "new", quiet=True)

    def old(self, out: Path):
        self._convert(out, "old")

    def new(self, out: Path):
        self._convert(out, "new")

    def views(self, out: Path) -> list[Found]:
        return [contents((out / "hf").iterdir()) if (out / "hf").exists() else None]


@pytest.mark.parametrize(
    "kind", [Merging, Materializing, Preprocessing, TrainingATokenizer, Converting]
)
def test_killed_at_any_step_it_is_old_or_new_or_refused(kind, tmp_path):
    import transformers  # noqa: F401  once, not in every process

    job = kind(tmp_path)
    for name, works in (("was", [job.old]), ("is", [job.old, job.new])):
        (tmp_path / name).mkdir()
        for work in works:
            code, said = forked(lambda work=work, name=name: work(tmp_path / name))
            assert code == 0, said
    old, new = job.views(tmp_path / "was"), job.views(tmp_path / "is")
    assert None not in old + new and all(one != two for one, two in zip(old, new, strict=True))
    names = {path.name for path in (tmp_path / "is").rglob("*")}
    seen, out = set(), tmp_path / "out"
    for step in itertools.count(1):
        shutil.copytree(tmp_path / "was", out)
        code, said = forked(lambda: job.new(out), step)
        for one, was, will in zip(job.views(out), old, new, strict=True):
            assert one in (None, was, will), (step, one and one.keys(), said)
            seen.add("refused" if one is None else "old" if one == was else "new")
        if code == 0:
            break
        assert code == -signal.SIGKILL, (step, said)
        code, said = forked(lambda: job.new(out))
        assert code == 0, (step, said)
        assert job.views(out) == new, step
        assert {path.name for path in out.rglob("*")} == names, step
        shutil.rmtree(out)
    assert {"old", "new"} <= seen and step > 10


def test_what_was_put_in_the_place_of_what_a_killed_job_moved_away_is_kept(tmp_path):
    """Killed between its renames; then something else is put there, and nothing is deleted."""
    job, out = Converting(tmp_path), tmp_path / "out"
    assert forked(lambda: job.old(out))[0] == 0
    for step in itertools.count(1):
        code, _ = forked(lambda: job.new(out), step)
        assert code, "no step at which the old one is moved away"
        if not (out / "hf").exists():
            break
    (out / "hf").mkdir()
    (out / "hf" / "mine").touch()
    code, said = forked(lambda: job.new(out))
    assert code == 1 and f"what it was is in {out}/.hf.old, and since then" in said
    (out / "hf" / "mine").unlink()
    with contextlib.suppress(FileNotFoundError):
        (out / "hf").rmdir()
    assert forked(lambda: job.new(out)) == (0, "")
    assert [path.name for path in out.iterdir()] == ["hf"]
