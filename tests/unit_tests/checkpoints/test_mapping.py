"""mapping.py against transformers, by a forward pass that reads the Megatron layout by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pose_megatron.checkpoints.mapping import param_mappings
from tests.whole_models import hf_to_megatron, megatron_to_hf


def sizes_of(heads=4, groups=2, tied=False, **more):
    return {
        "num_layers": 3,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": 16,
        "vocab_size": 301,
        "padded_vocab_size": 384,
        "tied": tied,
        **more,
    }


def llama(sizes, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=sizes["num_layers"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"],
        head_dim=sizes["kv_channels"],
        vocab_size=sizes["vocab_size"],
        tie_word_embeddings=sizes["tied"],
        initializer_range=0.2,  # large enough for attention to matter
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def weights(model):
    """What save_pretrained would write: a tied head is left out."""
    tied = model.config.tie_word_embeddings
    return {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def megatron_logits(tensors, sizes, tokens, rotary):
    """LLaMA's forward pass [b, s] -> [b, s, vocab], as Megatron lays the tensors out."""
    groups, d = sizes["num_query_groups"], sizes["kv_channels"]
    per_group = sizes["num_attention_heads"] // groups

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def rotate(x, cos, sin):  # [b, s, n, d]
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return x * cos[:, :, None] + torch.cat((-b, a), -1) * sin[:, :, None]

    x = F.embedding(tokens, tensors["embedding.word_embeddings.weight"])
    cos, sin = rotary(x, torch.arange(tokens.shape[1])[None])
    for i in range(sizes["num_layers"]):
        layer = {k.split(f"layers.{i}.")[1]: v for k, v in tensors.items() if f"layers.{i}." in k}
        qkv = norm(x, layer["self_attention.linear_qkv.layer_norm_weight"])
        qkv = qkv @ layer["self_attention.linear_qkv.weight"].T
        qkv = qkv.view(*tokens.shape, groups, per_group + 2, d)  # each group: its queries, k, v
        heads = []
        for g in range(groups):
            q, k, v = qkv[:, :, g, :-2], qkv[:, :, g, -2:-1], qkv[:, :, g, -1:]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            k, v = (t.expand_as(q).transpose(1, 2) for t in (k, v))
            heads.append(F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True))
        attended = torch.cat(heads, 1).transpose(1, 2).flatten(2)
        x = x + attended @ layer["self_attention.linear_proj.weight"].T
        y = norm(x, layer["mlp.linear_fc1.layer_norm_weight"])
        gate, up = (y @ layer["mlp.linear_fc1.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ layer["mlp.linear_fc2.weight"].T
    head = "embedding.word_embeddings.weight" if sizes["tied"] else "output_layer.weight"
    return norm(x, tensors["decoder.final_layernorm.weight"]) @ tensors[head].T


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_logits_in_megatron_layout_are_those_of_transformers(heads, groups, tied):
    sizes = sizes_of(heads, groups, tied)
    model = llama(sizes)
    tokens = torch.randint(0, 301, (2, 24))
    expected = model(tokens).logits
    rotary = model.model.rotary_emb
    tensors = hf_to_megatron(weights(model), **sizes)
    logits = megatron_logits(tensors, sizes, tokens, rotary)
    assert logits.shape == (2, 24, 384)
    assert (logits[..., :301] - expected).abs().max() < 1e-4
    assert torch.all(logits[..., 301:] == 0)  # rows of padding

    for i in range(3):  # [all q | all k | all v] is the order that is easily taken for it
        attention = model.model.layers[i].self_attn
        parts = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
        tensors[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] = torch.cat(parts)
    wrong = megatron_logits(tensors, sizes, tokens, rotary)[..., :301]
    if groups == 1:
        assert torch.equal(wrong, logits[..., :301])  # one group: both orders are one
    else:
        assert (wrong - expected).abs().max() > 1


@given(
    layers=st.integers(1, 3),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    channels=st.integers(1, 5),
    hidden=st.integers(1, 7),
    ffn=st.integers(1, 6),
    vocab=st.integers(1, 20),
    padding=st.integers(0, 9),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=60, deadline=None)
def test_there_and_back_is_bit_identical(
    layers, groups, per_group, channels, hidden, ffn, vocab, padding, tied, dtype
):
    sizes = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": groups * per_group,
        "num_query_groups": groups,
        "kv_channels": channels,
        "vocab_size": vocab,
        "padded_vocab_size": vocab + padding,
        "tied": tied,
    }
    shapes = {
        name: shape for mapping in param_mappings(**sizes) for name, shape in mapping.parts.items()
    }
    there = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    megatron = hf_to_megatron(there, **sizes)
    assert {name: t.shape for name, t in megatron.items()} == {
        mapping.name: mapping.shape for mapping in param_mappings(**sizes)
    }
    elements = sum(t.numel() for t in there.values())
    assert sum(t.numel() for t in megatron.values()) == elements + padding * hidden * (2 - tied)
    back = megatron_to_hf(megatron, **sizes)
    assert back.keys() == there.keys()
    for name, tensor in there.items():
        assert back[name].dtype == dtype and back[name].is_contiguous()
        assert torch.equal(back[name], tensor)


def test_names_are_those_of_transformers():
    for tied in (False, True):
        sizes = sizes_of(tied=tied)
        expected = {name: tensor.shape for name, tensor in weights(llama(sizes)).items()}
        assert {
            n: s for mapping in param_mappings(**sizes) for n, s in mapping.parts.items()
        } == expected


def test_extra_tensors_that_are_fine():
    sizes = sizes_of(tied=True)
    tensors = weights(llama(sizes))
    expected = hf_to_megatron(tensors, **sizes)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert hf_to_megatron(tensors, **sizes).keys() == expected.keys()
    tensors["lm_head.weight"][300, 63] += 1
    with pytest.raises(ValueError, match="weight differs from"):
        hf_to_megatron(tensors, **sizes)


K = "model.layers.1.self_attn.k_proj.weight"
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


def test_wrong_tensors_are_named():
    sizes = sizes_of()
    hf = weights(llama(sizes))
    megatron = hf_to_megatron(hf, **sizes)
    without = {k: v for k, v in hf.items() if k != K}
    for convert, tensors, words in [
        (hf_to_megatron, without, f"missing tensor {K}"),
        (hf_to_megatron, {**hf, "model.layers.3.x": hf[K]}, "unknown tensor model.layers.3.x"),
        (hf_to_megatron, {**hf, K: hf[K][1:]}, rf"{K} has shape \(31, 64\), expected \(32, 64\)"),
        (
            hf_to_megatron,
            {**hf, K: hf[K].half()},
            f"{K}, .* stored as float16 and float32; say with --dtype",
        ),
        (megatron_to_hf, {}, "missing tensor .* and 18 more"),
        (megatron_to_hf, {**megatron, "x": hf[K]}, "unknown tensor x"),
        (megatron_to_hf, {**megatron, QKV: hf[K]}, rf"{QKV} has shape .* expected \(128, 64\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            convert(tensors, **sizes)
