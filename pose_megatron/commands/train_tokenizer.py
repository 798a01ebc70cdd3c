"""Trains a byte-pair tokenizer from a corpus: every text survives encoding and decoding.

LLaMA's conventions (sentencepiece BPE, <unk> 0, <s> 1, </s> 2, unknown characters as bytes, digits
apart) without its leading space: text is taken as it is, newlines, tabs and runs of spaces
included. The one exception is U+2581, sentencepiece's sign for a space: it comes back as a space.

--output-dir gets tokenizer.model (for --tokenizer-type SentencePieceTokenizer) and tokenizer.json
with tokenizer_config.json (for HuggingFaceTokenizer, and for transformers' AutoTokenizer). The two
are compared on the corpus before anything is written.
"""

import argparse
import sys
import time
from pathlib import Path

from pose_megatron.commands.corpus_flags import add_corpus_flags
from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing import readers, tokenizer_training
from pose_megatron.preprocessing.tokenizer_training import COVERAGE, FILES, THREADS, VOCAB_SIZES
from pose_megatron.runtime.atomic_files import staged_files
from pose_megatron.runtime.cli import command, positive

EXAMPLE = """example:
  python tools/train_tokenizer.py --input corpus.jsonl --output-dir tokenizer --vocab-size 2048
"""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_corpus_flags(p)
    p.add_argument("--output-dir", type=Path, required=True, help="folder, created if missing")
    p.add_argument(
        "--vocab-size",
        type=VOCAB_SIZES,
        required=True,
        help="tokens, with 256 bytes and 3 special ones",
    )
    p.add_argument(
        "--character-coverage",
        type=COVERAGE,
        default=0.9995,
        help="share of the text's characters with a token of their own, not bytes: from 0.98 to 1 "
        "(default: %(default)s)",
    )
    p.add_argument(
        "--sample-size",
        type=positive,
        default=50_000_000,
        help="bytes of text to train on, chosen at random (default: %(default)s)",
    )
    # a constant: the model file names it, and should be the same on every machine
    p.add_argument("--threads", type=THREADS, default=2, help="default: %(default)s")
    p.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    return p.parse_args()


@command
def main() -> None:
    flags = parse()
    started = time.monotonic()

    def say(doing: str) -> None:
        print(f"{time.monotonic() - started:5.1f} s  {doing}", file=sys.stderr, flush=True)

    files = readers.corpus_files(flags.input)
    what = f"--output-dir {flags.output_dir}"
    with staged_files(flags.output_dir / "tokenizer", what, FILES, flags.overwrite) as draft:
        texts = tokenizer_training.sample(
            filter(
                None,
                readers.texts(
                    files, flags.json_keys, flags.on_error, flags.max_document_mb * 10**6
                ),
            ),
            flags.sample_size,
        )
        if not texts:
            raise ConfigError(f"--input {' '.join(flags.input)}: no text to train on")
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        say(f"training {flags.vocab_size} tokens on {len(texts):,} texts, {megabytes:.1f} MB")
        size, tokens = tokenizer_training.train_tokenizer(
            texts, draft, flags.vocab_size, flags.threads, flags.character_coverage, say
        )
    print(
        f"{flags.output_dir}: {flags.vocab_size} tokens, {size / tokens:.2f} bytes/token on "
        f"{size / 1e6:.1f} MB of the corpus, in {time.monotonic() - started:.1f} s"
    )
