"""sampler_flags.py: the sampler that the flags ask for, and a sentence where there is none."""

import pytest

from pose_megatron.config.arguments import parse
from pose_megatron.config.sampler import build_sampler, non_default_flags


class Tokens:
    """Five tokens, and what they read."""

    texts = ("a", "b.", "c", ".", "<|end|>")

    def ids_ending(self, text):
        return [i for i, token in enumerate(self.texts) if token.endswith(text)]


def sampler(words, target=8192, tokenizer=None):
    return build_sampler(parse([*words, "--train-iters", "1"]), target, tokenizer)


def test_the_sampler_follows_the_flags():
    plain, default = sampler([], target=2048), sampler([])
    assert (plain.name, default.name) == ("full", "pose")
    assert (default.window, default.target, default.seed, default.num_chunks) == (
        2048,
        8192,
        1234,
        2,
    )
    asked = sampler(
        """--position-sampler pose --pose-num-chunks 3 --pose-content aligned --seed 7
        --pose-skip-law sorted-uniform --pose-plain-fraction 0.25
        --pose-target-schedule 0:4096 500:8192""".split()
    )
    assert (asked.num_chunks, asked.content, asked.seed, asked.skip_law, asked.plain_fraction) == (
        3,
        "aligned",
        7,
        "sorted-uniform",
        0.25,
    )
    assert asked.target_schedule == ((0, 4096), (500, 8192))
    assert "3 chunks, aligned text, sorted-uniform skips, 25% plain samples" in asked.describe()


def test_boundaries_are_ids_or_texts_of_the_tokenizer():
    name = ["--position-sampler", "pose-boundary", "--pose-boundaries"]
    assert sampler([*name, "9", "3"]).boundaries == (3, 9)
    assert sampler([*name, "<|end|>", "7"], tokenizer=Tokens()).boundaries == (4, 7)
    recipe = ["--position-sampler", "longrecipe", "--pose-boundaries", "."]
    assert sampler(recipe, tokenizer=Tokens()).boundaries == (1, 3)


def test_longrecipe_knows_how_sentences_end():
    class Ends:
        def ids_ending(self, text):
            return [".!?\n".index(text)]

    assert sampler(["--position-sampler", "longrecipe"], tokenizer=Ends()).boundaries == (
        0,
        1,
        2,
        3,
    )


@pytest.mark.parametrize(
    "words, tokenizer, message",
    [
        (
            ["--position-sampler", "longrecipe"],
            None,
            "--pose-boundaries '.' is a text: name the tok",
        ),
        (
            ["--position-sampler", "pose-boundary"],
            None,
            "cuts at tokens: name them with --pose-bound",
        ),
        (
            ["--position-sampler", "pose-boundary", "--pose-boundaries", "zebra"],
            Tokens(),
            "--pose-boundaries 'zebra': no token of the tokenizer is that text or ends with it",
        ),
        (
            ["--pose-boundaries", "7"],
            None,
            "--pose-boundaries 7 has no effect with --position-sampler",
        ),
        (
            ["--pose-target-schedule", "4096"],
            None,
            "--pose-target-schedule 4096: give 'first-sample:t",
        ),
        (["--pose-target-schedule", "0:a"], None, "--pose-target-schedule 0:a: give"),
        (["--pose-target-schedule", "0:4096"], None, "to --max-position-embeddings 8192"),
        (["--pose-plain-fraction", "2"], None, "--pose-plain-fraction must be in"),
        (["--position-sampler", "skip"], None, "--position-sampler skip is none of"),
    ],
)
def test_a_sampler_that_cannot_be_is_answered_with_a_sentence(words, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        sampler(words, tokenizer=tokenizer)


def test_non_default_flags_are_those_that_differ_from_the_defaults():
    args = parse(["--pose-num-chunks", "3", "--pose-content", "uniform", "--train-iters", "1"])
    assert non_default_flags(args.position) == {"pose_num_chunks": 3}
