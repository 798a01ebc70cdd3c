"""RULER's tasks: the right answers are read from the texts, as a reader would."""

import re
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.haystack import check_vocabulary, filler
from pose_megatron.evaluation.record import Record
from pose_megatron.evaluation.ruler import Answer, Ruler, found_in, haystacks, summary
from pose_megatron.evaluation.tasks import TASKS, Settings
from pose_megatron.evaluation.words import KINDS
from tests.readers import LogitsReader

pytestmark = pytest.mark.usefixtures("world")
NEEDLES = ("single", "multi-key", "multi-value", "multi-query")


class Bytes:
    """A token for each byte."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Words:
    """A token for each word with the blank before it, as they come along."""

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        found = re.findall(r" ?[A-Za-z]+| ?\d{1,3}|\W", text)
        return [self.ids.setdefault(word, len(self.ids)) for word in found]

    def decode(self, ids):
        words = list(self.ids)
        return "".join(words[i] for i in ids)


def hay(draw, count):
    """Of ids that no text of the tasks has: newlines, blanks or the like."""
    return torch.full((count,), ord("~")).numpy()


def made(task, tokenizer, length, trials=1, **options):
    own = hay if isinstance(tokenizer, Bytes) else filler(tokenizer.encode)
    return haystacks(task, tokenizer.encode, own, length, range(trials), **options)


def solve(text):
    """The strings that are asked for in a text's last line."""
    body, _, line = text.rpartition("\n")
    if asked := re.match(r"The secret \w+ of ([\w-]+) is", line):
        return re.findall(rf"\nThe secret \w+ of {asked[1]} is ([\w-]+)\.\n", f"{body}\n")
    if asked := re.match(r"The \d+ secret \w+ of ([\w-]+) are", line):
        return re.findall(rf"\nA secret \w+ of {asked[1]} is ([\w-]+)\.\n", f"{body}\n")
    if asked := re.match(r"The secret \w+ of (.*?) are", line):
        given = dict(re.findall(r"\nThe secret \w+ of ([\w-]+) is ([\w-]+)\.", body))
        return [given[name] for name in re.split(", | and ", asked[1]) if name in given]
    if asked := re.match(r"All names with the value (\d+):", line):
        value = {}
        for name, other in re.findall(r"\n([A-Z]{4}) = (\w+)", body):
            value[name] = value.get(other, other)
        return [name for name, number in value.items() if number == asked[1]]
    asked = re.match(r"The (\d+) words that stand most often in the list are", line)
    return [word for word, _ in entries(body).most_common(int(asked[1]))]


def entries(text):
    """Of the last list."""
    return Counter(re.findall(r"\nIn this list [^:]*: (.*)\.\n?", text)[-1].split(", "))


SIZES = st.builds(
    Settings,
    needles=st.integers(1, 6),
    hops=st.integers(1, 6),
    keys=st.sampled_from(list(KINDS)),
    values=st.sampled_from(list(KINDS)),
)


@pytest.mark.parametrize("task", TASKS)
@given(st.sampled_from([Bytes, Words]), st.integers(0, 900), st.integers(0, 3), SIZES)
@settings(max_examples=15, deadline=None)
def test_a_text_is_what_it_says(task, kind, more, seed, sizes):
    tokenizer = kind()
    length = (1400 if task not in ("common-words", "frequent-words") else 7000) + more
    (haystack,) = made(
        task, tokenizer, length, settings=sizes, seed=seed, first=tokenizer.encode("~")
    )
    count = {"multi-key": sizes.needles, "variables": 2}
    assert len(haystack.questions) == count.get(task, 1)
    wanted = {"multi-value": sizes.needles, "multi-query": sizes.needles}
    wanted |= {"variables": sizes.hops + 1, "common-words": 10, "frequent-words": 3}
    for question in haystack.questions:
        assert len(haystack.tokens) + len(question.tokens) + question.room == length
        text = tokenizer.decode([*haystack.tokens.tolist(), *question.tokens.tolist()])
        assert len(set(question.wanted)) == len(question.wanted) == wanted.get(task, 1)
        assert Counter(solve(text)) == Counter(question.wanted)
        answer = tokenizer.decode(question.answer.tolist())
        assert all(found_in(string, answer) for string in question.wanted)
        assert question.room == len(question.answer) * 3 // 2 + 8
        assert (question.depth is not None) == (task in ("single", "multi-key"))


