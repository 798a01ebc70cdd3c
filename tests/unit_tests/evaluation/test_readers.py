"""Readers against transformers' one pass over the whole text, and against plain attention."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pose_megatron.checkpoints.convert import convert
from pose_megatron.checkpoints.megatron.directory import find
from pose_megatron.evaluation.kept_attention import attend
from pose_megatron.evaluation.megatron_reader import MegatronReader
from pose_megatron.evaluation.reading import UNASKED, score
from pose_megatron.evaluation.stage import load_stage
from pose_megatron.evaluation.transformers_reader import load_transformers
from pose_megatron.rope.scaling import RopeScaling

pytestmark = pytest.mark.usefixtures("world")
VOCABULARY, TOKENS = 301, 300
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
SIZES = COMMON | {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(**COMMON, n_layer=2, n_embd=64, n_head=4, rotary_dim=8, n_positions=512)
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{model: (Megatron folder, Hugging Face folder)}"""
    made = {}
    for name, build in MODELS.items():
        torch.manual_seed(1)
        hf, megatron = (tmp_path_factory.mktemp(kind) for kind in ("hf", "megatron"))
        build().save_pretrained(hf)
        convert(hf, megatron, loader="hf", saver="megatron", verify=False, quiet=True)
        made[name] = megatron, hf
    return made


@pytest.fixture(scope="module")
def text():
    tokens = torch.randint(VOCABULARY, (2, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def readers(folders, scaling=None, batch_tokens=4096):
    megatron, hf = folders
    found, model = find(megatron), None
    if scaling is not None:
        window = int(scaling.factor * 128)
        model = dataclasses.replace(
            found.model, rope_scaling=scaling, max_position_embeddings=window
        )
    yield MegatronReader(load_stage(found, model), VOCABULARY, batch_tokens)
    yield load_transformers(hf, model, False, batch_tokens)


def one_pass(folders, text, scaling=None):
    """Losses and most likely tokens, by one plain call of transformers' model."""
    *_, reader = readers(folders, scaling)
    tokens, labels = text
    with torch.no_grad():
        logits = reader._model(tokens).logits
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), logits.argmax(-1)


@pytest.mark.parametrize("batch_tokens", [4096, 130, 2])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_are_what_one_pass_is(folders, text, name, batch_tokens):
    losses, best = one_pass(folders[name], text)
    n = TOKENS if batch_tokens > 2 else 20  # a token at a time
    for reader in readers(folders[name], None, batch_tokens):
        for _ in range(2):  # the second time nothing of the first is left
            reader.begin(2, n)
            scores = reader.read(text[0][:, :n], text[1][:, :n])
            torch.testing.assert_close(scores.loss, losses[:, :n], rtol=0, atol=2e-4)
            assert torch.equal(scores.best, best[:, :n])


LISTS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 4.0, 128),
        RopeScaling("yarn", 4.0, 128),
        RopeScaling("llama3", 4.0, 128),
        RopeScaling("longrope", 4.0, 128, **LISTS),
        RopeScaling("dynamic", 4.0, 128),
    ],
    ids=str,
)
def test_an_interpolation_is_put_on_both_and_is_the_whole_texts_from_its_start(
    folders, text, scaling
):
    """Where frequencies depend on the length, transformers' one pass has those of the whole text
    for every token."""
    losses, best = one_pass(folders["llama"], text, scaling)
    plain, _ = one_pass(folders["llama"], text)
    assert (losses - plain).abs().max() > 0.5
    for reader in readers(folders["llama"], scaling, 130):
        for _ in range(2):
            reader.begin(2, 100)  # a shorter text before leaves nothing behind
            reader.read(text[0][:, :100])
            reader.begin(2, TOKENS)
            scores = reader.read(*text)
            torch.testing.assert_close(scores.loss, losses, rtol=0, atol=5e-4)
            assert (scores.best == best).float().mean() > 0.99


@pytest.mark.parametrize("batch_tokens", [4096, 64])
def test_what_is_not_kept_leaves_no_trace(folders, text, batch_tokens):
    losses, best = one_pass(folders["llama"], text)
    (tokens, labels), done = text, 200
    asked = labels[:, done:].clone()
    asked[:, :60] = UNASKED
    for reader in readers(folders["llama"], None, batch_tokens):
        reader.begin(2, TOKENS)
        reader.read(tokens[:, :120])
        assert not reader.read(tokens[:, 120:done]).loss.any()
        for _ in range(2):
            reader.read(tokens[:, :70], labels[:, :70], keep=False)  # another question
            scores = reader.read(tokens[:, done:], asked, keep=False)
            torch.testing.assert_close(
                scores.loss[:, 60:], losses[:, done + 60 :], rtol=0, atol=2e-4
            )
            assert torch.equal(scores.best[:, 60:], best[:, done + 60 :])
            assert not scores.loss[:, :60].any() and not scores.best[:, :60].any()
        rest = reader.read(tokens[:, done:], labels[:, done:])
        torch.testing.assert_close(rest.loss, losses[:, done:], rtol=0, atol=2e-4)


def test_progress_counts_tokens(folders, text):
    for reader in readers(folders["llama"], None, 130):
        done = []
        reader.progress = done.append
        reader.begin(2, TOKENS)
        reader.read(*text)
        assert sum(done) == 2 * TOKENS and len(done) == 5


def test_scores_are_those_of_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator) * 50  # beyond what exp can hold
    labels = torch.randint(7, (2, 5), generator=generator)
    labels[0, 0] = UNASKED
    logits[1, 1, 2:4] = logits[1, 1].max() + 1  # two are equally likely
    scores = score(logits.clone(), labels)
    expected = F.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=UNASKED
    )
    torch.testing.assert_close(scores.loss, expected)
    assert scores.best[1, 1] == 2 and scores.best[0, 0] == 0
    assert torch.equal(scores.best[1], logits[1].argmax(-1))


@pytest.mark.parametrize("before", [0, 1, 37])
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_in_two_parts_is_attention(before, heads, groups, scale):
    generator = torch.Generator().manual_seed(before)
    s, d = 16, 8
    query = torch.randn(2, heads, s, d, generator=generator, dtype=torch.float64) * 3
    keys, values = torch.randn(
        2, 2, groups, before + s, d, generator=generator, dtype=torch.float64
    )
    mask = torch.ones(s, before + s, dtype=torch.bool).tril(before)
    expected = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    order = torch.randperm(before, generator=generator)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        q, k, v = (x.to(dtype) for x in (query, keys, values))
        found = attend(q, k[:, :, order], v[:, :, order], k[:, :, before:], v[:, :, before:], scale)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound * 3)
