"""convert(): the library call, on a small LLaMA that transformers made."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import pose_megatron
from pose_megatron.checkpoints.formats import FORMATS, format_class, marks
from pose_megatron.checkpoints.huggingface.format import HuggingFace
from pose_megatron.checkpoints.megatron.directory import find
from pose_megatron.checkpoints.megatron.format import Megatron
from pose_megatron.checkpoints.meta.format import Meta
from pose_megatron.errors import ConfigError, DamagedCheckpoint
from pose_megatron.runtime.json_files import naming, read_json


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=301,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_there_and_back_with_the_formats_own_parameters(llama, tmp_path, capsys):
    there = pose_megatron.convert(
        llama,
        tmp_path / "megatron",
        loader=HuggingFace(make_vocab_size_divisible_by=64),
        saver="megatron",
    )
    assert find(tmp_path / "megatron").model.padded_vocab_size == 320
    assert there.tensors == 1 + 2 * 6 + 2 and there.processes == 1 and there.nonfinite == 0
    layer = 64 * (2 * 64 + 2 * 32 + 3 * 96) + 2 * 64
    assert there.bytes == 4 * (2 * 320 * 64 + 64 + 2 * layer)
    assert max(there.rope_errors.values()) <= 1e-6
    assert there.seconds >= sum(there.phases.values()) > 0
    assert there.phases.keys() == {"convert", "verify"}
    assert "rope as transformers reads it" in capsys.readouterr().out

    back = pose_megatron.convert(
        str(tmp_path / "megatron"),
        str(tmp_path / "hf"),
        loader="megatron",
        saver=HuggingFace(max_shard_size="100KB"),
        quiet=True,
    )
    assert capsys.readouterr().out == ""
    assert back.tensors == there.tensors and back.bytes == there.bytes
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    found = {name: t for file in files for name, t in load_file(file).items()}
    expected = load_file(llama / "model.safetensors")
    assert len(files) > 1 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_precision_without_a_second_reading(llama, tmp_path):
    result = pose_megatron.convert(
        llama, tmp_path / "out", loader="hf", saver="hf", dtype=torch.bfloat16, verify=False
    )
    assert result.phases.keys() == {"convert"}
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(llama / "model.safetensors").items():
        assert torch.equal(found[name], tensor.bfloat16()), name


def test_what_a_check_refuses_is_not_kept(llama, tmp_path):
    seen = []

    def refuse(folder, model):
        seen.append((folder, model))
        assert (folder / "release" / "metadata.json").is_file()  # whole, under another name
        raise ConfigError("not this one")

    with pytest.raises(ConfigError, match="not this one"):
        pose_megatron.convert(
            llama, tmp_path / "out", loader="hf", saver="megatron", check=refuse, quiet=True
        )
    ((folder, model),) = seen
    assert folder != tmp_path / "out" and model.num_layers == 2
    assert not list(tmp_path.iterdir())


def test_damage_and_mistakes_have_errors_of_their_own(llama, tmp_path):
    def fails(error, match, load=llama, **how):
        with pytest.raises(error, match=match):
            pose_megatron.convert(
                load, tmp_path / "out", **{"loader": "hf", "saver": "megatron"} | how
            )
        assert not (tmp_path / "out").exists()

    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    (spoiled / "config.json").write_bytes((llama / "config.json").read_bytes())
    fails(DamagedCheckpoint, "no weights are here", spoiled)
    (spoiled / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-9])
    fails(DamagedCheckpoint, "damaged or cut off", spoiled)
    tensors = load_file(llama / "model.safetensors")
    save_file(tensors | {"extra": torch.ones(1)}, spoiled / "model.safetensors")
    fails(ConfigError, "unknown tensor extra", spoiled)
    fails(ConfigError, "is not a checkpoint folder", loader="megatron")
    fails(DamagedCheckpoint, "params.json is missing", loader="meta")
    fails(ConfigError, "--tokenizer-model .*none does not exist", tokenizer=tmp_path / "none")
    fails(ConfigError, "unknown checkpoint format 'gguf'; known are hf", saver="gguf")
    fails(ConfigError, "--as-llama is for Baichuan2, not llama", as_llama=True)
    fails(ConfigError, "4 does not divide num_query_groups 2", saver=Meta(None, 128, 4))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: HuggingFace(max_shard_size="5"), "--max-shard-size 5 is not a size"),
        (lambda: HuggingFace(0), "--make-vocab-size-divisible-by must be at least 1, not 0"),
        (lambda: Meta(0), "--max-position-embeddings must be at least 1, not 0"),
        (lambda: Meta(None, 128, -1), "--target-tensor-parallel-size must be at least 1, not -1"),
    ],
)
def test_parameters_of_a_format_are_checked_when_it_is_made(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_unsupported_backend_is_no_damage(llama, tmp_path):
    pose_megatron.convert(llama, tmp_path / "out", loader="hf", saver="megatron", quiet=True)
    file = tmp_path / "out" / "release" / "metadata.json"
    file.write_text(file.read_text().replace('"torch_dist"', '"zarr"'))
    with pytest.raises(ConfigError, match="sharded_backend 'zarr' is not supported"):
        Megatron().open(tmp_path / "out")


def test_the_table_of_formats():
    assert marks() == {
        "config.json": "hf",
        "latest_checkpointed_iteration.txt": "megatron",
        "params.json": "meta",
    }
    for name in FORMATS:
        assert dataclasses.is_dataclass(format_class(name))


def test_a_message_about_a_file_keeps_its_kind(tmp_path):
    for kind, expected in [
        (DamagedCheckpoint, DamagedCheckpoint),
        (ConfigError, ConfigError),
        (ValueError, ConfigError),
    ]:
        with pytest.raises(expected, match="^here: wrong$"), naming("here"):
            raise kind("wrong")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="list.json is not a JSON object"):
        read_json(tmp_path / "list.json")
    with pytest.raises(DamagedCheckpoint, match="none.json is missing"):
        read_json(tmp_path / "none.json", DamagedCheckpoint)
