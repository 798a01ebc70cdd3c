"""Turns a JSONL corpus into token files that megatron-core's IndexedDataset reads.

Each line is a JSON object; the text under each of --json-keys becomes one document of
PREFIX_KEY_document.bin/.idx, in the order of the input and byte for byte what Megatron-LM's
tool of this name writes. PREFIX_summary.json holds the counts.

Outputs get their names when they are whole: an interrupted run leaves none.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron.durable import fsync
from pose_megatron.jsonl import LineError, Lines, corpus_files, parse_line, read_lines
from pose_megatron.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer, replace_surrogates

EXAMPLE = """example:
  python tools/preprocess_data.py --input corpus.jsonl more.jsonl.zst --output-prefix data/corpus \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model models/llama-2-7b \\
      --workers 8 --append-eod
"""
BATCH_BYTES = 1 << 18  # of JSONL: about 50 ms of one worker's time
BATCHES_AHEAD = 32  # per worker: bounds memory, and keeps workers busy while megatron-core loads
FIRST_SKIPPED = 10  # skipped lines that the summary names


@dataclass
class Encoded:
    """One batch of lines as token ids.

    Attributes:
        documents: by key, (ids of all documents end to end, int32; tokens of each document).
        skipped: (line number, error) of lines that hold no document.
        replaced: texts in which lone surrogates were replaced.
    """

    lines: Lines
    documents: dict[str, tuple[np.ndarray, list[int]]] = field(default_factory=dict)
    skipped: list[tuple[int, LineError]] = field(default_factory=list)
    replaced: int = 0


@dataclass(frozen=True)
class Encoder:
    """Lines to ids: what a worker does."""

    tokenizer: Tokenizer
    keys: Sequence[str]
    append_eod: bool

    def __call__(self, lines: Lines) -> Encoded:
        encoded, rows = Encoded(lines), []
        for number, line in lines:
            try:
                rows.append(parse_line(line, self.keys))
            except LineError as error:
                encoded.skipped.append((number, error))
        for i, key in enumerate(self.keys):
            texts = [row[i] for row in rows]
            encoded.replaced += sum(text != replace_surrogates(text) for text in texts)
            ids = self.tokenizer.tokenize_batch(texts)
            if self.append_eod:
                ids = [document and [*document, self.tokenizer.eod] for document in ids]
            lengths = [len(document) for document in ids]
            flat = np.fromiter(chain.from_iterable(ids), np.int32, sum(lengths))
            encoded.documents[key] = flat, lengths
        return encoded


def encode_in_order(encoder: Encoder, batches: Iterator[Lines], workers: int) -> Iterator[Encoded]:
    """The batches encoded, in their order; one worker is this process."""
    if workers == 1:
        yield from map(encoder, batches)
        return
    # Workers are forked at the first submit, before this process grows: they share the tokenizer.
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (encoder,))
    pending = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode, batch))
            if len(pending) > workers * BATCHES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"--workers {workers}: a worker was killed, most likely for memory; use fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # a parent that was killed tells nobody: end with it
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _encode(lines: Lines) -> Encoded:
    return _encoder(lines)


class Output:
    """One key's .bin and .idx, under temporary names until `publish`."""

    def __init__(self, prefix: str, vocab_size: int):
        self.prefix, self.vocab_size = prefix, vocab_size
        self.final = Path(prefix + ".bin"), Path(prefix + ".idx")
        self.temporary = [_temporary(path) for path in self.final]
        self.documents = self.empty_documents = self.tokens = 0
        self._builder = None

    def add(self, ids: np.ndarray, lengths: list[int]) -> None:
        self._builder = self._builder or self._open()
        start = 0
        for length in lengths:
            # As in Megatron-LM, a text without tokens has no sequence, but the index still
            # counts it as a document.
            document = ids[start : start + length]
            self._builder.add_document(document, [length] if length else [])
            start += length
        self.documents += len(lengths) - lengths.count(0)
        self.empty_documents += lengths.count(0)
        self.tokens += start

    def _open(self):
        # Only now: the import takes seconds, in which the workers are already at work.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what megatron-core would like to find installed
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
        dtype = DType.optimal_dtype(self.vocab_size)
        return IndexedDatasetBuilder(str(self.temporary[0]), dtype=dtype)

    def finalize(self) -> None:
        self._builder.finalize(str(self.temporary[1]))
        for path in self.temporary:
            fsync(path)

    def publish(self) -> None:
        # A dataset is found by its .idx: it goes first and comes last.
        self.final[1].unlink(missing_ok=True)
        for temporary, final in zip(self.temporary, self.final, strict=True):
            temporary.replace(final)
        fsync(self.final[1].parent)

    def discard(self) -> None:
        for path in self.temporary:
            path.unlink(missing_ok=True)


class Report:
    """What was read so far; a line on stderr each time `interval` more input lines are done."""

    def __init__(self, files: Sequence[Path], interval: int):
        self.interval = interval
        self.lines = self.bytes = self.tokens = self.replaced = 0
        self.skipped, self.first_skipped = Counter(), []
        self._sizes = {path: path.stat().st_size for path in files}  # as on disk
        self._file, self._before = files[0], 0  # in hand, and the size of those before it
        self._started = time.monotonic()
        self._next = interval

    def add(self, encoded: Encoded) -> None:
        path = encoded.lines.path
        self.lines += len(encoded.lines)
        self.bytes += len(encoded.lines.content)
        self.tokens += sum(ids.size for ids, _ in encoded.documents.values())
        self.replaced += encoded.replaced
        for number, error in encoded.skipped:
            self.skipped[error.reason] += 1
            if len(self.first_skipped) < FIRST_SKIPPED:
                self.first_skipped.append(f"{path}:{number}: {error}")
        if path != self._file:
            self._before, self._file = self._before + self._sizes[self._file], path
        if self.lines >= self._next:
            self._next = self.lines + self.interval
            self._show((self._before + encoded.lines.position) / sum(self._sizes.values()))

    def _show(self, done: float) -> None:
        seconds = self.seconds
        left = round(seconds / done - seconds)
        text = (
            f"{self.lines:,} documents, {done:.0%}, {self.bytes / seconds / 1e6:.1f} MB/s, "
            f"{self.tokens / seconds:,.0f} tokens/s, {left // 60}:{left % 60:02d} left"
        )
        start, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
        print(start + text, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty() and self._next > self.interval:
            print(file=sys.stderr)

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)


