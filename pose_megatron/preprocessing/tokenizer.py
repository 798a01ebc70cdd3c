"""Text to token ids and back.

Texts get the ids of Megatron's own preprocessing, with no token added at either end (SentencePiece
`encode_as_ids`, Hugging Face `add_special_tokens=False`).

Tokenizer libraries are imported when a tokenizer is built, so this module loads at once.
"""

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.json_files import read_json
from pose_megatron.runtime.lfs_pointers import refuse_lfs_pointer

TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")
CONTROL_TOKENS_IN_TEXT = ("keep", "split", "fail")
# Texts that are rare in corpora, and that other implementations of a tokenizer get wrong.
PROBES = (
    *("", " ", "  x", "x  ", "\n\n\n", "\t\tx\r\n", "</s> <s> <unk>", "naïve 日本 😀\0", "1234567"),
    *("▁a ▁▁b", "<0x0A>", "\ufffd\u200b\ufeff", "e\u0301 ﬁ ½ Ⅷ", "don't I'LL we'Ve"),
    "\x85\u2028\xa0\u3000x",
    *(character * n for character in " -=#\n" for n in range(2, 67)),
)
# Files of a Hugging Face folder that belong to its tokenizer.
FOLDER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


def build_tokenizer(tokenizer_type: str, tokenizer_model: str | Path) -> "Tokenizer":
    """A tokenizer from local files; nothing is downloaded and no code of the folder runs.

    Args:
        tokenizer_type: one of TOKENIZER_TYPES.
        tokenizer_model: SentencePiece: a .model file, or a folder that holds tokenizer.model.
            Hugging Face: a folder that holds tokenizer.json, or that file itself.

    Raises:
        ConfigError: unknown type, missing or unreadable files.
    """
    classes = {
        "SentencePieceTokenizer": SentencePieceTokenizer,
        "HuggingFaceTokenizer": HuggingFaceTokenizer,
    }
    if tokenizer_type not in classes:
        raise ConfigError(
            f"--tokenizer-type {tokenizer_type}: unknown, use one of {', '.join(TOKENIZER_TYPES)}"
        )
    return classes[tokenizer_type](Path(tokenizer_model))


