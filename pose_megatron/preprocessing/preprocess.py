"""Text to indexed token files: what tools/preprocess_data.py does.

    parts ──workers──► ids, in small files ──in order──► UnfinishedRun, in PREFIX.partial
                                                         ──► PREFIX_KEY_document.bin/.idx

The bytes are those that Megatron-LM's tool of the same name writes.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing import readers
from pose_megatron.preprocessing.control_tokens import ControlTokens
from pose_megatron.preprocessing.encoding import Encoder, encode_in_order
from pose_megatron.preprocessing.fast_tokenizer import prove
from pose_megatron.preprocessing.indexed_writer import digests, publish
from pose_megatron.preprocessing.jsonl import LONGEST
from pose_megatron.preprocessing.readers import Part
from pose_megatron.preprocessing.resume import State, UnfinishedRun
from pose_megatron.preprocessing.tokenizer import Tokenizer, build_tokenizer
from pose_megatron.runtime.atomic_files import write_atomically
from pose_megatron.runtime.ownership import owned

PROVEN_ON = 1 << 19  # characters of the corpus on which gigatoken's ids are compared
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class PreprocessingJob:
    """What to preprocess and how: the flags of tools/preprocess_data.py."""

    input: Sequence[str]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    eod_token: str | None = None
    control_tokens_in_text: str = "keep"
    workers: int = 1
    on_error: str = "stop"
    tokenizer_library: str = "auto"
    max_document_mb: int = LONGEST // 10**6
    log_interval: int = 1000
    overwrite: bool = False


def preprocess(job: PreprocessingJob) -> dict:
    """Does the job; returns the summary, which it also writes to PREFIX_summary.json.

    Raises:
        ConfigError: an input, the tokenizer, a line or an output path cannot be used.
        KeyboardInterrupt: stopped; its argument says what is kept.
    """
    files = readers.corpus_files(job.input)
    tokenizer = build_tokenizer(job.tokenizer_type, job.tokenizer_model)
    if job.control_tokens_in_text == "split":
        tokenizer.split_control_tokens()
    eod = _eod(job, tokenizer)
    made_from = _made_from(job, files, tokenizer, eod)
    with owned(job.output_prefix, f"--output-prefix {job.output_prefix}") as ownership:
        run = UnfinishedRun(job.output_prefix, made_from, job.overwrite)
        try:
            if not run.state.complete:
                if not job.overwrite:
                    _refuse_existing(job)
                _tokenize(job, files, tokenizer, eod, run)
            ownership.check()
            for i, key in enumerate(job.json_keys):
                publish(run.folder, str(i), _prefix(job, key))
            summary = _summary(job, tokenizer, eod, made_from, run.state)
            write_atomically(_summary_path(job), json.dumps(summary, indent=2) + "\n")
            run.remove()
            return summary
        finally:
            if not ownership.is_lost:
                run.close()


def _eod(job: PreprocessingJob, tokenizer: Tokenizer) -> int | None:
    """The id that ends each document, said on stderr; None for no such end.

    Raises:
        ConfigError: the tokenizer has no such token, or it has no use.
    """
    if job.append_eod and job.eod_token is None:
        eod, hint = tokenizer.eod, "the tokenizer's end-of-sequence token"
        if tokenizer.eos_ends_turns:
            hint += "; in its chat template it ends turns, and --eod-token chooses another"
    elif job.append_eod:
        eod, hint = tokenizer.token_id(str(job.eod_token), "--eod-token"), "of --eod-token"
    elif job.eod_token is not None:
        raise ConfigError(f"--eod-token {job.eod_token} has no meaning without --append-eod")
    else:
        return None
    print(
        f"each document ends with {tokenizer.token_of(eod)} (id {eod}), {hint}",
        file=sys.stderr,
        flush=True,
    )
    return eod


def _tokenize(
    job: PreprocessingJob,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    eod: int | None,
    run: UnfinishedRun,
) -> None:
    fast, longest = None, job.max_document_mb * 10**6
    if job.tokenizer_library == "auto":
        fast, why = prove(tokenizer, readers.sample(files, job.json_keys, PROVEN_ON, longest))
        print(why, file=sys.stderr, flush=True)
    if run.state != State():
        print(
            f"going on after {run.state.tokens:,} tokens, which are in {run.folder}",
            file=sys.stderr,
            flush=True,
        )
    run.open(tokenizer.vocab_size, job.json_keys)
    encoder = Encoder(
        tokenizer,
        fast,
        job.json_keys,
        eod,
        job.on_error == "stop",
        f"{run.folder}/{os.getpid()}",
        get_context("fork").RawValue(ctypes.c_bool, False),
        ControlTokens.of(tokenizer, job.control_tokens_in_text == "fail"),
    )
    parts = readers.parts(files, job.workers, run.state.cursor, longest)
    progress = Progress(files, job.log_interval, run.state)
    try:
        with contextlib.closing(encode_in_order(encoder, parts, job.workers)) as results:
            for part, encoded in results:
                if encoded.skipped and encoder.stop_at_error:
                    raise readers.line_error(
                        part.path, run.state.lines_before(part), *encoded.first_skipped[0]
                    )
                if encoded.distrusted:
                    print(
                        f"{part.path}: {encoded.distrusted}; this process goes on with the "
                        "tokenizer's own library. The documents before agreed wherever they were "
                        "compared; to have all by that library: --tokenizer-library own "
                        "--overwrite",
                        file=sys.stderr,
                        flush=True,
                    )
                if encoded.refused:
                    raise readers.line_error(
                        part.path,
                        run.state.lines_before(part),
                        *encoded.refused,
                        "take it out, or choose --control-tokens-in-text keep or split",
                    )
                run.add(part, encoded)
                progress.show(part, run.state)
        _require_tokens(job, run.state)
        run.finish()
    except BaseException as error:
        with contextlib.suppress(OSError):
            run.save()
        if isinstance(error, KeyboardInterrupt) and run.state != State():
            raise KeyboardInterrupt(
                f"run it again to go on after {run.state.tokens:,} tokens"
            ) from None
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise ConfigError(
                f"--output-prefix {job.output_prefix}: {error.strerror}; make room and run it "
                "again to go on"
            ) from error
        raise
    finally:
        progress.close()
        if fast:
            fast.keep_characters()


def _require_tokens(job: PreprocessingJob, state: State) -> None:
    for key in job.json_keys:
        if key not in state.sizes or not state.sizes[key].tokens:
            raise ConfigError(
                f"--input {' '.join(map(str, job.input))}: no document with tokens under key "
                f"{key!r} ({state.lines} lines, {state.empty[key]} of them empty texts, "
                f"{state.skipped.total()} skipped)"
            )


def _made_from(
    job: PreprocessingJob, files: Sequence[Path], tokenizer: Tokenizer, eod: int | None
) -> dict:
    """What the output bytes depend on, by flag."""
    return {
        "--input": [
            [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files
        ],
        "--json-keys": list(job.json_keys),
        "--tokenizer-model": [
            job.tokenizer_type,
            *(hashlib.sha256(path.read_bytes()).hexdigest() for path in tokenizer.files),
        ],
        "--append-eod": job.append_eod,
        "--eod-token": eod,
        "--control-tokens-in-text": job.control_tokens_in_text,
        "--max-document-mb": job.max_document_mb,
        "--tokenizer-library": job.tokenizer_library,
    }


def _summary(
    job: PreprocessingJob, tokenizer: Tokenizer, eod: int | None, made_from: dict, state: State
) -> dict:
    outputs = {
        key: {
            "prefix": _prefix(job, key),
            "documents": size.documents - state.empty[key],
            "empty_documents": state.empty[key],
            "tokens": size.tokens,
            "lengths": {
                f"{1 << i}-{(2 << i) - 1}": n for i, n in sorted(state.histogram[key].items())
            },
        }
        for key, size in state.sizes.items()
    }
    totals = {
        "documents": sum(size.documents - state.empty[key] for key, size in state.sizes.items()),
        "empty_documents": sum(state.empty[key] for key in state.sizes),
        "tokens": state.tokens,
    }
    return totals | {
        "lines": state.lines,
        "bytes": state.bytes,
        "seconds": round(state.seconds, 3),
        "skipped": dict(state.skipped),
        "first_skipped": list(state.first_skipped),
        "texts_with_replaced_surrogates": state.replaced,
        "outputs": outputs,
        "crc32": {
            name: crc
            for key, size in state.sizes.items()
            for name, crc in digests(_prefix(job, key), size).items()
        },
        "tokenizer": tokenizer.unique_identifiers,
        "tokenizer_sha256": made_from["--tokenizer-model"][1:],
        "vocab_size": tokenizer.vocab_size,
        "append_eod": job.append_eod,
        "eod_token": None if eod is None else tokenizer.token_of(eod),
        "eod_id": eod,
        "control_tokens_in_text": {
            "handling": job.control_tokens_in_text,
            "kept": dict(state.kept),
            "split": dict(state.split),
        },
    }


def _refuse_existing(job: PreprocessingJob) -> None:
    outputs = [
        Path(_prefix(job, key) + suffix) for key in job.json_keys for suffix in (".bin", ".idx")
    ]
    for path in [_summary_path(job), *outputs]:
        if path.exists():
            raise ConfigError(
                f"--output-prefix: {path} exists; choose another prefix, or replace it with "
                "--overwrite"
            )


def _prefix(job: PreprocessingJob, key: str) -> str:
    return f"{job.output_prefix}_{key}_document"


def _summary_path(job: PreprocessingJob) -> Path:
    return Path(f"{job.output_prefix}_summary.json")


class Progress:
    """Shows progress on stderr after every `interval` input lines, once a second at most."""

    def __init__(self, files: Sequence[Path], interval: int, state: State):
        self._sizes = np.cumsum([0, *(path.stat().st_size for path in files)]).tolist()
        self._interval, self._first = interval, state
        self._started = time.monotonic()
        self._next, self._shown = state.lines + interval, float("-inf")
        self._begun: float | None = None  # share of the corpus that was done at the first part

    def show(self, part: Part, state: State) -> None:
        done = (self._sizes[part.file] + part.position) / max(self._sizes[-1], 1)
        if self._begun is None:
            self._begun = done
        seconds = max(time.monotonic() - self._started, 1e-9)
        if state.lines < self._next or seconds - self._shown < 1:
            return
        self._next, self._shown = state.lines + self._interval, seconds
        share = max(done - self._begun, 1e-9)
        left = round(seconds * (1 - done) / share) if done > self._begun else 0
        text = (
            f"{state.lines:,} documents, {done:.0%}, "
            f"{(state.bytes - self._first.bytes) / seconds / 1e6:.1f} MB/s, "
            f"{(state.tokens - self._first.tokens) / seconds:,.0f} tokens/s, "
            f"{left // 60}:{left % 60:02d} left"
        )
        start, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
        print(start + text, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty() and self._shown > 0:
            print(file=sys.stderr)
