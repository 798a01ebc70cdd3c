"""Names and values that are drawn: different ones, in random order."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from pose_megatron.positions.draws import Draw

_QUALITIES = (
    "amber ancient autumn bitter bold brave bright broken bronze calm clever cold copper coral "
    "crimson curious dark deep distant dusty early eager empty faint famous fancy fast foreign "
    "fresh frozen gentle giant golden grand grey happy hidden hollow honest humble icy idle "
    "ivory jolly keen kind late lazy light lonely loud lucky marble mellow merry mild misty "
    "modest narrow nimble noble northern odd olive pale patient plain polite proud purple quick "
    "quiet rapid rare red rough round royal rustic sandy scarlet secret sharp shy silent silver "
    "simple sleepy slow smooth soft solid southern steady steep stormy strange strong sunny "
    "sweet tall tame tender thin tidy tiny"
).split()
_THINGS = (
    "anchor apple apron arrow badger barley basket beetle bell bench bottle bridge bucket "
    "button candle canyon carpet castle chair cherry clock cloud clover coat comet cradle crown "
    "desert donkey door drum eagle engine falcon fence fiddle finger fish flower forest "
    "fountain garden gate glacier glove hammer harbour harp heron hill horse island jacket jar "
    "juniper kettle key kitchen ladder lake lamp lantern leaf lemon letter lion marten meadow "
    "mirror monkey moon mountain needle nest oak ocean orchard otter owl palace paper parrot "
    "pear pencil pillow planet plate plover pocket pond poplar quilt rabbit ribbon river road "
    "rocket roof saddle sail salmon spoon station stone table temple thistle tiger tower train "
    "valley violin walnut wheel willow window"
).split()
_DIGITS = 7
_LETTERS = 4
_SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


def words(draw: Draw, count: int) -> list[str]:
    """`count` words such as amber-heron, with as many qualities as there must be for so many."""
    qualities, below = 1, len(_QUALITIES) * len(_THINGS)
    while below < 4 * count:
        qualities, below = qualities + 1, below * len(_QUALITIES)
    return [
        "-".join(_mixed(n, [_THINGS, *[_QUALITIES] * qualities]))
        for n in draw.different(below, count)
    ]


def numbers(draw: Draw, count: int) -> list[str]:
    """`count` numbers of seven digits."""
    least = 10 ** (_DIGITS - 1)
    return [str(least + n) for n in draw.different(9 * least, count)]


def uuids(draw: Draw, count: int) -> list[str]:
    """`count` times 128 random bits, written as a UUID is."""
    found = []
    for _ in range(count):
        digits = "".join(f"{draw.integer(0, 2**64 - 1):016x}" for _ in range(2))
        cuts = (0, 8, 12, 16, 20, 32)
        found.append("-".join(digits[a:b] for a, b in pairwise(cuts)))
    return found


def variables(draw: Draw, count: int) -> list[str]:
    """`count` names of four capital letters."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return ["".join(_mixed(n, [letters] * _LETTERS)) for n in draw.different(26**_LETTERS, count)]


def made_up(draw: Draw, count: int) -> list[str]:
    """`count` words of three syllables that mean nothing."""
    below = len(_SYLLABLES) ** 3
    return ["".join(_mixed(n, [_SYLLABLES] * 3)) for n in draw.different(below, count)]


@dataclass(frozen=True)
class Kind:
    """Names or values that a user can choose.

    Attributes:
        noun: what one of them is called in a text.
        draw: gives so many.
    """

    noun: str
    draw: Callable[[Draw, int], list[str]]


KINDS = {
    "numbers": Kind("number", numbers),
    "words": Kind("word", words),
    "uuids": Kind("code", uuids),
}


def _mixed(n: int, digits: list) -> list[str]:
    """The number n, written with one of digits[0] in the last place, of digits[1] before it, ..."""
    found = []
    for choice in digits:
        n, at = divmod(n, len(choice))
        found.append(choice[at])
    return found[::-1]
