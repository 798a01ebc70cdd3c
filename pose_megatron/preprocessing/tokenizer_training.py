"""Training a byte-pair tokenizer, written in sentencepiece's form and in Hugging Face's.

LLaMA's conventions (sentencepiece BPE, <unk> 0, <s> 1, </s> 2, unknown characters as bytes, digits
apart) without its leading space: text is taken as it is, newlines, tabs and runs of spaces
included. The one exception is U+2581, sentencepiece's sign for a space: it comes back as a space.
"""

import heapq
import io
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.tokenizer import PROBES
from pose_megatron.runtime.ranges import LARGEST_INT32, real, whole

FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "▁"  # sentencepiece's sign for a space
CHECK_CHARACTERS = 500_000  # of the corpus, on which both forms must agree
# What sentencepiece takes; beyond it, it fails and gives no reason.
COVERAGE = real(at_least=0.98, at_most=1.0)
VOCAB_SIZES = whole(len(SPECIAL) + 256 + 1, LARGEST_INT32)
THREADS = whole(1, 1024)


def train_tokenizer(
    texts: Sequence[str],
    folder: Path,
    vocab_size: int,
    threads: int,
    character_coverage: float,
    progress: Callable[[str], None] = lambda doing: None,
) -> tuple[int, int]:
    """Trains on the texts, writes FILES into the folder, and compares both forms on some texts.

    Args:
        vocab_size: tokens, with 256 bytes and 3 special ones.
        character_coverage: share of the text's characters that get a token of their own.
        progress: told what begins.

    Returns:
        (bytes, tokens) of the texts that were compared.

    Raises:
        ConfigError: as `train` and `check`.
    """
    model = train(texts, vocab_size, threads, character_coverage)
    write_folder(model, folder)
    progress("comparing tokenizer.model and tokenizer.json")
    compared = _characters(texts, CHECK_CHARACTERS)
    check(folder, PROBES)
    tokens = check(folder, compared)
    return sum(len(text.encode()) for text in compared), tokens


def check_ranges(vocab_size: int, threads: int, character_coverage: float) -> None:
    """Refuses what sentencepiece refuses without a reason.

    Raises:
        ConfigError: a value is out of range.
    """
    for flag, value, within, hint in (
        ("--vocab-size", vocab_size, VOCAB_SIZES, "256 bytes and 3 special tokens are among them"),
        ("--threads", threads, THREADS, "the tokens do not depend on it"),
        ("--character-coverage", character_coverage, COVERAGE, "a share: 0.9995 is 99.95%"),
    ):
        if value not in within:
            raise ConfigError(
                f"{flag} {value} must be from {within.least} to {within.most} ({hint})"
            )


def train(texts: Sequence[str], vocab_size: int, threads: int, character_coverage: float) -> bytes:
    """A sentencepiece model, serialized. Its pieces do not depend on `threads`; it records them.

    Raises:
        ConfigError: a value is out of range, the texts are too few for the vocabulary, or it too
            small for them.
    """
    check_ranges(vocab_size, threads, character_coverage)
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Whole texts: sentencepiece splits them at spaces itself, and sees the newlines.
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # the text as it is
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # code: indentation is one piece, "self." and "):\n" may be, numbers are not
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            split_digits=True,
            max_sentence_length=1 << 30,
            num_threads=threads,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        place, _, reason = str(error).rpartition("] ")  # the place in its source, then the reason
        if "ocabulary size" in reason:
            raise ConfigError(
                f"--vocab-size {vocab_size}: sentencepiece cannot train it on this corpus "
                f"({reason.strip()})"
            ) from error
        raise ConfigError(
            "--input: sentencepiece cannot train on this corpus of "
            f"{sum(map(len, texts)):,} characters ({reason.strip() or place + ']'}); give it more "
            "text, or text of another kind"
        ) from error
    return model.getvalue()


def write_folder(model: bytes, folder: Path) -> None:
    """tokenizer.model, and the same tokenizer in Hugging Face's form."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    (folder / "tokenizer.model").write_bytes(model)
    pieces = SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    pairs = merges(list(vocab))
    tokenizer = Tokenizer(
        models.BPE(vocab, pairs, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        # not LlamaTokenizer: transformers would replace what tokenizer.json says by its own
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # as sentencepiece: "</s>" in a text is text
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


def merges(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding joins, first to last.

    sentencepiece keeps only the results, numbered in the order in which they were made. Special
    tokens and bytes come before them and are never made by joining: "<s>" is not "<" with "s>".
    """
    made = {piece: i for i, piece in enumerate(pieces) if i >= len(SPECIAL) + 256}
    return [
        pair
        for piece in made
        for pair in sorted(
            (
                (piece[:i], piece[i:])
                for i in range(1, len(piece))
                if piece[:i] in made and piece[i:] in made
            ),
            key=lambda pair: (made[pair[0]], made[pair[1]]),
        )
    ]


def check(folder: Path, texts: Sequence[str]) -> int:
    """Compares the folder's two forms on the texts; returns the number of tokens.

    Raises:
        ConfigError: they differ on a text, or one does not give the text back.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    ours = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tokens = 0
    for text in texts:
        ids = ours.encode(text)
        if ids != theirs.encode(text):
            raise ConfigError(f"tokenizer.model and tokenizer.json differ on {_start(text)}")
        if not ours.decode(ids) == theirs.decode(ids) == text.replace(SPACE, " "):
            raise ConfigError(f"encoding and decoding does not give back {_start(text)}")
        tokens += len(ids)
    return tokens


def sample(texts: Iterator[str], size: int, seed: int = 0) -> list[str]:
    """A random choice of the texts of about `size` bytes, in their order; all, if they fit.

    Holds little more than `size` bytes at a time: each text draws a number, and the highest go.
    """
    draw, total = random.Random(seed), 0
    kept: list[tuple[float, int, str]] = []
    for index, text in enumerate(texts):
        heapq.heappush(kept, (-draw.random(), index, text))
        total += len(text.encode())
        while total > size and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2].encode())
    return [text for _, index, text in sorted(kept, key=lambda item: item[1])]


def _characters(texts: Sequence[str], count: int) -> list[str]:
    """Texts in random order, cut after so many characters; all, if they have fewer."""
    taken: list[str] = []
    for text in random.Random(0).sample(texts, len(texts)):
        taken.append(text[:count])
        count -= len(taken[-1])
        if not count:
            break
    return taken


def _start(text: str) -> str:
    return repr(text[:80]) + ("" if len(text) <= 80 else f"... ({len(text)} characters)")
