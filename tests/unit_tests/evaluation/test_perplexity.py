"""Perplexity against closed forms and against transformers, one token at a time."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pose_megatron.evaluation.perplexity import Perplexities
from pose_megatron.evaluation.record import Record
from tests.readers import LogitsReader

pytestmark = pytest.mark.usefixtures("world")
NOTHING = {"name": "model", "metric": "perplexity"}


def documents(*lengths, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]


def perplexities(logits, texts, lengths, stride=None, bos=None, batch_tokens=64, record=None):
    reader = LogitsReader(logits, 11, batch_tokens)
    made = Perplexities(reader, texts, lengths, record or Record(None, NOTHING, []), bos)
    return list(made.in_windows(stride) if stride else made.by_position())


def uniform(tokens, last):
    return torch.zeros(len(tokens), last, 11)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    results = perplexities(uniform, documents(33, 40), [4, 8, 32], stride=3)
    assert [r.context_length for r in results] == [4, 8, 32]
    assert all(r.perplexity == pytest.approx(11) for r in results)
    # Ends at 32, 35, ...: one window in 33 tokens, three in 40 (32, 35, 38).
    assert {(r.tokens, r.documents) for r in results} == {(4 * 3, 2)}
    results = perplexities(uniform, documents(33, 40), [4, 8, 32])
    assert all(r.perplexity == pytest.approx(11) for r in results)
    assert [r.tokens for r in results] == [2 * 4, 2 * 4, 2 * 24]


@pytest.fixture(scope="module")
def llama():
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

    @torch.no_grad()
    def logits(tokens, last):
        return model(tokens).logits[:, -last:]

    def loss(text, start, target):
        """Of token `target` of a text that is read from `start` on."""
        row = logits(text[None, start:target], 1)[0, 0]
        return -row.log_softmax(-1)[text[target]].item()

    return logits, loss


def test_every_token_is_scored_in_its_own_window_as_transformers_scores_it(llama):
    logits, loss = llama
    texts, stride = documents(21, 30), 2
    for result in perplexities(logits, texts, [4, 16], stride, batch_tokens=40):
        c = result.context_length
        losses = [
            loss(text, end - c, target)
            for text in texts
            for end in range(16, len(text), stride)
            for target in range(end - stride + 1, end + 1)
        ]
        assert result.tokens == len(losses)
        assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(result.loss))


@pytest.mark.parametrize("batch_tokens", [7, 64])
def test_by_position_a_bin_has_the_tokens_that_so_many_stand_before(llama, batch_tokens):
    logits, loss = llama
    texts = documents(21, 30, 17)
    results = perplexities(logits, texts, [4, 7, 16], batch_tokens=batch_tokens)
    for result, before in zip(results, [range(1, 5), range(5, 8), range(8, 17)], strict=True):
        losses = [loss(text, 0, target) for text in texts for target in before]
        assert result.tokens == len(losses) and result.documents == 3
        assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_by_position_no_token_goes_through_twice(llama):
    reader = LogitsReader(llama[0], 11, 16)
    made = Perplexities(reader, documents(40, 40), [4, 8, 32], Record(None, NOTHING, []))
    done = []
    reader.progress = done.append
    list(made.by_position())
    assert sum(tokens.numel() for tokens in reader.seen) == sum(done) == 2 * 32
    assert max(tokens.numel() for tokens in reader.seen) <= 16


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
        ((40, 8), [4, 8], None, "document 1 has 8 tokens, not more than the longest context"),
        ((40,), [4, 8], 5, "--stride 5 must lie between 1 and the shortest context length, 4"),
        ((), [4], 2, "no document has more than 4 tokens"),
    ],
)
def test_bad_input_is_named(lengths, contexts, stride, message):
    with pytest.raises(ValueError, match=message):
        perplexities(None, documents(*lengths), contexts, stride)


@pytest.mark.parametrize("stride", [2, None])
def test_what_is_read_begins_with_bos_and_scores_the_same_tokens(stride):
    seen = []

    def logits(tokens, last):
        seen.append(tokens.clone())
        return torch.nn.functional.one_hot(tokens[:, -last:], 11).float()

    text = documents(21)
    kept = text[0].clone()
    plain = perplexities(logits, text, [4, 16], stride)
    windows, seen = seen, []
    with_bos = perplexities(logits, text, [4, 16], stride, bos=10)
    for before, after in zip(windows, seen, strict=True):
        assert (after[:, 0] == 10).all() and torch.equal(after[:, 1:], before[:, 1:])
    assert [(r.tokens, r.documents) for r in with_bos] == [(r.tokens, r.documents) for r in plain]
    if stride:
        assert with_bos == plain  # these logits see the scored tokens alone
    assert torch.equal(text[0], kept)


@pytest.mark.parametrize("stride", [3, None])
def test_a_killed_run_is_gone_on_with_from_its_last_document(tmp_path, llama, stride):
    logits, texts, results = llama[0], documents(20, 22, 24), tmp_path / "results.jsonl"
    whole = perplexities(logits, texts, [4, 16], stride, batch_tokens=16)
    calls = []

    def dies(tokens, last):
        calls.append(last)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return logits(tokens, last)

    def record(**conditions):
        return Record(str(results), NOTHING | conditions, [])

    with pytest.raises(KeyboardInterrupt):
        perplexities(dies, texts, [4, 16], stride, batch_tokens=8, record=record())
    parts = tmp_path / "results.jsonl.parts"
    done = len(parts.read_text().splitlines())
    assert 1 <= done <= (6 if stride else 3)
    again = perplexities(logits, texts, [4, 16], stride, batch_tokens=16, record=record())
    assert [r.loss for r in again] == pytest.approx([r.loss for r in whole], rel=1e-6)
    assert len(parts.read_text().splitlines()) == (6 if stride else 3) and not results.exists()

    def never(tokens, last):
        raise AssertionError

    assert perplexities(never, texts, [4, 16], stride, record=record()) == again
    with pytest.raises(AssertionError):  # under other conditions nothing is found
        perplexities(never, texts, [4, 16], stride, record=record(data_path="other"))


def test_a_part_is_found_while_its_files_are_the_same(tmp_path):
    file, results = tmp_path / "weights", tmp_path / "results.jsonl"
    file.write_text("one")
    (tmp_path / "results.jsonl.parts").write_text("not a part\n7\n{}\n")
    Record(str(results), NOTHING, [file]).add([1, 2], document=0)
    assert Record(str(results), NOTHING, [file]).found(document=0) == [1, 2]
    assert Record(str(results), NOTHING, [file]).found(document=1) is None
    file.write_text("other")
    record = Record(str(results), NOTHING, [file])
    assert record.found(document=0) is None
    for _ in range(2):  # a result stands there once
        record.finish({"context_length": 4, "perplexity": 2.0, "edges": (4,), "error": math.nan})
        record = Record(str(results), NOTHING, [file])
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    (row,) = rows
    assert math.isnan(row.pop("error")) and row.pop("edges") == [4]
    assert row.pop("made")["ranks"] == 1
    assert rows == [NOTHING | {"context_length": 4, "perplexity": 2.0}]
