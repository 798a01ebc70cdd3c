"""A tokenizer's definition as gigatoken is given it, and what it leaves in doubt.

gigatoken takes Hugging Face's tokenizer.json, and passes over what it does not know. What the two
implementations may take differently is made visible here: it gets an id that the tokenizer does not
have, so that gigatoken's ids themselves say which texts belong to the tokenizer's own library.

SentencePiece merges the piece of the highest score first, and the leftmost of equal ones; gigatoken
goes by a list of merges, where none are equal. As long as the first merge of all is the same one,
the two go through the same steps. They can part where

  * two pieces have the same score: a text that was merged into one of them is in doubt;
  * the same piece T is made in two ways, x + y and y + z, and the text holds xyz;
  * T is made in two ways and occurs twice, and the first T is merged at once into a larger piece V
    of a higher score that takes a part of the second: the text holds V and the rest of T.

Runs of one character (indentation, rules of "-") are parted the same way by both, from the left and
the largest first; as they are common, they are compared at all lengths instead.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.safe_text import byte_letters
from pose_megatron.preprocessing.tokenizer import Tokenizer

BYTES = range(256)
MARK = "▁"  # how SentencePiece writes a space
NEIGHBOURS = 12  # characters on whose both sides runs of one character are compared


@dataclass(frozen=True)
class Definition:
    """What gigatoken is given.

    Attributes:
        form: tokenizer.json.
        byte_level: whether its vocabulary spells bytes; else it spells characters.
        normalizes: whether gigatoken must be given texts as the own library normalizes them.
        composes: whether all that this does is to compose characters (NFC, NFKC).
        added: ids of added tokens that gigatoken looks for.
        doubts: ids of gigatoken's that send a text to the own library.
        starts: beginnings of texts that do.
        characters: those that do.
        probes: texts on which the two must be compared.
    """

    form: dict[str, Any]
    byte_level: bool
    normalizes: bool
    composes: bool
    added: frozenset[int]
    doubts: frozenset[int]
    starts: tuple[str, ...]
    characters: str
    probes: tuple[str, ...]


def definition(tokenizer: Tokenizer) -> Definition:
    """
    Raises:
        ConfigError: there is something in it that gigatoken would pass over.
    """
    form = tokenizer.as_json()
    model = dict(form["model"])
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ConfigError(f"gigatoken knows no {name}")
    byte_level = not model.get("byte_fallback")
    if byte_level:
        _refuse_unknown_splits(form["pre_tokenizer"])
    kinds = set(_kinds(form["normalizer"]))
    normalizes = not kinds <= (set() if byte_level else {"Prepend", "Replace"})
    scores = tokenizer.scores()
    doubtful, strings, probes = _ties(model["merges"], scores) if scores else (set(), set(), [])
    strings |= {t["content"] for t in form["added_tokens"] if scores or not _plain(t)}
    strings |= {
        tokenizer.normalize(t["content"]) for t in form["added_tokens"] if t["normalized"]
    } - {""}
    plain = [token for token in form["added_tokens"] if not scores and _plain(token)]
    characters, starts = "", tuple[str, ...]()
    if scores and not normalizes:
        # gigatoken looks for added tokens in the text itself
        characters = MARK if strings else ""
        starts = tuple(s[1:].replace(MARK, " ") for s in strings if s[:1] == MARK)
        strings = {string.replace(MARK, " ") for string in strings}
    elif not byte_level:
        strings |= {string.replace(MARK, " ") for string in strings}

    vocab = model["vocab"]
    if byte_level:
        alphabet = set(byte_letters().values())
        # no text is spelled with other characters
        vocab = {token: i for token, i in vocab.items() if alphabet.issuperset(token)}
        missing = sorted(alphabet - vocab.keys())
    else:
        missing = [name for byte in BYTES if (name := f"<0x{byte:02X}>") not in vocab]
    first = tokenizer.vocab_size
    made_up = {token: first + i for i, token in enumerate(missing)}
    marks = [
        {"id": first + len(made_up) + i, "content": string, "special": True, "normalized": False}
        for i, string in enumerate(sorted(strings))
    ]
    model["vocab"] = vocab | made_up
    if byte_level:
        model["merges"] = _ranked(model["merges"], vocab)
    doubts = {first + i for i in range(len(made_up) + len(marks))} | tokenizer.unused()
    doubts |= {vocab[token] for token in (*doubtful, model.get("unk_token")) if token in vocab}
    return Definition(
        form=form
        | {"model": model, "added_tokens": [*plain, *marks]}
        | ({"normalizer": None} if normalizes else {}),
        byte_level=byte_level,
        normalizes=normalizes,
        composes=kinds <= {"NFC", "NFKC"},
        added=frozenset(token["id"] for token in plain),
        doubts=frozenset(doubts),
        starts=starts,
        characters=characters,
        probes=tuple(probes),
    )


def _plain(token: Mapping[str, Any]) -> bool:
    """Whether an added token is found wherever its text is, and takes nothing else with it."""
    return not any(token[how] for how in ("single_word", "lstrip", "rstrip", "normalized"))


def _kinds(part: Mapping[str, Any] | None) -> Iterable[str]:
    """Types of the normalizers in a normalizer; a pattern that is no plain string is named too."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for child in part["normalizers"]:
            yield from _kinds(child)
        return
    yield part["type"]
    if part["type"] == "Replace" and "String" not in part["pattern"]:
        yield "Regex"


