"""An unfinished preprocessing run: what it has done so far, on disk.

The folder PREFIX.partial holds unfinished token files, and state.json, which says how far into the
corpus they are whole. After a crash the same command goes on from there, and ends with the same
bytes.
"""

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.encoding import FIRST_SKIPPED, Encoded
from pose_megatron.preprocessing.indexed_writer import IndexedWriter, Size, token_dtype
from pose_megatron.preprocessing.readers import Cursor, Part
from pose_megatron.runtime.atomic_files import write_atomically
from pose_megatron.runtime.json_files import read_json

# What stopped at the first control token has none so far: any handling may go on from there.
NONE_SO_FAR = ("--control-tokens-in-text", "fail")
SAVE_SECONDS = 5.0  # from one saved state to the next


@dataclass(frozen=True)
class State:
    """How far the token files are whole, and what was counted on the way; counts as in Encoded.

    Attributes:
        cursor: where in the corpus to continue.
        file_lines: index of the file that was read last, and how many of its lines are done.
        sizes: by key, what the token files hold.
        empty: by key, how many documents have no tokens.
        histogram: by key, how many documents have [2^i, 2^(i+1)) tokens, by i.
        seconds: time spent so far.
        complete: whether nothing is left but to give the files their names.
    """

    cursor: Cursor = Cursor()
    file_lines: tuple[int, int] = (0, 0)
    sizes: dict[str, Size] = field(default_factory=dict)
    empty: Counter = field(default_factory=Counter)
    histogram: dict[str, Counter] = field(default_factory=dict)
    lines: int = 0
    bytes: int = 0
    replaced: int = 0
    skipped: Counter = field(default_factory=Counter)
    first_skipped: tuple[str, ...] = ()
    kept: Counter = field(default_factory=Counter)
    split: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    complete: bool = False

    def dump(self) -> dict:
        """The state as values for JSON; `load` reads them."""
        sizes = {key: vars(size) for key, size in self.sizes.items()}
        return vars(self) | {"cursor": vars(self.cursor), "sizes": sizes}

    @classmethod
    def load(cls, values: dict) -> "State":
        return cls(
            **values
            | {
                "cursor": Cursor(**values["cursor"]),
                "file_lines": tuple(values["file_lines"]),
                "sizes": {key: Size(**size) for key, size in values["sizes"].items()},
                "histogram": {
                    key: Counter({int(i): n for i, n in counts.items()})
                    for key, counts in values["histogram"].items()
                },
                "empty": Counter(values["empty"]),
                "skipped": Counter(values["skipped"]),
                "first_skipped": tuple(values["first_skipped"]),
                "kept": Counter(values["kept"]),
                "split": Counter(values["split"]),
            }
        )

    @property
    def tokens(self) -> int:
        return sum(size.tokens for size in self.sizes.values())

    def lines_before(self, part: Part) -> int:
        """How many lines of its file come before `part`, the next one."""
        file, lines = self.file_lines
        return lines if file == part.file else 0

    def after(
        self, part: Part, encoded: Encoded, sizes: dict[str, Size], seconds: float
    ) -> "State":
        """The state once `part` is in the token files, which then have these sizes."""
        room, before = max(FIRST_SKIPPED - len(self.first_skipped), 0), self.lines_before(part)
        return dataclasses.replace(
            self,
            cursor=part.end,
            file_lines=(part.file, before + encoded.newlines),
            sizes=sizes,
            empty=self.empty
            + Counter({key: int((n == 0).sum()) for key, n in encoded.lengths.items()}),
            histogram={
                key: self.histogram.get(key, Counter()) + _histogram(n)
                for key, n in encoded.lengths.items()
            },
            lines=self.lines + encoded.lines,
            bytes=self.bytes + encoded.bytes,
            replaced=self.replaced + encoded.replaced,
            skipped=self.skipped + encoded.skipped,
            first_skipped=(
                *self.first_skipped,
                *(
                    f"{part.path}:{before + line}: {error}"
                    for line, error in encoded.first_skipped[:room]
                ),
            ),
            kept=self.kept + encoded.kept,
            split=self.split + encoded.split,
            seconds=seconds,
        )


def _sound(state: State) -> bool:
    """Whether what was counted are counts, as values from a file may not be."""
    sizes = [number for size in state.sizes.values() for number in vars(size).values()]
    histograms = [n for counts in state.histogram.values() for n in counts.values()]
    counts = [*vars(state.cursor).values(), *state.file_lines, *sizes, *histograms]
    counts += [*state.empty.values(), *state.skipped.values()]
    counts += [*state.kept.values(), *state.split.values()]
    counts += [state.lines, state.bytes, state.replaced]
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and len(state.file_lines) == 2
        and type(state.complete) is bool
        and type(state.seconds) in (int, float)
        and state.seconds >= 0
        and all(type(line) is str for line in state.first_skipped)
    )


