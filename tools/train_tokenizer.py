"""Trains a byte-pair tokenizer from a corpus: every text survives encoding and decoding.

LLaMA's conventions (sentencepiece BPE, <unk> 0, <s> 1, </s> 2, unknown characters as bytes, digits
apart) without its leading space: text is taken as it is, newlines, tabs and runs of spaces
included. The one exception is U+2581, sentencepiece's sign for a space: it comes back as a space.

--output-dir gets tokenizer.model (for --tokenizer-type SentencePieceTokenizer) and tokenizer.json
with tokenizer_config.json (for HuggingFaceTokenizer, and for transformers' AutoTokenizer). The two
are compared on the corpus before anything is written.
"""

import argparse
import heapq
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron.preprocessing import readers
from pose_megatron.preprocessing.tokenizer import PROBES
from pose_megatron.runtime.atomic_files import fsync
from pose_megatron.runtime.cli import command, positive

EXAMPLE = """example:
  python tools/train_tokenizer.py --input corpus.jsonl --output-dir tokenizer --vocab-size 2048
"""
FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "▁"  # sentencepiece's sign for a space
CHECK_CHARACTERS = 500_000  # of the corpus, on which both forms must agree


def train(texts: Sequence[str], vocab_size: int, threads: int, character_coverage: float) -> bytes:
    """A sentencepiece model, serialized. Its pieces do not depend on `threads`; it records them.

    Raises:
        ValueError: the texts are too few for the vocabulary, or it too small for them.
    """
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
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip()  # behind the place in its source
        raise ValueError(
            f"--vocab-size {vocab_size}: sentencepiece cannot train it on this corpus ({reason})"
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
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


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
        ValueError: they differ on a text, or one does not give the text back.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    ours = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = 0
    for text in texts:
        ids = ours.encode(text)
        if ids != theirs.encode(text):
            raise ValueError(f"tokenizer.model and tokenizer.json differ on {_start(text)}")
        if not ours.decode(ids) == theirs.decode(ids) == text.replace(SPACE, " "):
            raise ValueError(f"encoding and decoding does not give back {_start(text)}")
        tokens += len(ids)
    return tokens


def sample(texts: Iterator[str], size: int, seed: int = 0) -> list[str]:
    """A random choice of the texts of about `size` bytes, in their order; all, if they fit.

    Holds little more than `size` bytes at a time: each text draws a number, and the highest go.
    """
    draw, kept, total = random.Random(seed), [], 0
    for index, text in enumerate(texts):
        heapq.heappush(kept, (-draw.random(), index, text))
        total += len(text.encode())
        while total > size and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2].encode())
    return [text for _, index, text in sorted(kept, key=lambda item: item[1])]


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    files = readers.corpus_files(args.input)
    for name in FILES:
        if (path := args.output_dir / name).exists() and not args.overwrite:
            raise ValueError(
                f"--output-dir {args.output_dir}: {path} exists; choose another folder, or replace "
                "it with --overwrite"
            )
    texts = filter(None, readers.texts(files, args.json_keys, args.on_error))
    texts = sample(texts, args.sample_size)
    if not texts:
        raise ValueError(f"--input {' '.join(args.input)}: no text to train on")
    size = sum(len(text.encode()) for text in texts)
    _say(f"training {args.vocab_size} tokens on {len(texts):,} texts, {size / 1e6:.1f} MB", started)
    model = train(texts, args.vocab_size, args.threads, args.character_coverage)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=args.output_dir) as temporary:
        folder = Path(temporary)
        write_folder(model, folder)
        _say("comparing tokenizer.model and tokenizer.json", started)
        checked, left = [], CHECK_CHARACTERS
        for text in random.Random(0).sample(texts, len(texts)):
            checked.append(text[:left])
            left -= len(checked[-1])
            if not left:
                break
        check(folder, PROBES)
        tokens = check(folder, checked)
        for name in FILES:
            fsync(folder / name)
        for name in FILES:
            (folder / name).replace(args.output_dir / name)
        fsync(args.output_dir)
    size = sum(len(text.encode()) for text in checked)
    print(
        f"{args.output_dir}: {args.vocab_size} tokens, {size / tokens:.2f} bytes/token on "
        f"{size / 1e6:.1f} MB of the corpus, in {time.monotonic() - started:.1f} s"
    )


def _say(text: str, started: float) -> None:
    print(f"{time.monotonic() - started:5.1f} s  {text}", file=sys.stderr, flush=True)


def _start(text: str) -> str:
    return repr(text[:80]) + ("" if len(text) <= 80 else f"... ({len(text)} characters)")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="train_tokenizer.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files or patterns: .jsonl or .json, plain or with .gz or .zst; .parquet",
    )
    p.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts")
    p.add_argument("--output-dir", type=Path, required=True, help="folder, created if missing")
    p.add_argument(
        "--vocab-size",
        type=positive,
        required=True,
        help="tokens, with 256 bytes and 3 special ones",
    )
    p.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of the text's characters with a token of their own, not bytes",
    )
    p.add_argument(
        "--sample-size",
        type=positive,
        default=50_000_000,
        help="bytes of text to train on, chosen at random (default: %(default)s)",
    )
    # a constant: the model file names it, and should be the same on every machine
    p.add_argument("--threads", type=positive, default=2, help="default: %(default)s")
    p.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a line without a document"
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    return p


@command
def main() -> None:
    run(parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