@pytest.mark.parametrize("task", TASKS)
def test_each_length_is_hit_from_the_shortest_on(task):
    tokenizer = Bytes()
    with pytest.raises(ConfigError, match=rf"--context-lengths 90: {task}.* takes \d+ tokens") as e:
        made(task, tokenizer, 90)
    takes = int(re.search(r"takes (\d+)", str(e.value))[1])
    fit = 0
    for length in range(takes - 20, takes + 400, 10 if takes > 1000 else 1):
        try:
            (haystack,) = made(task, tokenizer, length)
        except ConfigError as error:  # another length draws other words
            assert int(re.search(r"takes (\d+)", str(error))[1]) > length
            continue
        fit += 1
        for q in haystack.questions:
            assert len(haystack.tokens) + len(q.tokens) + q.room == length
    assert fit > 10


def test_what_does_not_fit_is_named_with_its_size():
    with pytest.raises(ConfigError, match="500: multi-value with --needles 40 takes"):
        made("multi-value", Bytes(), 500, settings=Settings(needles=40))
    with pytest.raises(ConfigError, match="500: variables with --hops 99 takes"):
        made("variables", Bytes(), 500, settings=Settings(hops=99))


def test_common_words_begin_with_a_list_whose_answer_is_shown():
    (haystack,) = made("common-words", Bytes(), 7000)
    text = Bytes().decode(haystack.tokens.tolist())
    (shown, answer), (asked, _) = re.findall(r"\nIn this list [^:]*: (.*)\.\n+(.*)", text)
    counts = Counter(shown.split(", "))
    assert sorted(counts.values()) == [1] * 10 + [3] * 10
    line = "The 10 words that stand most often in the list are "
    assert answer.startswith(line) and answer.endswith(".")
    named = re.split(", | and ", answer.removeprefix(line).rstrip("."))
    assert set(named) == {word for word, count in counts.items() if count == 3}
    assert not counts.keys() & set(asked.split(", "))


def test_lists_fill_the_text_and_count_as_they_should():
    for length in (6000, 9000):
        (haystack,) = made("common-words", Bytes(), length)
        counts = entries(Bytes().decode(haystack.tokens.tolist()))
        assert sorted(counts.values())[-11:] == [3] + [30] * 10 and min(counts.values()) == 3
        assert (haystack.tokens == ord("~")).sum() < 0.05 * length
    (haystack,) = made("frequent-words", Bytes(), 9000)
    counts = sorted(entries(Bytes().decode(haystack.tokens.tolist())).values(), reverse=True)
    n = counts[0] * 1.6449  # zeta(2)
    assert all(abs(count - n / (1.6449 * k**2)) <= 1.1 for k, count in enumerate(counts, 1))
    assert counts[2] > counts[3] and counts[-1] == 1
    assert (haystack.tokens == ord("~")).sum() < 0.05 * 9000


def test_names_do_not_run_out():
    from pose_megatron.evaluation.words import words
    from pose_megatron.positions.draws import Draw

    many = words(Draw(0, 0, 0), 13_000)
    assert len(set(many)) == 13_000 and {word.count("-") for word in many} == {2}


def test_a_text_depends_on_seed_task_length_and_its_number_alone():
    def texts(task="multi-key", length=900, trials=3, seed=0):
        return [h.tokens.tolist() for h in made(task, Bytes(), length, trials, seed=seed)]

    assert texts() == texts(trials=5)[:3]
    for one, other in pairwise(
        [*texts(), *texts(seed=1), *texts("multi-query"), *texts(length=901)]
    ):
        assert one != other
    names = re.findall(r"of ([\w-]+) is", Bytes().decode(texts()[0]))
    assert names == [
        "bronze-train",
        "mellow-candle",
        "sharp-pond",
        "frozen-castle",
    ]  # found once, kept


def machine(sight):
    """Logits of a machine that solves the task from the last `sight` bytes before the question."""

    def logits(tokens, last):
        out = torch.zeros(len(tokens), last, 256)
        for row, whole in enumerate(tokens.tolist()):
            assert last == 1
            text = Bytes().decode(whole)
            body, _, line = text.rpartition("\n")
            asked = re.match(
                r"(The secret [^,]*? is|The \d.*? are|The .*? and .*? are|All.*?:)(.*)", line
            )
            if not asked:  # in the middle of a question, beside a row that is at its end
                continue
            found, written = solve(f"{body[-sight:]}\n{asked[1]}"), asked[2]
            answer = f" {', '.join(found)}"
            out[row, 0, ord((answer + "." * len(text))[len(written)])] = 9.0
        return out

    return logits


