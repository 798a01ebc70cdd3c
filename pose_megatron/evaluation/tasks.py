"""What RULER's tasks (Hsieh et al., 2024, arXiv 2404.06654) put into a text and ask of it, in our
own words and as lines to be continued.

A task is a function (draw, settings) -> Content, and its line in TASKS. Tasks know no tokens:
`ruler.py` makes their texts exact to the token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pose_megatron.evaluation.words import KINDS, made_up, numbers, variables, words
from pose_megatron.positions.draws import Draw

_CHAINS = 2  # of variables: each is asked for, and the other one distracts
_COMMON, _OFTEN, _SELDOM = 10, 30, 3  # common words, how often they stand, and how often others do
_SHOWN = 3  # times each common word of an example, which has as many other words, once
_FREQUENT, _ZETA = 3, 2.0  # of made-up words: how many are asked for, and the exponent


@dataclass(frozen=True)
class Settings:
    """What users choose.

    Attributes:
        needles: names of multi-key and multi-query, values of multi-value.
        hops: of a chain of variables.
        keys, values: kinds of names and values, of KINDS.
        entries: of a list, at most.
    """

    needles: int = 4
    hops: int = 4
    keys: str = "words"
    values: str = "numbers"
    entries: int = 0


@dataclass(frozen=True)
class Query:
    """
    Attributes:
        text: up to the answer.
        wanted: strings that the answer has to hold.
        depth: of its needle, where it has one.
    """

    text: str
    wanted: tuple[str, ...]
    depth: float | None = None

    @property
    def answer(self) -> str:
        """A right one."""
        return f" {listed(self.wanted)}.\n"


@dataclass(frozen=True)
class Content:
    """
    Attributes:
        needles: (depth, text) in their order: 0 is the front of the haystack, 1 its end.
    """

    needles: list[tuple[float, str]]
    queries: list[Query]


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        write: its content; what it draws is all that it depends on beside the settings.
        least: where the content is a list that fills the text, the fewest entries; else 0.
        sizes: the settings that say how much it holds.
    """

    write: Callable[[Draw, Settings], Content]
    least: int = 0
    sizes: tuple[str, ...] = ()


def _multi_key(draw: Draw, settings: Settings) -> Content:
    """Names with a value each; each is asked for."""
    noun = KINDS[settings.values].noun
    names, values = _names_and_values(draw, settings, settings.needles, settings.needles)
    stems = [f"\nThe secret {noun} of {name} is" for name in names]
    needles = _scattered(draw, [f"{s} {v}.\n" for s, v in zip(stems, values, strict=True)])
    return Content(
        needles,
        [
            Query(stem, (value,), depth)
            for stem, value, (depth, _) in zip(stems, values, needles, strict=True)
        ],
    )


def _single(draw: Draw, settings: Settings) -> Content:
    """One name with one value."""
    return _multi_key(draw, replace(settings, needles=1))


def _multi_value(draw: Draw, settings: Settings) -> Content:
    """One name with several values in as many places, which are asked for at once."""
    noun = KINDS[settings.values].noun
    (name,), values = _names_and_values(draw, settings, 1, settings.needles)
    texts = [f"\nA secret {noun} of {name} is {value}.\n" for value in values]
    question = f"\nThe {len(values)} secret {noun}s of {name} are"
    return Content(_scattered(draw, texts), [Query(question, tuple(values))])


def _multi_query(draw: Draw, settings: Settings) -> Content:
    """Names with a value each, all asked for at once."""
    noun = KINDS[settings.values].noun
    names, values = _names_and_values(draw, settings, settings.needles, settings.needles)
    texts = [f"\nThe secret {noun} of {n} is {v}.\n" for n, v in zip(names, values, strict=True)]
    needles = _scattered(draw, texts)
    asked, wanted = zip(*_shuffled(draw, list(zip(names, values, strict=True))), strict=True)
    return Content(needles, [Query(f"\nThe secret {noun}s of {listed(asked)} are", wanted)])


