"""Passkey retrieval against readers whose score is known beforehand, and transformers' decoding."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pose_megatron.evaluation.passkey import NAMES, Prompt, answers, filler, interval, prompts


def encode(text):
    """A token for each byte."""
    return list(text.encode())


def text(prompt):
    return bytes(prompt.tokens.tolist()).decode()


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
    made = prompts(encode, filler(encode), length, trials, needles, seed, first=[1])
    assert len(made) == trials
    for i, prompt in enumerate(made):
        assert len(prompt.tokens) == length and prompt.tokens[0] == 1
        lines = re.findall(r"\nThe pass key of (\w+) is (\d{5})\n", text(prompt))
        assert len(lines) == needles
        assert len({name for name, _ in lines}) == len({number for _, number in lines}) == needles
        asked = re.search(r"\nThe pass key of (\w+) is (\d{5})$", text(prompt))
        assert asked and asked.groups() in lines
        assert text(prompt)[-prompt.answer :] == f" {asked[2]}"
        needle = text(prompt).index(f"\nThe pass key of {asked[1]}")
        rest = length - len(asked[0])
        if trials > 1:
            assert prompt.depth == i / (trials - 1)
        if needles == 1:  # at that share of the filler
            room = rest - 1 - len(f"{asked[0]}\n")
            assert needle - 1 == round(prompt.depth * room)


def test_every_name_and_every_place_gets_its_turn():
    made = prompts(encode, filler(encode), 300, 400, 3)
    names = Counter(re.search(r"of (\w+) is \d+$", text(p))[1] for p in made)
    assert set(names) == set(NAMES) and max(names.values()) < 40  # 12.5 each
    others = [
        text(p).index(m[0])
        for p in made
        for m in re.finditer(r"\nThe pass key of (\w+) is (\d+)\n", text(p))
    ]
    quarters = np.histogram(others, 4, (0, 300))[0] / len(others)
    assert quarters[:3].min() > 0.2  # the last one holds the question
    numbers = {re.search(r"\d+$", text(p))[0] for p in made}
    assert len(numbers) > 395 and {n[0] for n in numbers} == set("123456789")


def test_they_depend_on_the_seed_alone():
    one, again = (prompts(encode, filler(encode), 200, 5, 2, seed=7) for _ in range(2))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, again, strict=True))
    other = prompts(encode, filler(encode), 200, 5, 2, seed=8)
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))
    assert text(one[2]).endswith("\nThe pass key of candle is 33398")  # found once, kept


def test_a_machine_that_reads_all_finds_all_and_one_that_forgets_finds_what_is_near():
    made = prompts(encode, filler(encode), 500, 21, needles=3)
    found = list(answers(reader(500), made, batch_tokens=2000))
    assert [a.found for a in found] == [True] * 21
    assert [a.depth for a in found] == [p.depth for p in made]
    assert all(a.loss == pytest.approx(np.log(255 / np.exp(9) + 1), rel=1e-4) for a in found)

    near = []  # where the answer's needle lies within sight of the question's last token
    for p in made:
        whole = text(p)
        stem = whole[whole.rindex("\n") :]
        near.append(len(whole) - whole.index(stem) < 250)
    assert 0 < sum(near) < 21
    assert [a.found for a in answers(reader(250), made)] == near


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

    lengths = [1, 2, 3, 4, 4, 4]
    made = [Prompt(w, n, 0.0) for w, n in zip(whole, lengths, strict=True)]
    assert all(a.found for a in answers(logits, made, batch_tokens=48))
    for place in range(1, 5):  # one token of the answer is another
        changed = whole.clone()
        changed[:, -place] = (changed[:, -place] + 1) % 64
        found = [a.found for a in answers(logits, [Prompt(w, 4, 0.0) for w in changed])]
        assert found == [False] * 6


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
    assert interval(found, trials) == pytest.approx((low, high), abs=5e-5)
