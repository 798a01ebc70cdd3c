"""Passkey retrieval against readers whose score is known beforehand, and transformers' decoding."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pose_megatron.evaluation.haystack import Haystack, Question, filler
from pose_megatron.evaluation.passkey import NAMES, Passkeys, haystacks, summary
from pose_megatron.evaluation.record import Record
from tests.readers import LogitsReader

pytestmark = pytest.mark.usefixtures("world")


def encode(text):
    """A token for each byte."""
    return list(text.encode())


def decode(ids):
    return bytes(ids).decode(errors="replace")


def text(haystack, question):
    """A prompt with its answer."""
    return decode([*haystack.tokens, *question.tokens, *question.answer])


def texts(*args, **options):
    return [text(h, q) for h in haystacks(*args, **options) for q in h.questions]


def answers(logits, asked, batch_tokens=4096, record=None, decode=decode):
    record = record or Record(None, {"metric": "passkey"}, [])
    reader = LogitsReader(logits, 256, batch_tokens)
    (question, *_), shared = asked[0].questions, len(asked[0].tokens)
    return Passkeys(reader, decode, record).answers(
        asked, shared + len(question.tokens) + question.room
    )


def reader(sight):
    """Logits of a machine that looks for the last line's words in the last `sight` tokens and goes
    on as that line went on."""

    def logits(tokens, last):
        out = torch.zeros(len(tokens), last, 256)
        for row, whole in enumerate(tokens.tolist()):
            for i in range(last):
                seen = bytes(whole[: len(whole) - last + i + 1])
                stem = seen[seen.rindex(b"\n") :]
                before = seen[:-1][-sight:]
                at = before.find(stem)
                if at >= 0:
                    out[row, i, before[at + len(stem)]] = 9.0
        return out

    return logits


@given(st.integers(190, 700), st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_prompt_is_what_it_says(length, trials, needles, seed):
    made = haystacks(encode, filler(encode), length, trials, needles, seed, first=[1])
    assert len(made) == trials
    depths = []
    for haystack in made:
        assert len(haystack.questions) == needles and haystack.tokens[0] == 1
        names = set()
        for question in haystack.questions:
            whole = text(haystack, question)
            assert len(whole) == length and question.room == len(question.answer)
            lines = re.findall(r"\nThe pass key of (\w+) is (\d{5})\n", whole)
            assert len(lines) == len({name for name, _ in lines}) == needles
            assert len({number for _, number in lines}) == needles
            asked = re.search(r"\nThe pass key of (\w+) is (\d{5})$", whole)
            assert asked and asked.groups() in lines and question.wanted == (asked[2],)
            assert decode(question.answer.tolist()) == f" {asked[2]}"
            names.add(asked[1])
            depths.append(question.depth)
            if needles == 1:  # at that share of the filler
                needle = whole.index(f"\nThe pass key of {asked[1]}")
                room = length - 1 - 2 * len(asked[0]) - 1
                assert needle - 1 == round(question.depth * room)
        assert len(names) == needles
        longest = max(len(f"\nThe pass key of {name} is 12345") for name in names)
        assert len(haystack.tokens) == length - longest
    n = trials * needles
    assert sorted(depths) == pytest.approx([i / (n - 1) for i in range(n)] if n > 1 else [0.5])


def test_every_name_gets_its_turn_and_needles_stand_in_the_order_of_their_depths():
    made = haystacks(encode, filler(encode), 400, 130, 3)
    whole = [[text(h, q) for q in h.questions] for h in made]
    asked = [re.search(r"of (\w+) is \d+$", t)[1] for some in whole for t in some]
    names = Counter(asked)
    assert set(names) == set(NAMES) and max(names.values()) < 40  # 12 each
    for some in whole:
        starts = [t.index(re.search(r"\nThe pass key of \w+ is \d+$", t)[0]) for t in some]
        assert starts == sorted(starts)
    numbers = {re.search(r"\d+$", t)[0] for some in whole for t in some}
    assert len(numbers) > 385 and {n[0] for n in numbers} == set("123456789")


def test_they_depend_on_the_seed_alone():
    one, again = (texts(encode, filler(encode), 200, 5, 2, seed=7) for _ in range(2))
    assert one == again
    other = texts(encode, filler(encode), 200, 5, 2, seed=8)
    assert not any(a == b for a, b in zip(one, other, strict=True))
    assert one[4].endswith("\nThe pass key of candle is 33398")  # found once, kept


@pytest.mark.parametrize("batch_tokens", [90, 4096])
def test_a_machine_that_reads_all_finds_all_and_one_that_forgets_finds_what_is_near(batch_tokens):
    made = haystacks(encode, filler(encode), 500, 7, needles=3)
    found = answers(reader(500), made, batch_tokens)
    assert [a.found for a in found] == [True] * 21 and {a.right for a in found} == {1.0}
    assert [a.depth for a in found] == [q.depth for h in made for q in h.questions]
    assert all(a.loss == pytest.approx(np.log(255 / np.exp(9) + 1), rel=1e-4) for a in found)

    near = []  # where the answer's needle lies within sight of the question's last token
    for whole in (text(h, q) for h in made for q in h.questions):
        stem = whole[whole.rindex("\n") :]
        near.append(len(whole) - whole.index(stem) < 250)
    assert 0 < sum(near) < 21
    assert [a.found for a in answers(reader(250), made, batch_tokens)] == near


def test_a_haystack_goes_through_once():
    made = haystacks(encode, filler(encode), 500, 2, needles=4)
    read = LogitsReader(reader(500), 256, 4096)
    done = []
    read.progress = done.append
    Passkeys(read, decode, Record(None, {}, [])).answers(made, 500)
    assert sum(done) == sum(h.cost for h in made) < 2 * (500 + 4 * 40)


def test_digits_count_beside_the_whole_number():
    """The machine reads every 7 as a 1."""
    made = haystacks(encode, filler(encode), 300, 40)

    def blind(tokens, last):
        logits = reader(300)(tokens, last)
        logits[..., ord("1")] += 2 * logits[..., ord("7")]
        return logits

    for haystack, answer in zip(made, answers(blind, made), strict=True):
        number = text(haystack, haystack.questions[0])[-5:]
        assert answer.right == pytest.approx(1 - number.count("7") / 5)
        assert answer.found == ("7" not in number)


def test_found_is_what_greedy_decoding_gives():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            max_position_embeddings=64,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    starts = torch.randint(64, (6, 20))
    whole = model.generate(starts, max_new_tokens=4, do_sample=False, pad_token_id=0)

    @torch.no_grad()
    def logits(tokens, last):
        return model(tokens).logits[:, -last:]

    def found(rows, lengths):
        made = [
            Haystack(w[:15], [Question(w[15:-n], w[-n:], n, (), 0.0)])
            for w, n in zip(rows, lengths, strict=True)
        ]
        reader = LogitsReader(logits, 64, 48)
        asked = Passkeys(reader, str, Record(None, {}, [])).answers(made, 24)
        return [answer.found for answer in asked]

    assert found(whole, [1, 2, 3, 4, 4, 4]) == [True] * 6
    for place in range(1, 5):  # one token of the answer is another
        changed = whole.clone()
        changed[:, -place] = (changed[:, -place] + 1) % 64
        assert found(changed, [4] * 6) == [False] * 6


def test_tokens_that_swallow_the_space():
    """The cut between question and answer is where the ids differ, not where the text does."""

    def swallows(text):
        return [
            i
            for word in re.findall(r" ?\w+|\W", text)
            for i in ([1000 + int(word)] if word.strip().isdigit() else encode(word))
        ]

    (made,) = haystacks(swallows, filler(swallows), 200, 1)
    (answer,) = made.questions[0].answer
    assert 11000 <= answer < 101000 and (made.tokens == answer).sum() == 1


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"--context-lengths 80: 2 needles and the question take"):
        haystacks(encode, filler(encode), 80, 1, 2)
    with pytest.raises(ValueError, match="--needles 33 must lie between 1 and 32"):
        haystacks(encode, filler(encode), 8000, 1, 33)


def test_a_killed_run_is_gone_on_with_from_its_last_haystack(tmp_path):
    made, calls = haystacks(encode, filler(encode), 300, 4, needles=2), []

    def record():
        return Record(str(tmp_path / "results.jsonl"), {"metric": "passkey"}, [])

    def dies(tokens, last):
        calls.append(last)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return reader(250)(tokens, last)

    with pytest.raises(KeyboardInterrupt):
        answers(dies, made, 300, record())
    assert len((tmp_path / "results.jsonl.parts").read_text().splitlines()) == 2
    again = answers(reader(250), made, 300, record())
    assert again == answers(reader(250), made, 300)
    assert answers(None, made, 300, record()) == again
    row = summary(again, 2)
    assert row["passkey"] == sum(a.found for a in again) / 8 and len(row["answers"]) == 8


def test_results_in_a_models_folder_do_not_make_it_another_model(tmp_path):
    made = haystacks(encode, filler(encode), 300, trials=2)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")

    def record():
        path = str(tmp_path / "results.jsonl")
        return Record(path, {"metric": "passkey"}, [*tmp_path.iterdir()])

    first = answers(reader(250), made, 300, record())
    record().finish({"context_length": 300})
    assert answers(None, made, 300, record()) == first  # nothing is read
    weights.write_bytes(b"another")
    with pytest.raises(TypeError):
        answers(None, made, 300, record())
