"""Passkey retrieval against readers whose score is known beforehand, and transformers' decoding."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pose_megatron.evaluation.passkey import (
    NAMES,
    Haystack,
    Passkeys,
    Prompt,
    effective_length,
    filler,
    haystacks,
    interval,
    summary,
)
from pose_megatron.evaluation.record import Record
from tests.readers import LogitsReader

pytestmark = pytest.mark.usefixtures("world")


def encode(text):
    """A token for each byte."""
    return list(text.encode())


def decode(ids):
    return bytes(ids).decode(errors="replace")


def text(prompt):
    return decode(prompt.tokens.tolist())


def prompts(*args, **options):
    return [prompt for made in haystacks(*args, **options) for prompt in made.prompts]


def answers(logits, asked, batch_tokens=4096, record=None, decode=decode):
    record = record or Record(None, {"metric": "passkey"}, [])
    reader = LogitsReader(logits, 256, batch_tokens)
    return Passkeys(reader, decode, record).answers(asked, len(asked[0].prompts[0].tokens))


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
        assert len(haystack.prompts) == needles
        names = set()
        for prompt in haystack.prompts:
            assert len(prompt.tokens) == length and prompt.tokens[0] == 1
            first = haystack.prompts[0].tokens[: haystack.shared]
            assert torch.equal(prompt.tokens[: haystack.shared], first)
            lines = re.findall(r"\nThe pass key of (\w+) is (\d{5})\n", text(prompt))
            assert len(lines) == len({name for name, _ in lines}) == needles
            assert len({number for _, number in lines}) == needles
            asked = re.search(r"\nThe pass key of (\w+) is (\d{5})$", text(prompt))
            assert asked and asked.groups() in lines
            assert text(prompt)[-prompt.answer :] == f" {asked[2]}"
            names.add(asked[1])
            depths.append(prompt.depth)
            if needles == 1:  # at that share of the filler
                needle = text(prompt).index(f"\nThe pass key of {asked[1]}")
                room = length - 1 - 2 * len(asked[0]) - 1
                assert needle - 1 == round(prompt.depth * room)
        assert len(names) == needles
        longest = max(len(f"\nThe pass key of {name} is 12345") for name in names)
        assert haystack.shared == length - longest
    n = trials * needles
    assert sorted(depths) == pytest.approx([i / (n - 1) for i in range(n)] if n > 1 else [0.5])


def test_every_name_gets_its_turn_and_needles_stand_in_the_order_of_their_depths():
    made = haystacks(encode, filler(encode), 400, 130, 3)
    asked = [re.search(r"of (\w+) is \d+$", text(p))[1] for h in made for p in h.prompts]
    names = Counter(asked)
    assert set(names) == set(NAMES) and max(names.values()) < 40  # 12 each
    for h in made:
        starts = [
            text(p).index(re.search(r"\nThe pass key of \w+ is \d+$", text(p))[0])
            for p in h.prompts
        ]
        assert starts == sorted(starts)
    numbers = {re.search(r"\d+$", text(p))[0] for h in made for p in h.prompts}
    assert len(numbers) > 385 and {n[0] for n in numbers} == set("123456789")


def test_they_depend_on_the_seed_alone():
    one, again = (prompts(encode, filler(encode), 200, 5, 2, seed=7) for _ in range(2))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, again, strict=True))
    other = prompts(encode, filler(encode), 200, 5, 2, seed=8)
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))
    assert text(one[4]).endswith("\nThe pass key of candle is 33398")  # found once, kept


@pytest.mark.parametrize("batch_tokens", [90, 4096])
def test_a_machine_that_reads_all_finds_all_and_one_that_forgets_finds_what_is_near(batch_tokens):
    made = haystacks(encode, filler(encode), 500, 7, needles=3)
    found = answers(reader(500), made, batch_tokens)
    assert [a.found for a in found] == [True] * 21 and {a.right for a in found} == {1.0}
    assert [a.depth for a in found] == [p.depth for h in made for p in h.prompts]
    assert all(a.loss == pytest.approx(np.log(255 / np.exp(9) + 1), rel=1e-4) for a in found)

    near = []  # where the answer's needle lies within sight of the question's last token
    for p in (p for h in made for p in h.prompts):
        whole = text(p)
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
    assert sum(done) == sum(h.tokens for h in made) < 2 * (500 + 4 * 40)


def test_digits_count_beside_the_whole_number():
    """The machine reads every 7 as a 1."""
    made = haystacks(encode, filler(encode), 300, 40)

    def blind(tokens, last):
        logits = reader(300)(tokens, last)
        logits[..., ord("1")] += 2 * logits[..., ord("7")]
        return logits

    for haystack, answer in zip(made, answers(blind, made), strict=True):
        number = text(haystack.prompts[0])[-5:]
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
        made = [Haystack([Prompt(w, n, 0.0)], 15) for w, n in zip(rows, lengths, strict=True)]
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

    (made,) = prompts(swallows, filler(swallows), 200, 1)
    assert made.answer == 1 and 11000 <= made.tokens[-1] < 101000
    assert (made.tokens == made.tokens[-1]).sum() == 2


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"--context-lengths 80: 2 needles and the question take"):
        prompts(encode, filler(encode), 80, 1, 2)
    with pytest.raises(ValueError, match="--needles 33 must lie between 1 and 32"):
        prompts(encode, filler(encode), 8000, 1, 33)


@pytest.mark.parametrize(
    "found, trials, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998)
    ],
)
def test_wilsons_interval(found, trials, low, high):
    answers = [[i < found] for i in range(trials)]
    assert interval(answers) == pytest.approx((low, high), abs=5e-5)


def test_answers_that_are_alike_in_a_haystack_count_less():
    """All eight of a haystack are found or none: as much as one answer each says."""
    alike = [[True] * 8, [False] * 8] * 10
    low, high = interval(alike)
    alone = interval([[True], [False]] * 10)
    assert low == pytest.approx(alone[0], abs=0.01) and high == pytest.approx(alone[1], abs=0.01)
    mixed = interval([[True, False] * 4] * 20)  # never more than so many independent ones
    assert mixed == pytest.approx(interval([[True], [False]] * 80))


def test_the_effective_length_is_where_all_up_to_it_hold():
    found = {16: 0.7, 4: 1.0, 8: 0.9, 32: 0.95}
    assert effective_length(found, 0.85) == 8 and effective_length(found, 0.7) == 32
    assert effective_length(found, 1.0) == 4 and effective_length({4: 0.5}, 0.85) == 0


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
