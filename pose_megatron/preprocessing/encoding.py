"""Parts of a corpus to token ids, by several processes, in order.

A worker reads its part, tokenizes it and leaves the ids in a small file: only names and lengths go
between the processes.
"""

import contextlib
import ctypes
import os
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.control_tokens import ControlTokens
from pose_megatron.preprocessing.fast_tokenizer import FastTokenizer, difference
from pose_megatron.preprocessing.indexed_writer import token_dtype
from pose_megatron.preprocessing.jsonl import LineError
from pose_megatron.preprocessing.readers import Part, TextBatch
from pose_megatron.preprocessing.tokenizer import Tokenizer

Ids = Sequence[int] | np.ndarray  # of one text

PARTS_AHEAD = 8  # finished parts per worker that may wait, as files, for a slow one before them
SPOT = 512  # characters of every part on which gigatoken's ids are compared
FIRST_SKIPPED = 10  # skipped lines whose numbers are kept


@dataclass
class Encoded:
    """One part as token ids; `lines` to `replaced` as in readers.TextBatch.

    Attributes:
        ids: by key, the file that holds the ids.
        lengths: by key, tokens of each document, 0 for an empty one.
        skipped: how many lines hold no document, by reason.
        first_skipped: (number within the part, error) of the first such lines.
        distrusted: what was wrong with gigatoken, where it was used no further; else None.
        kept, split: as ControlTokens counts them.
        refused: (number within the part, error) of a line with a control token that ended the part.
    """

    ids: dict[str, Path]
    lengths: dict[str, np.ndarray]
    lines: int = 0
    newlines: int = 0
    bytes: int = 0
    replaced: int = 0
    skipped: Counter = field(default_factory=Counter)
    first_skipped: list[tuple[int, LineError]] = field(default_factory=list)
    distrusted: str | None = None
    kept: Counter = field(default_factory=Counter)
    split: Counter = field(default_factory=Counter)
    refused: tuple[int, LineError] | None = None


@dataclass(frozen=True)
class Encoder:
    """Turns parts into ids: what a worker does.

    Attributes:
        fast: used in place of the tokenizer, as it gives the same ids; None where there is none.
        eod: id that ends each document that is not empty; None for no such end.
        stop_at_error: whether the first line without a document ends the part.
        stem: how the names of the files of ids begin.
        stopped: shared by all processes; they end early when it is true.
        control: finds the control tokens that are written in texts.
    """

    tokenizer: Tokenizer
    fast: FastTokenizer | None
    keys: Sequence[str]
    eod: int | None
    stop_at_error: bool
    stem: str
    stopped: ctypes.c_bool
    control: ControlTokens = ControlTokens({})

    def __call__(self, part: Part, number: int) -> Encoded:
        paths = {key: Path(f"{self.stem}-{number}-{i}.ids") for i, key in enumerate(self.keys)}
        encoded = Encoded(paths, {})
        lengths: dict[str, list[np.ndarray]] = {key: [] for key in self.keys}
        with contextlib.ExitStack() as stack:
            files = {key: stack.enter_context(open(paths[key], "wb")) for key in self.keys}
            for batch in part.batches(self.keys):
                if self.stopped.value:
                    raise InterruptedError
                for line, error in batch.skipped:
                    encoded.skipped[error.reason] += 1
                    if len(encoded.first_skipped) < FIRST_SKIPPED:
                        encoded.first_skipped.append((encoded.newlines + line, error))
                if batch.skipped and self.stop_at_error:
                    break
                if refused := self._refused(batch):
                    encoded.refused = encoded.newlines + refused[0], refused[1]
                    break
                for key, texts in batch.texts.items():
                    documents, wrong = self._tokenize(number, texts)
                    encoded.distrusted = encoded.distrusted or wrong
                    kept, split = self.control.count(texts, documents)
                    encoded.kept += kept
                    encoded.split += split
                    ids, counts = self._flat(documents)
                    files[key].write(ids.data)
                    lengths[key].append(counts)
                encoded.lines += batch.lines
                encoded.newlines += batch.newlines
                encoded.bytes += batch.bytes
                encoded.replaced += batch.replaced
        encoded.lengths = {
            key: np.concatenate([np.empty(0, np.int64), *counts]) for key, counts in lengths.items()
        }
        return encoded

    def _refused(self, batch: TextBatch) -> tuple[int, LineError] | None:
        """The first line with a control token, where none may be, and what is wrong with it."""
        if not self.control.refused:
            return None
        for line, *row in zip(batch.numbers, *batch.texts.values(), strict=True):
            for key, text in zip(batch.texts, row, strict=True):
                for token in self.control.written(text):
                    return line, LineError(f"control token {token} in the text of {key!r}")
        return None

    def _flat(self, documents: Sequence[Ids]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all documents end to end, each with its EOD, and how many each has."""
        end = np.array([] if self.eod is None else [self.eod], np.uint32)
        pieces = [np.empty(0, np.uint32)]
        for ids in documents:
            if len(ids):
                pieces += [np.asarray(ids, np.uint32), end]
        flat = np.concatenate(pieces)
        if flat.size and flat.max() >= self.tokenizer.vocab_size:
            raise ConfigError(
                f"--tokenizer-model: gave id {flat.max()}, and its vocabulary has "
                f"{self.tokenizer.vocab_size} entries; its files do not belong together"
            )
        counts = np.fromiter(map(len, documents), np.int64, len(documents))
        return flat.astype(token_dtype(self.tokenizer.vocab_size)), counts + (counts > 0) * end.size

    def _tokenize(self, number: int, texts: Sequence[str]) -> tuple[Sequence[Ids], str | None]:
        """Ids of each text, and what was wrong with gigatoken's, in whose place these are."""
        if not self.fast or not texts:
            return self.tokenizer.tokenize_batch(texts), None
        text = texts[number % len(texts)]
        start = len(text) // 2 if len(text) > SPOT else 0
        wrong = difference(self.fast, self.tokenizer, [text[start : start + SPOT]])
        if not wrong:
            try:
                return self.fast.tokenize_batch(texts), None
            except ValueError as error:
                wrong = str(error)
        self.fast.distrust()
        return self.tokenizer.tokenize_batch(texts), wrong


def encode_in_order(
    encoder: Encoder, parts: Iterator[Part], workers: int
) -> Generator[tuple[Part, Encoded], None, None]:
    """The parts with their ids, in order; a single worker is this process itself."""
    if workers == 1:
        yield from ((part, encoder(part, number)) for number, part in enumerate(parts))
        return
    # Workers are forked at the first submit, so they share the tokenizer and its cache.
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (encoder,))
    pending: deque[tuple[Part, Future[Encoded]]] = deque()
    try:
        for number, part in enumerate(parts):
            pending.append((part, pool.submit(_encode, part, number)))
            if len(pending) > workers * PARTS_AHEAD:
                part, future = pending.popleft()
                yield part, future.result()
        while pending:
            part, future = pending.popleft()
            yield part, future.result()
    except BrokenProcessPool:
        raise ConfigError(
            f"--workers {workers}: a worker was killed, most likely for memory; use fewer and run "
            "again to go on"
        ) from None
    finally:
        encoder.stopped.value = True
        pool.shutdown(cancel_futures=True)


_encoder: Encoder  # a worker's own


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers."""
    if parent := parent_process():
        parent.join()
    os._exit(1)


def _encode(part: Part, number: int) -> Encoded:
    return _encoder(part, number)
