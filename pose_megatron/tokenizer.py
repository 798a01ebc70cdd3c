"""Text to token ids and back, and the JSONL corpora the text comes from.

Ids are those of Megatron's own preprocessing: the bare text's, no token added at either end
(SentencePiece `encode_as_ids`, Hugging Face `add_special_tokens=False`).

    corpus.jsonl(.gz|.zst) ──read_lines──► Lines ──parse_line──► text ──Tokenizer──► ids

Tokenizer libraries are imported when a tokenizer is built, so this module loads at once.
"""

import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")
CORPUS_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# What may lie beside a tokenizer in a Hugging Face folder and belongs to it.
FOLDER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


def build_tokenizer(tokenizer_type: str, tokenizer_model: str | Path) -> "Tokenizer":
    """A tokenizer from local files; nothing is downloaded and no foreign code runs.

    Args:
        tokenizer_type: one of TOKENIZER_TYPES.
        tokenizer_model: SentencePiece: a .model file, or a folder that holds tokenizer.model.
            Hugging Face: a folder that holds tokenizer.json, or that file itself.

    Raises:
        ValueError: unknown type, missing or unreadable files.
    """
    classes = {"SentencePieceTokenizer": SentencePieceTokenizer,
               "HuggingFaceTokenizer": HuggingFaceTokenizer}
    if tokenizer_type not in classes:
        raise ValueError(
            f"--tokenizer-type {tokenizer_type}: unknown, use one of {', '.join(TOKENIZER_TYPES)}"
        )
    return classes[tokenizer_type](Path(tokenizer_model))