def _refuse_unknown_splits(part: Mapping[str, Any] | None) -> None:
    """gigatoken knows byte-level pre-tokenizers by the patterns of their Splits alone."""
    parts = [] if part is None else part.get("pretokenizers", [part])
    splits, byte_level = parts[:-1], parts[-1] if parts else {"type": None}
    known = byte_level["type"] == "ByteLevel" and all(
        split["type"] == "Split"
        and "Regex" in split["pattern"]
        and (split["behavior"], split["invert"]) in {("Isolated", False), ("Removed", True)}
        for split in splits
    )
    if splits:
        known = known and not (byte_level.get("use_regex", True) or byte_level["add_prefix_space"])
    else:
        known = known and byte_level.get("use_regex", True)
    if not known:
        kinds = " and ".join(str(part["type"]) for part in parts) or "none"
        raise ConfigError(f"gigatoken may split words otherwise (pre-tokenizers: {kinds})")


def _ranked(merges: list, vocab: Mapping[str, int]) -> list:
    """The merges, so that gigatoken goes by their order.

    It takes ids for ranks where they do not fall along the list; but several merges that make the
    same token have one id, and their order counts. A merge that is there already then ends the
    list, which changes nothing else.
    """
    merges = [merge if isinstance(merge, list | tuple) else merge.split(" ") for merge in merges]
    ids = [vocab.get("".join(merge), -1) for merge in merges]
    tied = any(a == b for a, b in pairwise(ids))
    return [*merges, merges[0]] if tied else merges


def _ties(
    merges: Sequence[Sequence[str]], scores: Mapping[str, float]
) -> tuple[set[str], set[str], list[str]]:
    """Pieces and strings that are in doubt, and runs of one character to compare."""
    ways: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for left, right in merges:
        ways[left + right].append((left, right))
    by_score: dict[float, list[str]] = defaultdict(list)
    for piece in ways:
        by_score[scores[piece]].append(piece)
    doubtful = {
        piece
        for pieces in by_score.values()
        if len(pieces) > 1 and len(set("".join(pieces))) > 1
        for piece in pieces
    }
    # No piece comes of merges if a character of it has no piece; SentencePiece asks only for both
    # together.
    strings = {piece for piece in scores if len(piece) > 1 and any(c not in scores for c in piece)}
    several = {piece for piece, made in ways.items() if len(made) > 1 and len(set(piece)) > 1}
    for piece in several:
        lefts = {left for left, _ in ways[piece]}
        for left, right in ways[piece]:
            if right in lefts and left != right:
                strings.add(left + right + piece[len(right) :])
    makes: dict[str, set[str]] = defaultdict(set)
    for left, right in merges:
        makes[left].add(left + right)
        makes[right].add(left + right)
    for piece in several:
        for larger in _at_once(piece, makes, scores):
            for left, right in ways[piece]:
                if larger.endswith(left) and piece in larger[: -len(left)]:
                    strings.add(larger + right)
                if larger.startswith(right) and piece in larger[len(right) :]:
                    strings.add(left + larger)
    for piece in sorted(ways, key=len):
        if any(part in doubtful for way in ways[piece] for part in way):
            doubtful.add(piece)
    return doubtful, strings, _runs(ways)


def _at_once(piece: str, makes: Mapping[str, set[str]], scores: Mapping[str, float]) -> set[str]:
    """The larger pieces that a piece may become before another of its kind is made."""
    found: set[str] = set()
    parts = [piece]
    while parts:
        higher = {p for p in makes.get(parts.pop(), ()) if scores[p] >= scores[piece]} - found
        found |= higher
        parts += higher
    return found


def _runs(ways: Iterable[str]) -> list[str]:
    """Runs of each character that merges with itself, alone and beside those it merges with."""
    longest = {piece[0]: len(piece) for piece in sorted(ways, key=len) if len(set(piece)) == 1}
    before: dict[str, set[str]] = {run: {"a", "\n"} for run in longest}
    after: dict[str, set[str]] = {run: {"a", "\n"} for run in longest}
    for a, b in {pair for piece in ways for pair in pairwise(piece) if pair[0] != pair[1]}:
        before.get(b, set()).add(a)
        after.get(a, set()).add(b)
    return [
        (left + run * length + right).replace(MARK, " ")
        for run, most in longest.items()
        if most > 2
        for left, right in [("", ""), ("a", "a")]
        + [(side, "") for side in sorted(before[run])[:NEIGHBOURS]]
        + [("", side) for side in sorted(after[run])[:NEIGHBOURS]]
        for length in range(2, 2 * most + 4)
    ]
