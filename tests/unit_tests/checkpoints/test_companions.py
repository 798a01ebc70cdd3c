"""What lies beside the weights of a Hugging Face folder, and what its config.json calls itself."""

import json

import pytest

from pose_megatron.checkpoints.huggingface.companions import check_companions
from pose_megatron.checkpoints.huggingface.config_json import read_config
from pose_megatron.errors import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def folder(tmp_path, *files, index=None, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in files:
        (tmp_path / file).touch()
    if index:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": index}}))
    return tmp_path


def test_an_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="adapter .adapter_config.json.*merge_and_unload"):
        check_companions(folder(tmp_path, SINGLE, "adapter_config.json"), "llama")


def test_two_sets_of_safetensors_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="two sets of weights"):
        check_companions(
            folder(tmp_path, SINGLE, index="model-00001-of-00002.safetensors"), "llama"
        )
    assert not check_companions(folder(tmp_path, SINGLE, index=SINGLE), "llama")


def test_old_files_beside_safetensors_are_a_warning(tmp_path):
    (said,) = check_companions(folder(tmp_path, SINGLE, "pytorch_model.bin"), "llama")
    assert "pytorch_model.bin: the safetensors are read" in said


def test_code_of_the_folder_is_named(tmp_path):
    code = {"AutoModelForCausalLM": "modeling_mine.Model"}
    (said,) = check_companions(folder(tmp_path, SINGLE, auto_map=code), "llama")
    assert "modeling_mine.Model" in said
    assert not check_companions(folder(tmp_path, SINGLE, auto_map=code), "baichuan")
    with pytest.raises(ConfigError, match="auto_map 'Mine'"):
        check_companions(folder(tmp_path, SINGLE, auto_map={"Mine": "mine.Model"}), "llama")


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "my_llama"])
def test_another_model_type_is_refused(tmp_path, kind):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": kind}
    with pytest.raises(ConfigError, match=f"model_type '{kind}'"):
        read_config(folder(tmp_path, **config))
