"""Meta's format: params.json of the published models, and folders that are wrong."""

import dataclasses
import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pose_megatron.checkpoints.meta import params as meta_params
from pose_megatron.checkpoints.meta.consolidated import MetaWeights
from pose_megatron.checkpoints.meta.params import read_config, write_params
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import RopeScaling

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=20,
    max_position_embeddings=4096,
    untie_embeddings_and_output_weights=True,
)


@pytest.mark.parametrize(
    "words, ffn",
    [  # of Meta's params.json, and of Hugging Face's config.json
        ((4096, 256, None), 11008),  # LLaMA 7B
        ((5120, 256, None), 13824),  # LLaMA 2 13B
        ((8192, 4096, 1.3), 28672),  # LLaMA 2 70B
        ((4096, 1024, 1.3), 14336),  # LLaMA 3 8B
        ((2048, 256, 1.5), 8192),  # Llama 3.2 1B
    ],
)
def test_the_width_of_the_mlp_is_that_of_the_published_models(words, ffn):
    assert meta_params.ffn_hidden_size(*words) == ffn


@given(width=st.integers(2, 2000).map(lambda n: 4 * n), ffn=st.integers(1, 40000))
def test_every_width_of_the_mlp_can_be_said(width, ffn):
    assert meta_params.ffn_hidden_size(width, *meta_params.ffn_parameters(width, ffn)) == ffn


