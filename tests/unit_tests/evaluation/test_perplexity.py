"""Perplexity against closed forms and against transformers, one token at a time."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pose_megatron.evaluation.perplexity import perplexities


def documents(*lengths, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    def uniform(tokens, last):
        return torch.zeros(len(tokens), last, 11)

    results = list(perplexities(uniform, documents(33, 40), [4, 8, 32], stride=3))
    assert [r.context_length for r in results] == [4, 8, 32]
    assert all(r.perplexity == pytest.approx(11) for r in results)
    # Ends at 32, 35, ...: one window in 33 tokens, three in 40 (32, 35, 38).
    assert {(r.tokens, r.documents) for r in results} == {(4 * 3, 2)}


def test_every_token_is_scored_in_its_own_window_as_transformers_scores_it():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=11,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():  # far from uniform, so that a shifted label shows
        weight.data.mul_(8)
    texts, stride = documents(21, 30), 2

    @torch.no_grad()
    def logits(tokens, last):
        return model(tokens).logits[:, -last:]

    for result in perplexities(logits, texts, [4, 16], stride, batch_tokens=40):
        c, losses = result.context_length, []
        for text in texts:
            for end in range(16, len(text), stride):
                for target in range(end - stride + 1, end + 1):
                    with torch.no_grad():
                        row = model(text[None, end - c : target]).logits[0, -1]
                    losses.append(-row.log_softmax(-1)[text[target]].item())
        assert result.tokens == len(losses)
        assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_standard_error_is_that_of_a_ratio_of_sums():
    values = [1.0, 2.0, 4.0]  # the loss of every token of a document, by its first token

    def known(tokens, last):
        wrong = torch.tensor([values[int(t)] for t in tokens[:, 0]])
        right = -torch.log(torch.expm1(wrong) / 10)  # with ten others at 0: loss = `wrong`
        out = torch.zeros(len(tokens), last, 11)
        out[..., 10] = right[:, None]
        return out

    texts = [torch.tensor([i] * 4 + [10]) for i in range(3)]
    (result,) = perplexities(known, texts, [4], stride=1)
    mean = sum(values) / 3
    assert result.loss == pytest.approx(mean, rel=1e-6)
    variance = sum((v - mean) ** 2 for v in values) / 2  # of equally long documents
    assert result.standard_error == pytest.approx(math.sqrt(variance / 3), rel=1e-6)


@pytest.mark.parametrize(
    ("lengths", "contexts", "stride", "message"),
    [
        ((40, 8), [4, 8], 2, "document 1 has 8 tokens, not more than the longest context"),
        ((40,), [4, 8], 5, "--stride 5 must lie between 1 and the shortest context length, 4"),
        ((), [4], 2, "no document has more than 4 tokens"),
    ],
)
def test_bad_input_is_named(lengths, contexts, stride, message):
    with pytest.raises(ValueError, match=message):
        list(perplexities(None, documents(*lengths), contexts, stride))


def test_every_window_begins_with_bos_and_scores_the_same_tokens():
    seen = []

    def logits(tokens, last):
        seen.append(tokens.clone())
        return torch.nn.functional.one_hot(tokens[:, -last:], 11).float()

    text = documents(21)
    kept = text[0].clone()
    plain = list(perplexities(logits, text, [4, 16], stride=2))
    windows, seen = seen, []
    with_bos = list(perplexities(logits, text, [4, 16], stride=2, bos=10))
    for before, after in zip(windows, seen, strict=True):
        assert (after[:, 0] == 10).all() and torch.equal(after[:, 1:], before[:, 1:])
    assert [(r.tokens, r.documents) for r in with_bos] == [(r.tokens, r.documents) for r in plain]
    assert with_bos == plain  # these logits see the scored tokens alone
    assert torch.equal(text[0], kept)
