"""summary.py: checkpoints that transformers, megatron-core and this file wrote, and their
differences."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pose_megatron.checkpoints.huggingface import config_json
from pose_megatron.checkpoints.sidecars import find_sidecars
from pose_megatron.checkpoints.summary import compare, summarise
from pose_megatron.config.arguments import parse
from pose_megatron.config.layout import lay_out
from pose_megatron.config.sampler import build_sampler
from pose_megatron.rope.scaling import RopeScaling, inverse_frequencies
from pose_megatron.training.run import Run
from pose_megatron.training.trainer import save, setup
from tests.whole_models import TOKENIZER, hf_to_megatron, write_weights

pytestmark = pytest.mark.usefixtures("world")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 301,
}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=301,
            max_position_embeddings=512,
            rope_parameters=LLAMA3,
        )
    )


@pytest.fixture(scope="module")
def hf(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    llama.to(torch.bfloat16).save_pretrained(folder, max_shard_size="50KB")
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def megatron(hf, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    model = config_json.read_config(hf)
    tensors = {k: t for file in hf.glob("*.safetensors") for k, t in load_file(file).items()}
    write_weights(folder, hf_to_megatron(tensors, **config_json.sizes(model)), model)
    return folder


def copy_of(hf, folder, spoil):
    """A copy in one file, its tensors passed through `spoil`."""
    folder.mkdir()
    tensors = {k: t for file in hf.glob("*.safetensors") for k, t in load_file(file).items()}
    save_file(spoil(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((hf / "config.json").read_text())
    return folder


def test_a_hugging_face_folder(hf, llama):
    found = summarise(hf)
    assert len(list(hf.glob("*.safetensors"))) > 1
    assert found.parameters == sum(p.numel() for p in llama.parameters())
    assert found.dtypes == {"bfloat16": 21} and found.tokenizer == ["tokenizer.json"]
    assert {name: found.config[name] for name in SHAPE} == SHAPE and found.progress == {}
    assert {n: t.shape for n, t in found.tensors.items()} == {
        n: p.shape for n, p in llama.named_parameters()
    }
    text = str(found)
    assert "rope        theta 500000, llama3 x8 from 64, window 512" in text
    assert "progress    weights only" in text
    assert "2 layers, hidden 64, ffn 96, 4 heads of 16, 2 groups, vocabulary 301" in text
    assert json.loads(json.dumps(found.to_dict()))["parameters"] == found.parameters


def test_a_hugging_face_folder_of_bin_files(hf, llama, tmp_path):
    (tmp_path / "config.json").write_text((hf / "config.json").read_text())
    with pytest.raises(ValueError, match="no weights are here: neither model.safetensors"):
        summarise(tmp_path)
    torch.save(llama.state_dict(), tmp_path / "pytorch_model.bin")
    assert summarise(tmp_path).parameters == summarise(hf).parameters
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4cut")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged"):
        summarise(tmp_path)


def test_converted_weights(megatron, hf):
    found = summarise(megatron)
    padding = (384 - 301) * 64 * 2
    assert found.parameters == summarise(hf).parameters + padding
    assert found.format == "megatron" and found.path.name == "release"
    assert found.model == config_json.read_config(hf) and found.rope == summarise(hf).rope
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert found.tensors[name].shape == (64 + 2 * 32, 64)


def test_training_progress(tmp_path, hf):
    model = dataclasses.replace(
        config_json.read_config(hf), rope_scaling=RopeScaling("yarn", 4.0, 128)
    )
    args = parse(
        [
            "--train-iters",
            "4",
            "--seq-length",
            "32",
            "--global-batch-size",
            "2",
            "--save",
            str(tmp_path),
        ]
    )
    run = Run(args, model, build_sampler(args, model.max_position_embeddings))
    trainer = setup(run, lay_out(args, model, 1))
    trainer.models[0].zero_grad_buffer()
    trainer.optimizer.step()
    trainer.continue_from(3, 6)
    save(trainer)
    found = summarise(tmp_path)
    assert found.progress == {
        "iteration": 3,
        "samples": 6,
        "optimizer state": "yes",
        "tensor ranks": 1,
        "pipeline ranks": 1,
        "ranks": 1,
    }
    assert found.dtypes == {"float32": 15}  # without the optimizer's
    assert "yarn x4 from 128, attention factor 1.1386, window 512" in found.rope
    assert summarise(tmp_path / "iter_0000003").to_dict() == found.to_dict()


@pytest.mark.parametrize("tables_by_rows", [False, True])  # LLaMA 1 and 2; 3
def test_metas_format(tmp_path, tables_by_rows):
    """LLaMA-2-7B's and Llama-3-8B's own constants, on a small width, in two files."""
    params = {
        "dim": 96,
        "n_layers": 1,
        "n_heads": 8,
        "multiple_of": 32,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    if tables_by_rows:
        params |= {
            "n_kv_heads": 2,
            "rope_theta": 500000.0,
            "ffn_dim_multiplier": 1.3,
            "use_scaled_rope": True,
        }
    kv, ffn = (24, 352) if tables_by_rows else (96, 256)  # 1.3 x 256 = 332, and 256, by 32
    whole = {
        "tok_embeddings.weight": (320, 96),
        "output.weight": (320, 96),
        "norm.weight": (96,),
        "layers.0.attention.wq.weight": (96, 96),
        "layers.0.attention.wk.weight": (kv, 96),
        "layers.0.attention.wv.weight": (kv, 96),
        "layers.0.attention.wo.weight": (96, 96),
        "layers.0.feed_forward.w1.weight": (ffn, 96),
        "layers.0.feed_forward.w2.weight": (96, ffn),
        "layers.0.feed_forward.w3.weight": (ffn, 96),
        "layers.0.attention_norm.weight": (96,),
        "layers.0.ffn_norm.weight": (96,),
    }
    for rank in range(2):
        shard = {"rope.freqs": torch.zeros(6)}
        for name, shape in whole.items():
            by_columns = name.endswith(("wo.weight", "w2.weight")) or (
                name.startswith("tok") and not tables_by_rows
            )
            tensor = torch.zeros(shape, dtype=torch.bfloat16)
            shard[name] = (
                tensor if len(shape) == 1 else tensor.chunk(2, dim=int(by_columns))[rank].clone()
            )
        torch.save(shard, tmp_path / f"consolidated.{rank:02d}.pth")
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        summarise(tmp_path)
    (tmp_path / "params.json").write_text('{"dim": 96}')
    with pytest.raises(ValueError, match="params.json"):
        summarise(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps(params))
    found = summarise(tmp_path)
    assert found.parameters == sum(math.prod(shape) for shape in whole.values())
    assert tuple(found.tensors["model.layers.0.mlp.down_proj.weight"].shape) == (96, ffn)
    assert (found.config["vocab_size"], found.config["ffn_hidden_size"]) == (320, ffn)
    assert found.config["num_query_groups"] == (2 if tables_by_rows else 8)
    assert found.rope == (
        "theta 500000, llama3 x8 from 8192, window 131,072"
        if tables_by_rows
        else "theta 10000, none x1, window 4,096"
    )
    assert "dtype       bfloat16 x12" in str(found)


# Differences.


def test_a_checkpoint_is_its_own_conversion(hf, megatron):
    for one, other in ((hf, megatron), (megatron, hf), (hf, hf), (megatron, megatron)):
        assert compare(summarise(one), summarise(other), values=True) == {}


def test_differences_are_named(hf, megatron, tmp_path):
    def spoil(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 64, dtype=torch.bfloat16)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
        tensors["model.layers.0.extra"] = tensors.pop("model.layers.1.mlp.gate_proj.weight")
        return tensors

    other = summarise(copy_of(hf, tmp_path / "copy", spoil))
    expected = {
        "only in one": {"model.layers.1.mlp.gate_proj.weight": "bfloat16"},
        "only in other": {"model.layers.0.extra": "bfloat16"},
        "shape": {"model.layers.0.mlp.up_proj.weight": [[96, 64], [8, 64]]},
        "dtype": {"lm_head.weight": ["bfloat16", "float32"]},
    }
    assert compare(summarise(hf), other) == expected
    assert compare(summarise(hf), other, values=True) == {
        **expected,
        "values": {"model.norm.weight": 0.5},
    }
    assert compare(summarise(megatron), other) == expected  # under Hugging Face's names


def test_a_difference_that_is_no_number_is_one(hf, tmp_path):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = float("nan")
        return tensors

    other = summarise(copy_of(hf, tmp_path / "copy", spoil))
    found = compare(summarise(hf), other, values=True)["values"]
    assert found == {"model.norm.weight": float("inf")}


def test_ropes_are_compared_by_what_they_do(hf, tmp_path):
    original = json.loads((hf / "config.json").read_text())

    def differences(**keys):
        folder = tmp_path / "other"
        if not folder.exists():
            copy_of(hf, folder, dict)
        (folder / "config.json").write_text(json.dumps({**original, **keys}))
        return compare(summarise(hf), summarise(folder))

    factors = (
        inverse_frequencies(16, 5e5, RopeScaling())
        / inverse_frequencies(16, 5e5, RopeScaling("llama3", 8.0, 64))
    ).tolist()
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 5e5,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    }
    assert differences(rope_parameters=longrope) == {}
    assert differences(rope_parameters={**longrope, "attention_factor": 1.1})["config"][
        "rope_scaling.method"
    ] == ["llama3", "longrope"]
    assert differences(rope_parameters={**LLAMA3, "factor": 4.0}) == {
        "config": {"rope_scaling.factor": [8.0, 4.0]}
    }
    assert differences(max_position_embeddings=1024) == {
        "config": {"max_position_embeddings": [512, 1024]}
    }


def test_a_link_out_of_a_tokenizers_folder_is_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "merges.txt").symlink_to(secret)
    with pytest.raises(ValueError, match=r"merges.txt is a link to .*secret"):
        find_sidecars(folder)
    cache = tmp_path / "models--a--b"  # as huggingface_hub lays it out
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "0a").write_text("a b")
    (cache / "snapshots" / "1b").mkdir(parents=True)
    (cache / "snapshots" / "1b" / "merges.txt").symlink_to("../../blobs/0a")
    assert find_sidecars(cache / "snapshots" / "1b")["merges.txt"].read_text() == "a b"