def preprocess(args: argparse.Namespace) -> dict:
    """Does what the flags say; returns the summary, which is also written.

    Raises:
        ValueError: an input, the tokenizer, a line or the outputs are not as they must be.
    """
    files = corpus_files(args.input)
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
    if args.append_eod:
        _ = tokenizer.eod  # there is none: say so now
    outputs = {
        key: Output(f"{args.output_prefix}_{key}_document", tokenizer.vocab_size)
        for key in args.json_keys
    }
    summary_path = Path(f"{args.output_prefix}_summary.json")
    if not args.overwrite:
        _refuse_existing(summary_path, *(p for output in outputs.values() for p in output.final))
    summary_path.parent.mkdir(parents=True, exist_ok=True)

    encoder = Encoder(tokenizer, args.json_keys, args.append_eod)
    batches = (lines for path in files for lines in read_lines(path, BATCH_BYTES))
    report = Report(files, args.log_interval)
    try:
        with contextlib.closing(encode_in_order(encoder, batches, args.workers)) as results:
            for encoded in results:
                if encoded.skipped and args.on_error == "stop":
                    number, error = encoded.skipped[0]
                    raise ValueError(
                        f"{encoded.lines.path}:{number}: {error}; mend the line, or skip such "
                        "lines with --on-error skip"
                    )
                for key, (ids, lengths) in encoded.documents.items():
                    outputs[key].add(ids, lengths)
                report.add(encoded)
        report.close()
        for key, output in outputs.items():
            if not output.tokens:
                raise ValueError(
                    f"--input {' '.join(args.input)}: no document with tokens under key {key!r} "
                    f"({report.lines} lines, {output.empty_documents} of them empty texts, "
                    f"{report.skipped.total()} skipped)"
                )
            output.finalize()
        summary = _summary(args, tokenizer, outputs, report)
        temporary = _temporary(summary_path)
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
        fsync(temporary)
        for output in outputs.values():
            output.publish()
        temporary.replace(summary_path)
        return summary
    finally:
        for output in outputs.values():
            output.discard()
        _temporary(summary_path).unlink(missing_ok=True)


def _summary(
    args: argparse.Namespace, tokenizer: Tokenizer, outputs: dict[str, Output], report: Report
) -> dict:
    counts = ("documents", "empty_documents", "tokens")
    by_key = {
        key: {"prefix": output.prefix} | {name: getattr(output, name) for name in counts}
        for key, output in outputs.items()
    }
    return {name: sum(output[name] for output in by_key.values()) for name in counts} | {
        "lines": report.lines,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
        "skipped": dict(report.skipped),
        "first_skipped": report.first_skipped,
        "texts_with_replaced_surrogates": report.replaced,
        "outputs": by_key,
        "tokenizer": tokenizer.unique_identifiers,
        "vocab_size": tokenizer.vocab_size,
        "append_eod": args.append_eod,
    }


def _sentence(summary: dict) -> str:
    seconds, megabytes = max(summary["seconds"], 1e-3), summary["bytes"] / 1e6
    notes = {f"lines skipped ({reason})": n for reason, n in summary["skipped"].items()} | {
        "empty documents left out": summary["empty_documents"],
        "texts had lone surrogates, now U+FFFD": summary["texts_with_replaced_surrogates"],
    }
    return "; ".join([
        f"{' '.join(o['prefix'] + '.bin/.idx' for o in summary['outputs'].values())}: "
        f"{summary['documents']:,} documents, {summary['tokens']:,} tokens from "
        f"{megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)",
        *(f"{count:,} {note}" for note, count in notes.items() if count),
    ])


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ValueError(
                f"--output-prefix: {path} exists; choose another prefix, or replace it with "
                "--overwrite"
            )


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="preprocess_data.py", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--input", nargs="+", required=True, help=".jsonl, .jsonl.gz or .jsonl.zst")
    p.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts")
    p.add_argument("--output-prefix", required=True, help="the folder is created")
    p.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    p.add_argument("--tokenizer-model", required=True, help="tokenizer file or folder")
    p.add_argument("--append-eod", action="store_true", help="end each document with the eos token")
    p.add_argument("--workers", type=_positive, default=1, help="processes that tokenize")
    p.add_argument("--on-error", choices=("stop", "skip"), default="stop",
                   help="at a line without a document: stop, or count it and go on")
    p.add_argument("--log-interval", type=_positive, default=1000, help="documents between reports")
    p.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    return p


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def main() -> int:
    args = parser().parse_args()
    args.json_keys = list(dict.fromkeys(args.json_keys))
    # Each worker tokenizes on one thread.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        print(_sentence(preprocess(args)))
    except (ValueError, OSError) as error:
        if os.environ.get("POSE_TRACEBACK"):
            raise
        print(f"preprocess_data.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("preprocess_data.py: interrupted, nothing kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