def folder(tmp_path, ranks=2, **params):
    """A LLaMA as Meta's code saves it."""
    h, ffn, words = 16, 32, 20
    shapes = {
        "tok_embeddings.weight": (words, h // ranks),
        "norm.weight": (h,),
        "output.weight": (words // ranks, h),
        "rope.freqs": (4,),
    }
    shapes |= {
        f"layers.0.{name}.weight": shape
        for name, shape in {
            "attention.wq": (h // ranks, h),
            "attention.wk": (h // ranks, h),
            "attention.wv": (h // ranks, h),
            "attention.wo": (h, h // ranks),
            "feed_forward.w1": (ffn // ranks, h),
            "feed_forward.w3": (ffn // ranks, h),
            "feed_forward.w2": (h, ffn // ranks),
            "attention_norm": (h,),
            "ffn_norm": (h,),
        }.items()
    }
    params = {"dim": h, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "vocab_size": -1} | params
    (tmp_path / "params.json").write_text(json.dumps(params))
    for rank in range(ranks):
        torch.save(
            {n: torch.randn(s) for n, s in shapes.items()},
            tmp_path / f"consolidated.{rank:02d}.pth",
        )
    return tmp_path


def config_of(path, window=None):
    return read_config(path, MetaWeights(path), window)


def edit(path, **tensors):
    content = torch.load(path, weights_only=True) | tensors
    torch.save({n: t for n, t in content.items() if t is not None}, path)


NORM = "layers.0.ffn_norm.weight"
BAD = {
    "no params": (lambda f: (f / "params.json").unlink(), "params.json is missing"),
    "params": (lambda f: (f / "params.json").write_text('{"dim": 16}'), "is not the params.json"),
    "first file": (lambda f: (f / "consolidated.00.pth").unlink(), "consolidated.00.pth is miss"),
    "no files": (lambda f: [p.unlink() for p in f.glob("*.pth")], "consolidated.00.pth is missing"),
    "cut off": (
        lambda f: (f / "consolidated.01.pth").write_bytes(
            (f / "consolidated.01.pth").read_bytes()[:-900]
        ),
        "consolidated.01.pth is damaged",
    ),
    "too few": (lambda f: edit(f / "consolidated.01.pth", **{NORM: None}), f"missing .*{NORM}"),
    "too many": (lambda f: edit(f / "consolidated.01.pth", x=torch.ones(1)), "unknown tensor x"),
    "shape": (lambda f: edit(f / "consolidated.01.pth", **{NORM: torch.ones(3)}), "differ in shap"),
}


@pytest.mark.parametrize("case", BAD)
def test_folders_that_are_wrong(tmp_path, case):
    spoil, words = BAD[case]
    spoil(folder(tmp_path))
    with pytest.raises(ValueError, match=words) as error:
        MetaWeights(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_window_is_that_of_the_published_models(tmp_path):
    for params, window in [
        ({"norm_eps": 1e-6}, 2048),
        ({}, 4096),
        ({"rope_theta": 1e6}, 16384),
        ({"rope_theta": 5e5}, 8192),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, 131072),
    ]:
        config = config_of(folder(tmp_path, **params))
        assert config.max_position_embeddings == window
        assert config.rope_scaling.method == ("llama3" if "use_scaled_rope" in params else "none")
        write_params(tmp_path, config, 2)  # and the other way
        assert config_of(tmp_path) == config
    with pytest.raises(ValueError, match="give --max-position-embeddings"):
        config_of(folder(tmp_path, rope_theta=7e5))
    assert config_of(tmp_path, 77).max_position_embeddings == 77


def test_equal_tables_are_tied(tmp_path):
    path = folder(tmp_path, ranks=1) / "consolidated.00.pth"
    assert config_of(tmp_path).untie_embeddings_and_output_weights
    edit(path, **{"output.weight": torch.load(path)["tok_embeddings.weight"]})
    assert not config_of(tmp_path).untie_embeddings_and_output_weights


def test_what_the_format_cannot_say(tmp_path):
    for change, ranks, words in [
        ({"family": "qwen2", "add_qkv_bias": True}, 1, "LLaMA only, not qwen2"),
        ({"kv_channels": 16}, 1, "heads of 16 of 16 channels"),
        ({}, 4, "--target-tensor-parallel-size 4 does not divide num_attention_heads 2"),
        ({"rope_scaling": RopeScaling("yarn", 8.0, 4096)}, 1, "--rope-scaling yarn cannot be said"),
    ]:
        with pytest.raises(ValueError, match=words):
            write_params(tmp_path, dataclasses.replace(MODEL, **change), ranks)


def test_the_checklist_is_read(tmp_path):
    path = folder(tmp_path) / "consolidated.00.pth"
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    (tmp_path / "checklist.chk").write_text(f"{digest}  {path.name}\n{digest}  absent.pth\n")
    assert MetaWeights(tmp_path).hashes == {path: ("md5", digest)}


@pytest.mark.parametrize(
    "params, said",
    [
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ({"moe": {"num_experts": 8}}, "moe .* is not supported"),
        ({"quantization_args": {"group_size": 32}}, "quantization_args .* is not supported"),
        ({"rope_scaling_factor": 32}, "rope_scaling_factor 32 has no meaning without"),
        ({"head_dim": 16}, "head_dim 16 with n_heads 2 does not give dim 16"),
        ({"hidden_dim": 48}, "hidden_dim 48 is 32 in the weights"),
        ({"vocab_size": 10**15}, "vocab_size 10{15} is 20 in the weights"),
        ({"n_heads": 10**9}, "n_heads 10{9} does not divide dim 16"),
        ({"n_heads": 3}, "n_heads 3 does not divide dim 16"),
        ({"n_kv_heads": "two"}, "n_kv_heads must be a whole number, not 'two'"),
        ({"norm_eps": True}, "norm_eps must be a positive number, not True"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive number, not nan"),
        ({"rope_theta": "1e6"}, "rope_theta must be a positive number, not '1e6'"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ({"use_scaled_rope": "no"}, "use_scaled_rope 'no' is not true or false"),
    ],
)
def test_params_that_change_the_function_are_refused(tmp_path, params, said):
    path = folder(tmp_path, **params)
    with pytest.raises(ValueError, match=said):
        read_config(path, MetaWeights(path))


def test_a_guessed_window_is_said(tmp_path):
    path = folder(tmp_path)
    weights = MetaWeights(path)
    read_config(path, weights)
    assert "--max-position-embeddings" in weights.warnings[-1]
    told = MetaWeights(path)
    assert read_config(path, told, 2048).max_position_embeddings == 2048 and not told.warnings
    # The released params.json of LLaMA 65B and of Llama 2 70B.
    llama = {"dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5}
    assert meta_params.guessed_window(llama) == 2048
    assert meta_params.guessed_window(llama | {"n_kv_heads": 8}) == 4096