def answers(logits, asked, length, batch_tokens=4096, record=None):
    reader = LogitsReader(logits, 256, batch_tokens)
    return Ruler(reader, Bytes().decode, record or Record(None, {}, [])).answers(asked, length)


@pytest.mark.parametrize("batch_tokens", [700, 40_000])
@pytest.mark.parametrize("task", TASKS)
def test_a_machine_that_reads_all_finds_all(task, batch_tokens):
    length = 7000 if task.endswith("-words") else 1200
    asked = made(task, Bytes(), length, 3)
    found = answers(machine(length), asked, length, batch_tokens)
    assert all(all(answer.found) for answer in found)
    assert summary(found, 3)["ruler"] == 1.0


@pytest.mark.parametrize("task", NEEDLES)
def test_a_machine_that_forgets_finds_what_is_near(task):
    asked, near = made(task, Bytes(), 1200, 8), []
    for haystack in asked:
        for q in haystack.questions:
            prompt = Bytes().decode([*haystack.tokens.tolist(), *q.tokens.tolist()])
            seen = prompt.rpartition("\n")[0][-600:] + "\n"
            near.append(
                [re.search(rf"\n\w+ secret .* is {w}\.\n", seen) is not None for w in q.wanted]
            )
    found = answers(machine(600), asked, 1200)
    assert [answer.found for answer in found] == near
    assert 0 < sum(map(sum, near)) < sum(map(len, near))


@pytest.mark.parametrize(
    "wanted, written, found",
    [
        ("4821337", " 4821337.", True),
        ("4821337", " 14821337", False),
        ("4821337", " 48213370", False),
        ("amber-heron", "It is Amber-Heron", True),
        ("amber-heron", "amber-herons", False),
        ("KQXA", "\nkqxa, BMTZ", True),
        ("KQXA", "KQX", False),
        ("1f-a(b", "1f-a(b)", True),
    ],
)
def test_what_counts_as_found(wanted, written, found):
    assert found_in(wanted, written) is found


def test_a_summary_by_hand():
    """Two texts of two questions with two strings each: 5 of 8 are found, 3 + 2 of 4."""
    given = [Answer(0.25, [True, True], "a"), Answer(0.5, [True, False], "b")]
    given += [Answer(0.75, [True, True], "c"), Answer(1.0, [False, False], "d")]
    row = summary(given, 2)
    assert row["ruler"] == 0.625
    assert row["answers"] == [[0.25, 1.0], [0.5, 0.5], [0.75, 1.0], [1.0, 0.0]]
    # The two texts' means, 3/4 and 1/2, spread less than 4 independent ones each: all 8 count.
    z, p, n = 1.96, 0.625, 8
    middle, half = (p + z * z / 2 / n), z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    assert row["low"] == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-4)
    assert row["high"] == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-4)


def test_a_killed_run_is_gone_on_with(tmp_path):
    asked, calls = made("multi-key", Bytes(), 900, 4), []

    def record():
        return Record(str(tmp_path / "results.jsonl"), {"metric": "ruler"}, [])

    def dies(tokens, last):
        calls.append(last)
        if len(calls) > 200:  # about 20 tokens for each of four answers
            raise KeyboardInterrupt
        return machine(500)(tokens, last)

    with pytest.raises(KeyboardInterrupt):
        answers(dies, asked, 900, 900, record())
    done = (tmp_path / "results.jsonl.parts").read_text().splitlines()
    assert 0 < len(done) < 4
    again = answers(machine(500), asked, 900, 900, record())
    assert again == answers(machine(500), asked, 900)
    assert answers(None, asked, 900, 900, record()) == again
    assert (tmp_path / "results.jsonl.parts").read_text().splitlines()[: len(done)] == done


def test_another_models_ids_are_named():
    asked = made("single", Words(), 300)
    check_vocabulary(asked, 1000)
    with pytest.raises(ConfigError, match="is outside the checkpoint's vocabulary of 20: --tok"):
        check_vocabulary(asked, 20)
