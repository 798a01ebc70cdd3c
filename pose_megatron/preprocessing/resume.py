"""An unfinished preprocessing run: what it has done so far, on disk.

The folder PREFIX.partial holds the token files in the making, and state.json says up to which place
of the corpus they are whole. The same command goes on from there after a crash, and ends with the
same bytes.
"""

import dataclasses
import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.encoding import FIRST_SKIPPED, Encoded
from pose_megatron.preprocessing.indexed_writer import Size, TokenWriter, token_dtype
from pose_megatron.preprocessing.readers import Part, Place
from pose_megatron.runtime.atomic_files import write_atomically

COMMIT_SECONDS = 5.0  # between states on disk


@dataclass(frozen=True)
class State:
    """How far the token files are whole, and what was counted on the way.

    Attributes:
        place: where in the corpus to go on.
        file_lines: a file by its index, and how many lines of it are done.
        sizes: by key, of the token files.
        empty: by key, documents without tokens.
        histogram: by key, documents of [2^i, 2^(i+1)) tokens, by i.
        complete: nothing is left but to give the files their names.
    """

    place: Place = Place()
    file_lines: tuple[int, int] = (0, 0)
    sizes: dict[str, Size] = field(default_factory=dict)
    empty: Counter = field(default_factory=Counter)
    histogram: dict[str, Counter] = field(default_factory=dict)
    lines: int = 0
    bytes: int = 0
    replaced: int = 0
    skipped: Counter = field(default_factory=Counter)
    first_skipped: tuple[str, ...] = ()
    seconds: float = 0.0
    complete: bool = False

    def dump(self) -> dict:
        """For JSON."""
        sizes = {key: vars(size) for key, size in self.sizes.items()}
        return vars(self) | {"place": vars(self.place), "sizes": sizes}

    @classmethod
    def load(cls, values: dict) -> "State":
        return cls(
            **values
            | {
                "place": Place(**values["place"]),
                "file_lines": tuple(values["file_lines"]),
                "sizes": {key: Size(**size) for key, size in values["sizes"].items()},
                "histogram": {
                    key: Counter({int(i): n for i, n in counts.items()})
                    for key, counts in values["histogram"].items()
                },
                "empty": Counter(values["empty"]),
                "skipped": Counter(values["skipped"]),
                "first_skipped": tuple(values["first_skipped"]),
            }
        )

    @property
    def tokens(self) -> int:
        return sum(size.tokens for size in self.sizes.values())

    def lines_before(self, part: Part) -> int:
        """Lines of its file before the part that comes next."""
        file, lines = self.file_lines
        return lines if file == part.file else 0

    def after(
        self, part: Part, encoded: Encoded, sizes: dict[str, Size], seconds: float
    ) -> "State":
        room, before = max(FIRST_SKIPPED - len(self.first_skipped), 0), self.lines_before(part)
        return dataclasses.replace(
            self,
            place=part.end,
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
            seconds=seconds,
        )


def _histogram(lengths: np.ndarray) -> Counter:
    exponents = np.frexp(lengths[lengths > 0])[1] - 1
    return Counter({i: int(n) for i, n in enumerate(np.bincount(exponents)) if n})


class Unfinished:
    """The folder of a run: its token files and state.json.

    Args:
        prefix: of the outputs; the folder is PREFIX.partial.
        made_from: what the bytes depend on, by flag.
        overwrite: an unfinished run of something else may be thrown away.

    Raises:
        ConfigError: there is one, or another process is at work on it.
    """

    def __init__(self, prefix: str, made_from: dict, overwrite: bool):
        self.folder, self._made_from = Path(f"{prefix}.partial"), made_from
        self.state, self.writers = State(), {}
        self._path, self._saved = self.folder / "state.json", None
        self._thread, self._saving = ThreadPoolExecutor(1), None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"--output-prefix {prefix}: another run is at work on it") from None
        stored = json.loads(self._path.read_text()) if self._path.exists() else None
        if stored and stored["made_from"] == made_from:
            self.state = self._saved = State.load(stored["state"])
        elif stored and not overwrite:
            changed = [
                flag for flag in made_from if stored["made_from"].get(flag) != made_from[flag]
            ]
            raise ConfigError(
                f"--output-prefix {prefix}: {self.folder} holds an unfinished run with other "
                f"{' and '.join(changed)} (or files of it have changed); start over with "
                "--overwrite"
            )
        else:
            self._path.unlink(missing_ok=True)
        for path in self.folder.glob("*.ids"):
            path.unlink()

    def open(self, vocab_size: int, keys: Sequence[str]) -> None:
        """Makes the token files ready to grow from where the state says they are whole."""
        for i, key in enumerate(keys):
            self.writers[key] = TokenWriter(
                self.folder, str(i), token_dtype(vocab_size), self.state.sizes.get(key)
            )
        self._started = time.monotonic() - self.state.seconds
        self._next = time.monotonic() + COMMIT_SECONDS

    def add(self, part: Part, encoded: Encoded) -> None:
        """One more part; every few seconds, what is done is saved while work goes on."""
        for key, writer in self.writers.items():
            lengths = encoded.lengths[key]
            # As in Megatron-LM, a text without tokens has no sequence, but the index still counts
            # it as a document.
            writer.append(encoded.ids[key], lengths[lengths > 0], np.cumsum(lengths > 0))
            encoded.ids[key].unlink()
        sizes = {key: writer.size for key, writer in self.writers.items()}
        self.state = self.state.after(part, encoded, sizes, time.monotonic() - self._started)
        if time.monotonic() > self._next and (not self._saving or self._saving.done()):
            self._next = time.monotonic() + COMMIT_SECONDS
            self._begin_to_save()

    def save(self) -> None:
        """Puts the files on disk, and then the state that says so."""
        self._begin_to_save()
        self._saving.result()

    def finish(self) -> None:
        for writer in self.writers.values():
            writer.finish()
        self.state = dataclasses.replace(
            self.state, complete=True, seconds=time.monotonic() - self._started
        )
        self.save()

    def close(self) -> None:
        """Keeps what is worth keeping: the folder goes if there are no tokens in it."""
        self._thread.shutdown()
        for writer in self.writers.values():
            writer.close()
        if not self._saved or not self._saved.tokens:
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin_to_save(self) -> None:
        if self._saving:
            self._saving.result()
        for writer in self.writers.values():
            writer.flush()
        self._saving = self._thread.submit(self._write, self.state)

    def _write(self, state: State) -> None:
        for writer in self.writers.values():
            writer.sync()
        content = {"made_from": self._made_from, "state": state.dump()}
        write_atomically(self._path, json.dumps(content))
        self._saved = state