def _variables(draw: Draw, settings: Settings) -> Content:
    """Chains in which each name has the value of the one before, mixed with each other; asked for
    all names of a value. A chain of its own, with the right answer, shows how: as in RULER, for
    without it small base models do not even answer with names."""
    each, count = settings.hops + 1, _CHAINS + 1
    values, names = numbers(draw, count), variables(draw, count * each)
    chains = [names[i * each : (i + 1) * each] for i in range(count)]
    lines = [
        [f"\n{name} = {other}\n" for name, other in zip(chain, [value, *chain], strict=False)]
        for chain, value in zip(chains, values, strict=True)
    ]
    queries = [
        Query(f"\nAll names with the value {value}:", tuple(chain))
        for chain, value in zip(chains, values, strict=True)
    ]
    *asked, shown = map(iter, lines)
    turns = _shuffled(draw, [line for line in asked for _ in range(each)])
    needles = _scattered(draw, [next(line) for line in turns])
    example = "".join([*shown, queries[-1].text, queries[-1].answer])
    return Content([*needles, (1.0, example)], queries[:-1])


def _common_words(draw: Draw, settings: Settings) -> Content:
    """A list in which some words stand often and the others seldom; asked for the common ones. A
    short list of other words, with the right answer, shows how, as in RULER."""
    others = (settings.entries - _COMMON * _OFTEN) // _SELDOM
    found = words(draw, 3 * _COMMON + others)
    shown, once, common = (found[i * _COMMON : (i + 1) * _COMMON] for i in range(3))
    example = _list(draw, shown * _SHOWN + once, shown)
    content = _list(draw, common * _OFTEN + found[3 * _COMMON :] * _SELDOM, common)
    ((_, text),), (query,) = example.needles, example.queries
    return replace(content, needles=[(1.0, text + query.text + query.answer), *content.needles])


def _frequent_words(draw: Draw, settings: Settings) -> Content:
    """Made-up words, the k-th of which stands n / (zeta(s) k**s) times; asked for the first."""
    zeta = math.pi**2 / 6
    counts: list[int] = []
    while count := int(settings.entries / (zeta * (len(counts) + 1) ** _ZETA)):
        counts.append(count)
    found = made_up(draw, len(counts))
    entries = [word for word, count in zip(found, counts, strict=True) for _ in range(count)]
    return _list(draw, entries, found[:_FREQUENT])


def _list(draw: Draw, entries: Sequence[str], wanted: Sequence[str]) -> Content:
    mixed = ", ".join(_shuffled(draw, entries))
    text = f"\nIn this list some words stand more often than others: {mixed}.\n"
    question = f"\nThe {len(wanted)} words that stand most often in the list are"
    return Content([(1.0, text)], [Query(question, tuple(wanted))])


# Those of the paper, without its questions about documents of other data sets.
TASKS = {
    "single": Task(_single),
    "multi-key": Task(_multi_key, sizes=("needles",)),
    "multi-value": Task(_multi_value, sizes=("needles",)),
    "multi-query": Task(_multi_query, sizes=("needles",)),
    "variables": Task(_variables, sizes=("hops",)),
    "common-words": Task(_common_words, least=_COMMON * _OFTEN + _COMMON * _SELDOM),
    "frequent-words": Task(_frequent_words, least=100),
}


def listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _names_and_values(
    draw: Draw, settings: Settings, names: int, values: int
) -> tuple[list[str], list[str]]:
    """All different."""
    if settings.keys == settings.values:
        found = KINDS[settings.keys].draw(draw, names + values)
        return found[:names], found[names:]
    return KINDS[settings.keys].draw(draw, names), KINDS[settings.values].draw(draw, values)


def _scattered(draw: Draw, texts: Sequence[str]) -> list[tuple[float, str]]:
    """In this order, at random depths."""
    depths = draw.ascending(0, 2**32, len(texts))
    return [(depth / 2**32, text) for depth, text in zip(depths, texts, strict=True)]


def _shuffled(draw: Draw, items: Sequence) -> list:
    order = np.argsort(draw.integers(2**62, len(items)), kind="stable")
    return [items[i] for i in order]