class Tokenizer(ABC):
    """What datasets, tools and megatron-core's GPTDatasetConfig ask of a tokenizer.

    Lone surrogates, which UTF-8 cannot hold, become U+FFFD before tokenizing.

    Attributes:
        vocab_size: number of ids, without padding: every id is in [0, vocab_size).
        bos, pad: ids, None where the tokenizer has none.
        files: what belongs beside an exported Hugging Face checkpoint.
    """

    vocab_size: int
    bos: int | None
    pad: int | None
    files: list[Path]
    _path: Path
    _eos: int | None

    @abstractmethod
    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""

    def tokenize(self, text: str) -> list[int]:
        return self.tokenize_batch([text])[0]

    @property
    def eod(self) -> int:
        """Id that ends a document: the tokenizer's end-of-sequence token.

        Raises:
            ValueError: there is none.
        """
        if self._eos is None:
            raise ValueError(
                f"--tokenizer-model {self._path}: has no end-of-sequence token; name one that is "
                'in its vocabulary (Hugging Face: "eos_token" in tokenizer_config.json)'
            )
        return self._eos

    @property
    def unique_identifiers(self) -> OrderedDict:
        """Names this tokenizer in megatron-core's dataset cache."""
        return OrderedDict(
            {"class": f"{type(self).__module__}.{type(self).__qualname__}",
             "tokenizer_path": str(self._path)}
        )


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, one thread."""

    def __init__(self, path: Path):
        self._path = _file(path, "tokenizer.model", "use --tokenizer-type HuggingFaceTokenizer")
        from sentencepiece import SentencePieceProcessor

        try:
            self._tokenizer = SentencePieceProcessor(model_file=str(self._path))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"--tokenizer-model {self._path}: not a sentencepiece model ({error})"
            ) from error
        self.vocab_size = self._tokenizer.get_piece_size()
        # sentencepiece says -1 for "none"
        self.bos, self.pad, self._eos = (
            None if i < 0 else i
            for i in (self._tokenizer.bos_id(), self._tokenizer.pad_id(), self._tokenizer.eos_id())
        )
        self.files = _files(self._path)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer.encode(list(map(replace_surrogates, texts)), num_threads=1)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json, threads as TOKENIZERS_PARALLELISM says."""

    def __init__(self, path: Path):
        self._path = _file(
            path, "tokenizer.json",
            "make one with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...), "
            "or use --tokenizer-type SentencePieceTokenizer",
        )
        from tokenizers import Tokenizer as Backend

        try:
            self._tokenizer = Backend.from_file(str(self._path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(
                f"--tokenizer-model {self._path}: not a Hugging Face tokenizer ({error})"
            ) from error
        # tokenizer.json may carry the settings of someone's last call
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _json(self._path.with_name("tokenizer_config.json"))
        names = _json(self._path.with_name("special_tokens_map.json")) | config
        # True: "</s>" written in a text is text, not the end of it
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            if self._tokenizer.token_to_id(token["content"]) != int(token_id):
                raise ValueError(
                    f"--tokenizer-model {self._path}: lacks token {token['content']!r} with id "
                    f"{token_id}, which tokenizer_config.json adds; load the folder with "
                    "transformers' AutoTokenizer and save_pretrained it to bring the two together"
                )
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos, self.pad, self._eos = (
            self._id(names.get(name)) for name in ("bos_token", "pad_token", "eos_token")
        )
        self.files = _files(self._path)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(
            list(map(replace_surrogates, texts)), add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _id(self, token: str | dict | None) -> int | None:
        if isinstance(token, dict):  # an AddedToken, written out
            token = token.get("content")
        return None if token is None else self._tokenizer.token_to_id(token)


def replace_surrogates(text: str) -> str:
    """The text, with U+FFFD for each lone surrogate (JSON's "\\ud800" makes them)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True)
class Lines:
    """Whole consecutive lines of one corpus file.

    Attributes:
        first: number of the first line, from 1.
        content: the lines, decompressed, newlines included.
        position: bytes of the file, as it lies on disk, read so far.
    """

    path: Path
    first: int
    content: bytes
    position: int

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """(number, line) of each line that is not blank."""
        lines = self.content.split(b"\n")
        return ((i, line) for i, line in enumerate(lines, self.first) if line.strip())

    def __len__(self) -> int:
        """Lines that are not blank."""
        return sum(1 for _ in self)


class LineError(ValueError):
    """A line that holds no document: `reason` is for counting, `detail` for the reader."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def corpus_files(paths: Sequence[str | Path]) -> list[Path]:
    """The paths, if each is a file that read_lines knows to open.

    Raises:
        ValueError: naming the first that is not.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"--input {path}: no such file")
        if not path.name.endswith(CORPUS_SUFFIXES):
            raise ValueError(
                f"--input {path}: unknown extension, use one of {', '.join(CORPUS_SUFFIXES)}"
            )
    return list(map(Path, paths))


def read_lines(path: Path, size: int) -> Iterator[Lines]:
    """The file in runs of whole lines of about `size` bytes each, decompressed.

    Raises:
        ValueError: compressed data is broken or cut short.
    """
    with open(path, "rb") as file:
        if path.suffix == ".gz":
            blocks = _gzip_blocks(file, path, size)
        elif path.suffix == ".zst":
            blocks = _zstd_blocks(file, path, size)
        else:
            blocks = iter(lambda: file.read(size), b"")
        first, parts = 1, []
        for block in blocks:
            head, newline, tail = block.rpartition(b"\n")
            if newline:
                content = b"".join([*parts, head, newline])
                yield Lines(path, first, content, file.tell())
                first, parts = first + content.count(b"\n"), []
            parts.append(tail)
        if content := b"".join(parts):
            yield Lines(path, first, content, file.tell())


def parse_line(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts under `keys` of one JSONL line.

    Raises:
        LineError: the line is no JSON object, or a key is missing or not a string.
    """
    try:
        document = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LineError("not UTF-8", f"byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise LineError("not JSON", f"{error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise LineError("not JSON", str(error)) from None
    if not isinstance(document, dict):
        raise LineError("not a JSON object", f"its type is {type(document).__name__}")
    for key in keys:
        if key not in document:
            raise LineError(f"lacks key {key!r}", f"it has {', '.join(document) or 'none'}"[:100])
        if not isinstance(document[key], str):
            raise LineError(
                f"value of {key!r} is not a string", f"its type is {type(document[key]).__name__}"
            )
    return [document[key] for key in keys]


def _gzip_blocks(file: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=file)
    try:
        yield from iter(lambda: stream.read(size), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"--input {path}: broken gzip file ({error})") from error


def _zstd_blocks(file: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    # zstandard's file reader takes a file cut short for its end; this loop does not
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"--input {path}: needs the package zstandard, install it") from None
    frame = None
    try:
        while data := file.read(size):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if block := frame.decompress(data):
                    yield block
                data = frame.unused_data
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise ValueError(f"--input {path}: broken zstd file ({error})") from error
    if frame:
        raise ValueError(f"--input {path}: broken zstd file (it ends within a frame)")


def _file(path: Path, name: str, way_out: str) -> Path:
    if path.is_dir() and not (path / name).is_file():
        raise ValueError(f"--tokenizer-model {path}: the folder has no {name}; {way_out}")
    if not path.exists():
        raise ValueError(f"--tokenizer-model {path}: no such file or folder")
    return path / name if path.is_dir() else path


def _files(path: Path) -> list[Path]:
    """The tokenizer's own file, with what a Hugging Face folder keeps beside it."""
    if path.name not in FOLDER_FILES:
        return [path]
    return [file for name in FOLDER_FILES if (file := path.with_name(name)).is_file()]


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--tokenizer-model {path}: not JSON ({error})") from error