class Tokenizer(ABC):
    """What datasets, tools and megatron-core's GPTDatasetConfig need of a tokenizer.

    Lone surrogates, which UTF-8 cannot hold, become U+FFFD before tokenizing.

    Attributes:
        vocab_size: number of ids, without padding: every id is in [0, vocab_size).
        bos, pad: ids of these tokens, None where the tokenizer has none.
        files: the tokenizer's files, to be copied beside an exported Hugging Face checkpoint.
        eos_ends_turns: whether its chat template writes the end-of-sequence token.
    """

    vocab_size: int
    bos: int | None
    pad: int | None
    files: list[Path]
    eos_ends_turns: bool = False
    _path: Path
    _eos: int | None

    @abstractmethod
    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""

    @abstractmethod
    def text_of(self, token_id: int) -> str:
        """The text of one id, which may be a special token."""

    @abstractmethod
    def token_of(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None for an id that has none."""

    @abstractmethod
    def _id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, if it is one."""

    @property
    @abstractmethod
    def control_tokens(self) -> dict[str, int]:
        """Ids of the control tokens, by their text."""

    @abstractmethod
    def split_control_tokens(self) -> None:
        """From now on, control tokens that are written in a text are ordinary text."""

    def token_id(self, token: str, flag: str) -> int:
        """The id of a token that `flag` gives by its id, or as the vocabulary writes it.

        Raises:
            ConfigError: there is no such token.
        """
        found = int(token) if token.isdecimal() else self._id_of(token)
        if found is None or found >= self.vocab_size or self.token_of(found) is None:
            known = ", ".join(list(self.control_tokens)[:10])
            raise ConfigError(
                f"{flag} {token}: not a token of {self._path}, whose ids are below "
                f"{self.vocab_size} and whose control tokens are {known or 'none'}"
            )
        return found

    def ids_ending(self, text: str) -> list[int]:
        """Every id whose text is `text` or ends with it."""
        return [i for i in range(self.vocab_size) if self.text_of(i).endswith(text)]

    @abstractmethod
    def as_json(self) -> dict:
        """This tokenizer in the form of Hugging Face's tokenizer.json, for other implementations.

        Special tokens that this tokenizer does not look for in texts are left out.

        Raises:
            ConfigError: it has no such form.
        """

    @abstractmethod
    def serialized(self) -> bytes:
        """All that decides the ids of this tokenizer, but for its library's version."""

    @abstractmethod
    def normalize(self, text: str) -> str:
        """The text as this library's normalizer leaves it."""

    def scores(self) -> dict[str, float] | None:
        """By piece that texts merge into: of all possible merges the one of the highest score
        comes first, the leftmost of equals. None where a list of merges says what comes first."""
        return None

    def unused(self) -> set[int]:
        """Ids of pieces that texts merge into, and that are taken apart again."""
        return set()

    def tokenize(self, text: str) -> list[int]:
        return self.tokenize_batch([text])[0]

    @property
    def eod(self) -> int:
        """Id that ends a document: the tokenizer's end-of-sequence token.

        Raises:
            ConfigError: there is none.
        """
        if self._eos is None:
            raise ConfigError(
                f"--tokenizer-model {self._path}: has no end-of-sequence token; choose a token "
                'with --eod-token (Hugging Face: or name "eos_token" in tokenizer_config.json)'
            )
        return self._eos

    @property
    def unique_identifiers(self) -> OrderedDict:
        """What identifies this tokenizer in megatron-core's dataset cache."""
        return OrderedDict(
            {
                "class": f"{type(self).__module__}.{type(self).__qualname__}",
                "tokenizer_path": str(self._path),
            }
        )


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, on one thread."""

    def __init__(self, path: Path):
        self._path = _file(path, "tokenizer.model", "use --tokenizer-type HuggingFaceTokenizer")
        from sentencepiece import SentencePieceProcessor

        try:
            self._tokenizer = SentencePieceProcessor(model_file=str(self._path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"--tokenizer-model {self._path}: not a sentencepiece model ({error})"
            ) from error
        self.vocab_size = self._tokenizer.get_piece_size()
        # sentencepiece has -1 for a token that does not exist
        self.bos, self.pad, self._eos = (
            None if i < 0 else i
            for i in (self._tokenizer.bos_id(), self._tokenizer.pad_id(), self._tokenizer.eos_id())
        )
        self.files = _files(self._path)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer.encode(list(map(replace_surrogates, texts)), num_threads=1)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def text_of(self, token_id: int) -> str:
        # A control piece such as </s> decodes to nothing.
        return self._tokenizer.decode([token_id]) or self._tokenizer.id_to_piece(token_id)

    def token_of(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_piece(token_id)

    def _id_of(self, token: str) -> int | None:
        found = self._tokenizer.piece_to_id(token)  # that of <unk>, where there is none
        return found if self._tokenizer.id_to_piece(found) == token else None

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        return {
            piece.piece.replace("▁", " "): i
            for i, piece in enumerate(self._model().pieces)
            if piece.type in (piece.CONTROL, piece.UNKNOWN) or _user_defined(piece)
        }

    def split_control_tokens(self) -> None:
        model = self._model()
        for piece in filter(_user_defined, model.pieces):
            piece.type = piece.CONTROL  # the kind that is never looked for in a text
        self._tokenizer.load(model_proto=model.SerializeToString())

    def _model(self):
        """sentencepiece's ModelProto."""
        try:
            from sentencepiece import sentencepiece_model_pb2
        except ImportError:
            raise ConfigError(
                f"--tokenizer-model {self._path}: needs the package protobuf, install it"
            ) from None
        proto: Any = sentencepiece_model_pb2
        return proto.ModelProto.FromString(self._tokenizer.serialized_model_proto())

    def as_json(self) -> dict:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        form = json.loads(sentencepiece_to_tokenizer_json(self._model_with_bytes()))
        # Texts do not merge into control and byte pieces, whatever their spelling.
        scores, model = self.scores(), form["model"]
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) in scores]
        return _without_special(form)

    def serialized(self) -> bytes:
        return self._tokenizer.serialized_model_proto()

    def normalize(self, text: str) -> str:
        return self._tokenizer.normalize(text)

    def scores(self) -> dict[str, float]:
        model = self._tokenizer
        return {
            model.id_to_piece(i): model.get_score(i)
            for i in range(self.vocab_size)
            if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
        }

    def unused(self) -> set[int]:
        return {i for i in range(self.vocab_size) if self._tokenizer.is_unused(i)}

    def _model_with_bytes(self) -> bytes:
        """The model's file, saying that there is byte_fallback: gigatoken refuses others.

        What has no piece then becomes bytes that have none either, instead of <unk>.
        """
        from gigatoken._load.sentencepiece import _fields

        model = self._tokenizer.serialized_model_proto()
        trainer = b"".join(v for field, v in _fields(model) if field == 2 and isinstance(v, bytes))
        trainer += b"\x98\x02\x01"  # field 35, byte_fallback: true
        size, varint = len(trainer), bytearray()
        while size > 127:
            varint.append(size & 127 | 128)
            size >>= 7
        return model + b"\x12" + bytes([*varint, size]) + trainer  # the last field 2 counts


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json, on as many threads as TOKENIZERS_PARALLELISM allows."""

    def __init__(self, path: Path):
        self._path = _file(
            path,
            "tokenizer.json",
            "make one with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...), "
            "or use --tokenizer-type SentencePieceTokenizer",
        )
        from tokenizers import Tokenizer as Backend

        try:
            self._tokenizer = Backend.from_file(str(self._path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(
                f"--tokenizer-model {self._path}: not a Hugging Face tokenizer ({error})"
            ) from error
        # tokenizer.json may hold the truncation and padding of someone's last call
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _json(self._path.with_name("tokenizer_config.json"))
        names = _json(self._path.with_name("special_tokens_map.json")) | config
        # True: "</s>" written in a text is text, not the end of it
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        for token_id, token in self._added(config.get("added_tokens_decoder")):
            if self._tokenizer.token_to_id(token) != token_id:
                raise ConfigError(
                    f"--tokenizer-model {self._path}: lacks token {token!r} with id {token_id}, "
                    "which tokenizer_config.json adds; load the folder with transformers' "
                    "AutoTokenizer and save_pretrained it to bring the two together"
                )
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos, self.pad, self._eos = (
            self._id(names.get(name)) for name in ("bos_token", "pad_token", "eos_token")
        )
        self.files = _files(self._path)
        if self._eos is not None:
            template = self._path.with_name("chat_template.jinja")
            templates = [str(config.get("chat_template")), *_start_of(template)]
            self.eos_ends_turns = any(str(self.token_of(self._eos)) in text for text in templates)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(
            list(map(replace_surrogates, texts)), add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def text_of(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def token_of(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def _id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    @property
    def control_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def split_control_tokens(self) -> None:
        self._tokenizer.encode_special_tokens = True

    def as_json(self) -> dict:
        form = json.loads(self._tokenizer.to_str())
        return _without_special(form) if self._tokenizer.encode_special_tokens else form

    def serialized(self) -> bytes:
        return json.dumps(
            [self._tokenizer.to_str(), self._tokenizer.encode_special_tokens]
        ).encode()

    def normalize(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def _added(self, decoder: Any) -> list[tuple[int, str]]:
        """Ids and tokens that tokenizer_config.json adds."""
        try:
            return [(int(i), _content(token)) for i, token in dict(decoder or {}).items()]
        except (TypeError, ValueError):
            raise ConfigError(
                f"--tokenizer-model {self._path}: added_tokens_decoder in tokenizer_config.json "
                "does not give each token's id and content"
            ) from None

    def _id(self, token: object) -> int | None:
        if token is None:
            return None
        try:
            return self._tokenizer.token_to_id(_content(token))
        except TypeError:
            raise ConfigError(
                f"--tokenizer-model {self._path}: tokenizer_config.json has {token!r} for a token"
            ) from None


def replace_surrogates(text: str) -> str:
    """The text, with U+FFFD for each lone surrogate (JSON's "\\ud800" makes them)."""
    if text.isascii():  # which Python knows without looking at the characters
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _content(token: object) -> str:
    """Of a token that is written as it is, or as transformers' AddedToken."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TypeError(f"{token!r} is no token")
    return content


def _user_defined(piece) -> bool:
    """Whether sentencepiece takes this piece whole from a text, and it is more than white space."""
    return piece.type == piece.USER_DEFINED and bool(piece.piece.strip("▁ \n\t\r"))


def _without_special(form: dict) -> dict:
    return form | {"added_tokens": [t for t in form["added_tokens"] if not t["special"]]}


def _file(path: Path, name: str, way_out: str) -> Path:
    if path.is_dir() and not (path / name).is_file():
        raise ConfigError(f"--tokenizer-model {path}: the folder has no {name}; {way_out}")
    if not path.exists():
        raise ConfigError(f"--tokenizer-model {path}: no such file or folder")
    file = path / name if path.is_dir() else path
    refuse_lfs_pointer(file, ConfigError)
    return file


def _files(path: Path) -> list[Path]:
    """The tokenizer's own file, and those that a Hugging Face folder keeps beside it."""
    if path.name not in FOLDER_FILES:
        return [path]
    return [file for name in FOLDER_FILES if (file := path.with_name(name)).is_file()]


def _start_of(path: Path) -> list[str]:
    """The beginning of a text file, if there is one: more than any chat template has."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [file.read(1 << 20)]


def _json(path: Path) -> dict:
    """The object in a file that a tokenizer may have beside it."""
    try:
        return read_json(path) if path.is_file() else {}
    except ConfigError as error:
        raise ConfigError(f"--tokenizer-model {error}") from error
