"""Greedy decoding against transformers' own."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pose_megatron.evaluation.decoding import greedy
from pose_megatron.evaluation.transformers_reader import TransformersReader
from tests.readers import LogitsReader

pytestmark = pytest.mark.usefixtures("world")
VOCABULARY, KEPT, LENGTHS, TOKENS = 64, 12, (9, 5, 14), 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def texts():
    torch.manual_seed(1)
    return torch.randint(VOCABULARY, (len(LENGTHS), KEPT)), [
        [torch.randint(VOCABULARY, (n,)) for n in LENGTHS] for _ in range(2)
    ]


def readers(model, batch_tokens, multiple):
    @torch.no_grad()
    def logits(tokens, last):
        return model(tokens).logits[:, -last:]

    made_up = LogitsReader(logits, VOCABULARY, batch_tokens)
    made_up.multiple = multiple
    yield made_up
    if multiple == 1:
        yield TransformersReader(model, batch_tokens)


@pytest.mark.parametrize("batch_tokens, multiple", [(4096, 1), (9, 1), (4096, 2), (20, 3)])
def test_it_is_transformers_greedy_decoding(model, texts, batch_tokens, multiple):
    """Rows of unlike lengths, side by side, in chunks; two questions of one text."""
    shared, questions = texts
    for reader in readers(model, batch_tokens, multiple):
        reader.begin(len(shared), KEPT + TOKENS - 1)
        reader.read(shared)
        for rows in (*questions, questions[0]):
            written = greedy(reader, rows, TOKENS)
            assert reader.kept == KEPT
            for common, row, own in zip(shared, rows, written, strict=True):
                prompt = torch.cat([common, row])[None]
                whole = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),  # 0 is a token as any other
                    max_new_tokens=TOKENS - len(row),
                    do_sample=False,
                    pad_token_id=0,
                )
                assert torch.equal(own, whole[0, KEPT + len(row) :])
                assert len(set(own.tolist())) > 3  # it says something


def test_each_token_goes_through_once(model, texts):
    """But for the last and for what does not fill the context ranks."""
    for multiple, spare in ((1, 0), (2, TOKENS)):
        reader = next(readers(model, 4096, multiple))
        reader.begin(len(LENGTHS), KEPT + TOKENS)
        reader.read(texts[0])
        reader.seen.clear()
        greedy(reader, texts[1][0], TOKENS)
        read = sum(tokens.size(1) for tokens in reader.seen)
        assert TOKENS - 1 <= read <= TOKENS - 1 + spare