def _histogram(lengths: np.ndarray) -> Counter:
    exponents = np.frexp(lengths[lengths > 0])[1] - 1
    return Counter({i: int(n) for i, n in enumerate(np.bincount(exponents)) if n})


class UnfinishedRun:
    """The folder PREFIX.partial with a run's token files and state.json, for the owner of PREFIX.

    Args:
        prefix: --output-prefix.
        made_from: what the output bytes depend on, by flag.
        overwrite: whether an unfinished run of other inputs may be thrown away.

    Raises:
        ConfigError: there is such a run and it may not.
    """

    def __init__(self, prefix: str, made_from: dict, overwrite: bool):
        self.folder, self._made_from = Path(f"{prefix}.partial"), made_from
        self.state = State()
        self.writers: dict[str, IndexedWriter] = {}
        self._path = self.folder / "state.json"
        self._saved: State | None = None
        self._thread = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            try:
                self.state = self._saved = self._stored()
            except ConfigError as error:
                if not overwrite:
                    raise ConfigError(
                        f"--output-prefix {prefix}: {error}; start over with --overwrite"
                    ) from None
                self._path.unlink()
        for path in self.folder.glob("*.ids"):
            path.unlink()

    def _stored(self) -> State:
        try:
            stored = read_json(self._path)
            made_from, state = stored["made_from"], State.load(stored["state"])
            if json.loads(json.dumps(state.dump())) != stored["state"] or not _sound(state):
                raise ValueError("values of other types")
            changed = [
                flag
                for flag, value in self._made_from.items()
                if made_from[flag] != value and (flag, made_from[flag]) != NONE_SO_FAR
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{self._path} is damaged, or of another version") from None
        if changed:
            raise ConfigError(
                f"{self.folder} holds an unfinished run with other {' and '.join(changed)} (or "
                "files of it have changed)"
            )
        return state

    def open(self, vocab_size: int, keys: Sequence[str]) -> None:
        """Opens the token files, cut to what the state says is whole."""
        for i, key in enumerate(keys):
            self.writers[key] = IndexedWriter(
                self.folder, str(i), token_dtype(vocab_size), self.state.sizes.get(key)
            )
        self._started = time.monotonic() - self.state.seconds
        self._next = time.monotonic() + SAVE_SECONDS

    def add(self, part: Part, encoded: Encoded) -> None:
        """Appends one part's ids; every few seconds, saves in the background what is done."""
        for key, writer in self.writers.items():
            lengths = encoded.lengths[key]
            # As in Megatron-LM, a text without tokens has no sequence, but the index still counts
            # it as a document.
            writer.append(encoded.ids[key], lengths[lengths > 0], np.cumsum(lengths > 0))
            encoded.ids[key].unlink()
        sizes = {key: writer.size for key, writer in self.writers.items()}
        self.state = self.state.after(part, encoded, sizes, time.monotonic() - self._started)
        if time.monotonic() > self._next and (not self._saving or self._saving.done()):
            self._next = time.monotonic() + SAVE_SECONDS
            self._begin_to_save()

    def save(self) -> None:
        """Puts the files on disk, and then the state that says so."""
        self._begin_to_save().result()

    def finish(self) -> None:
        """Completes the token files, and saves the state that says so."""
        for writer in self.writers.values():
            writer.finish()
        sizes = {key: writer.size for key, writer in self.writers.items()}
        self.state = dataclasses.replace(
            self.state, sizes=sizes, complete=True, seconds=time.monotonic() - self._started
        )
        self.save()

    def close(self) -> None:
        """Closes all files; removes the folder if no tokens are saved in it."""
        self._thread.shutdown()
        for writer in self.writers.values():
            writer.close()
        if not self._saved or not self._saved.tokens:
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin_to_save(self) -> Future[None]:
        if self._saving:
            self._saving.result()
        for writer in self.writers.values():
            writer.flush()
        self._saving = self._thread.submit(self._write, self.state)
        return self._saving

    def _write(self, state: State) -> None:
        for writer in self.writers.values():
            writer.sync()
        content = {"made_from": self._made_from, "state": state.dump()}
        write_atomically(self._path, json.dumps(content))
        self._saved = state
