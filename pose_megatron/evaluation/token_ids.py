"""Whether token ids mean to a tokenizer, or in a corpus, what they mean to the model.

Those of another tokenizer with as many tokens all exist, and give figures that say nothing. What
files tell of it is a warning, as a resumed run only says that its tokenizer has changed.
"""

import hashlib
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.indexed_writer import summary_of
from pose_megatron.preprocessing.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer


def other_tokenizer(given: Tokenizer, name: str, carried: Path) -> str | None:
    """That a tokenizer's ids are other tokens than those of the one that a checkpoint carries.

    Args:
        given: --tokenizer-model `name`.
        carried: the folder of the other; where it cannot be read, nothing is known.
    """
    own = _carried(carried)
    if own is None:
        return None
    both = min(given.vocab_size, own.vocab_size)
    same = sum(_token(given, i) == _token(own, i) for i in range(both))
    most = max(given.vocab_size, own.vocab_size)
    if same == most:
        return None
    return (
        f"--tokenizer-model {name} is another tokenizer than {carried}, the checkpoint's: "
        f"{most - same} of {most} ids are other tokens; leave the flag out to use the checkpoint's"
    )


def other_corpus(prefix: str, carried: Path, given: str | None) -> str | None:
    """That the summary beside a corpus names other files than those of the model's tokenizer.

    Args:
        prefix: --data-path.
        carried: the folder of the one that the checkpoint carries, if it does.
        given: --tokenizer-model; the model's where the checkpoint carries none.
    """
    try:
        found = summary_of(prefix)
    except ConfigError:  # damaged: evaluations need nothing of it
        return None
    known = found[1].get("tokenizer_sha256") if found else None
    name = carried if _files(carried) else Path(given or carried)
    if not found or not isinstance(known, list) or not (files := _files(name)):
        return None
    if any(hashlib.sha256(file.read_bytes()).hexdigest() in known for file in files):
        return None
    summary, content = found
    tokenizer = content.get("tokenizer")
    path = tokenizer.get("tokenizer_path") if isinstance(tokenizer, dict) else None
    return (
        f"--data-path {prefix} was made with another tokenizer than {name}, the model's: with "
        f"{path or 'other files'}, as {summary.name} says; preprocess the text again with "
        f"--tokenizer-model {name}, or delete the summary if you know better"
    )


def _files(place: Path) -> list[Path]:
    """Those of a tokenizer that say what its ids mean."""
    if not place.is_dir():
        return [place] if place.is_file() else []
    return [file for file in (place / "tokenizer.json", *place.glob("*.model")) if file.is_file()]


def _carried(folder: Path) -> Tokenizer | None:
    for kind in TOKENIZER_TYPES:
        try:
            return build_tokenizer(kind, folder)
        except ConfigError:
            continue
    return None


def _token(tokenizer: Tokenizer, token_id: int) -> str | None:
    """As the vocabulary writes it; added tokens have spaces where SentencePiece has marks."""
    token = tokenizer.token_of(token_id)
    return None if token is None else token.replace("▁", " ")
