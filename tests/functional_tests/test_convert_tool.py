"""tools/checkpoint/convert.py on small random models that transformers itself made and saved."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pose_megatron.commands import convert
from tests.whole_models import TOKENIZER

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "checkpoint" / "convert.py"


@pytest.fixture(scope="module")
def run():
    """Runs the tool in this process on a command line."""
    return lambda *argv: convert.run(convert.parser().parse_args([str(a) for a in argv]))


def save_llama(folder, dtype=torch.float32, shard="5GB", **more):
    torch.manual_seed(0)
    shape = {"num_key_value_heads": 2, "head_dim": 16, "eos_token_id": [2, 7], **more}
    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        vocab_size=301,
        max_position_embeddings=128,
        initializer_range=0.2,
        **shape,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    (folder / "tokenizer.json").write_text(TOKENIZER)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    save_llama(folder)
    return folder


@pytest.fixture
def hf(llama, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(llama, tmp_path / "hf")


def stored(folder):
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def to_megatron(load, save):
    return "--loader", "hf", "--saver", "megatron", "--load-dir", load, "--save-dir", save


def to_hf(load, save):
    return "--loader", "megatron", "--saver", "hf", "--load-dir", load, "--save-dir", save


@pytest.mark.parametrize(
    "dtype, shape",
    [
        (torch.bfloat16, {"shard": "100KB"}),
        (torch.float32, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        (torch.float16, {"head_dim": 8, "num_key_value_heads": 1}),
    ],
)
@torch.no_grad()
def test_there_and_back_is_bit_identical(run, tmp_path, dtype, shape):
    save_llama(tmp_path / "hf", dtype, **shape)
    run(*to_megatron(tmp_path / "hf", tmp_path / "meg"))
    run(*to_hf(tmp_path / "meg", tmp_path / "back"), "--max-shard-size", "150KB")
    there, back = stored(tmp_path / "hf"), stored(tmp_path / "back")
    assert back.keys() == there.keys()
    for name, tensor in there.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor), name
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()

    first = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert again.dtype == dtype
    tokens = torch.randint(0, 301, (2, 40))
    assert torch.equal(again(tokens).logits, first(tokens).logits)
    assert again.config.eos_token_id == [2, 7] and again.config.bos_token_id == 1
    assert again.generation_config.eos_token_id == [2, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "meg"]  # nothing else left


@torch.no_grad()
def test_megatron_side_holds_what_transformers_computes(run, tmp_path, hf):
    from tests.whole_models import read_weights

    run(*to_megatron(hf, tmp_path / "meg"), "--make-vocab-size-divisible-by", 64)
    assert (tmp_path / "meg" / "latest_checkpointed_iteration.txt").read_text() == "release"
    tensors, shape = read_weights(tmp_path / "meg")
    assert (shape.vocab_size, shape.padded_vocab_size, shape.num_query_groups) == (301, 320, 2)
    assert shape.untie_embeddings_and_output_weights and shape.norm_epsilon == 1e-6
    embedding = tensors["embedding.word_embeddings.weight"]
    assert embedding.shape == (320, 64) and torch.all(embedding[301:] == 0)

    model = LlamaForCausalLM.from_pretrained(hf)
    x = torch.randn(5, 64)
    for i, layer in enumerate(model.model.layers):
        qkv = x @ tensors[f"decoder.layers.{i}.self_attention.linear_qkv.weight"].T
        qkv = qkv.view(5, 2, 4, 16)  # two groups of two queries, a key and a value
        attention, mlp = layer.self_attn, layer.mlp
        for ours, theirs in [
            (qkv[:, :, :2], attention.q_proj),
            (qkv[:, :, 2], attention.k_proj),
            (qkv[:, :, 3], attention.v_proj),
        ]:
            assert torch.allclose(ours.flatten(1), theirs(x), atol=1e-4)
        gate, up = (x @ tensors[f"decoder.layers.{i}.mlp.linear_fc1.weight"].T).chunk(2, -1)
        assert torch.allclose(gate, mlp.gate_proj(x), atol=1e-4)
        assert torch.allclose(up, mlp.up_proj(x), atol=1e-4)


@pytest.fixture(scope="module")
def megatron(run, llama):
    run(*to_megatron(llama, llama.parent / "meg"))
    return llama.parent / "meg"


def extended(megatron, folder, method):
    """The checkpoint as training to 8 times the window would save it."""
    from pose_megatron.checkpoints.megatron.directory import find
    from pose_megatron.rope.scaling import RopeScaling
    from tests.whole_models import read_weights, write_weights

    tensors, model = read_weights(megatron)
    model = dataclasses.replace(
        model, max_position_embeddings=1024, rope_scaling=RopeScaling(method, 8.0, 128)
    )
    write_weights(folder, tensors, model, find(megatron).tokenizer_files)
    return model


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "yarn_revised"])
def test_extended_model_is_exported_with_its_rope(run, megatron, tmp_path, method):
    from pose_megatron.rope.scaling import attention_factor, inverse_frequencies

    model = extended(megatron, tmp_path / "meg", method)
    run(*to_hf(tmp_path / "meg", tmp_path / "hf"), "--dtype", "bfloat16", "--no-verify")
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    rotary = LlamaRotaryEmbedding(config)
    ours = inverse_frequencies(16, 10000.0, model.rope_scaling)
    assert torch.allclose(rotary.inv_freq.double(), ours, rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(attention_factor(model.rope_scaling))
    assert config.max_position_embeddings == 1024
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 1024
    assert LlamaForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16

    run(*to_megatron(tmp_path / "hf", tmp_path / "again"))  # and our own export is read again
    from pose_megatron.checkpoints.megatron.directory import find

    back = find(tmp_path / "again").model
    frequencies = inverse_frequencies(16, back.rotary_base, back.rope_scaling)
    assert torch.allclose(frequencies, ours, rtol=1e-12, atol=0)


def test_export_with_another_rope_is_not_kept(run, megatron, tmp_path, monkeypatch):
    from pose_megatron.checkpoints.huggingface import config_json

    extended(megatron, tmp_path / "meg", "yarn")
    forgetful = config_json.to_hf

    def without_scaling(*args, **kwargs):
        keys = forgetful(*args, **kwargs)
        return keys | {"rope_scaling": None, "rope_parameters": None}

    monkeypatch.setattr(config_json, "to_hf", without_scaling)
    with pytest.raises(ValueError, match="transformers reads another rope"):
        run(*to_hf(tmp_path / "meg", tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["meg"]


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_tokenizer_reaches_transformers(run, megatron, tmp_path, prefix):
    import sentencepiece

    text = "def double(x):\n    return 2 * x  # twice\n"
    (tmp_path / "text").write_text(text * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "code"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    words = "--tokenizer-model", tmp_path / "code.model"
    run(*to_hf(megatron, tmp_path / "hf"), *words)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "code.model"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.model_max_length == 128
    # transformers never adds the prefix to a text that starts with a space
    for line in [text, "日本\t\n", "x  y"] + ([] if prefix else ["  two spaces"]):
        assert theirs(line).input_ids == ours.encode(line)
        assert theirs.decode(theirs(line).input_ids) == line
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.bos_token_id, config.eos_token_id) == (ours.bos_id(), ours.eos_id())

    run(*to_megatron(tmp_path / "hf", tmp_path / "meg"))
    assert "tokenizer/tokenizer.model" in files(tmp_path / "meg")


def edit(hf, **keys):
    config = json.loads((hf / "config.json").read_text()) | keys
    (hf / "config.json").write_text(json.dumps(config))


def reshard(hf):
    shutil.rmtree(hf)
    save_llama(hf, shard="100KB")
    return sorted(hf.glob("model-*"))[1]


def cut(file):
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - 100)


def tensor(hf, name, value):
    tensors = stored(hf) | {name: value}
    kept = {k: t for k, t in tensors.items() if t is not None}
    save_file(kept, hf / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.2.mlp.up_proj.weight"
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}  # slides by default
BAD = {
    "unknown architecture": (lambda f: edit(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadMod"),
    "no architecture": (lambda f: edit(f, architectures=None), "architecture None"),
    "attention bias": (lambda f: edit(f, attention_bias=True), "attention_bias True"),
    "mlp bias": (lambda f: edit(f, mlp_bias=True), "mlp_bias True"),
    "activation": (lambda f: edit(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "quantized": (lambda f: edit(f, quantization_config={"bits": 4}), "quantization_config"),
    "sliding window": (lambda f: edit(f, **MISTRAL), "sliding_window"),
    "rope": (lambda f: edit(f, rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type"),
    "no sizes": (lambda f: edit(f, hidden_size=None), "hidden_size"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda f: (f / "config.json").write_text('{"a'), "config.json is not JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors.index.json"),
    "truncated": (lambda f: cut(f / "model.safetensors"), "model.safetensors is damaged or cut"),
    "missing shard": (lambda f: reshard(f).unlink(), "shard model-00002-of-.* is missing"),
    "truncated shard": (lambda f: cut(reshard(f)), "model-00002-of-.* is damaged or cut"),
    "tensor too many": (lambda f: tensor(f, "model.extra", torch.ones(1)), "unknown.*model.extra"),
    "tensor too few": (lambda f: tensor(f, UP, None), f"missing tensor {UP}"),
    "shape": (lambda f: tensor(f, UP, torch.ones(95, 64)), r"\(95, 64\), expected \(96, 64\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_hugging_face_folder(run, tmp_path, hf, case):
    spoil, words = BAD[case]
    spoil(hf)
    with pytest.raises(ValueError, match=words) as error:
        run(*to_megatron(hf, tmp_path / "meg"))
    assert str(hf) in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]  # nothing half-written


def test_where_it_may_write(run, megatron, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run(*to_hf(megatron, out))
    (out / "stale").touch()
    with pytest.raises(ValueError, match="not empty"):
        run(*to_hf(megatron, out))
    run(*to_hf(megatron, out), "--overwrite")
    assert not (out / "stale").exists() and (out / "model.safetensors").is_file()

    (out / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        run(*to_hf(megatron, out), "--overwrite")
    for save in (megatron, megatron.parent):
        with pytest.raises(ValueError, match="would replace"):
            run(*to_hf(megatron, save), "--overwrite")
    for words in (["--max-shard-size", "5"], ["--tokenizer-model", tmp_path / "none"]):
        with pytest.raises(ValueError, match=words[0]):
            run(*to_hf(megatron, tmp_path / "new"), *words)
    with pytest.raises(ValueError, match="iter_0000007"):
        run(*to_hf(megatron, tmp_path / "new"), "--iteration", 7)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "family, hint",
    [("gptj", "--rope-scaling none$"), ("baichuan", "or export it with --as-llama$")],
)
def test_a_rope_that_the_family_cannot_say(megatron, tmp_path, family, hint):
    from pose_megatron.checkpoints.huggingface import config_json
    from pose_megatron.checkpoints.megatron.directory import find
    from pose_megatron.rope.scaling import RopeScaling

    model = dataclasses.replace(
        find(megatron).model, family=family, rope_scaling=RopeScaling("linear", 8.0)
    )
    with pytest.raises(ValueError, match=f"ForCausalLM reads no rope .*{hint}"):
        config_json.write_config(tmp_path, model, torch.float32, {})


def test_as_llama_is_for_those_that_need_it(run, megatron, tmp_path):
    with pytest.raises(ValueError, match="--as-llama is for Baichuan2, not llama"):
        run(*to_hf(megatron, tmp_path / "out"), "--as-llama")


def test_wrong_tensors_in_a_megatron_checkpoint(run, megatron, tmp_path):
    from tests.whole_models import read_weights, write_weights

    tensors, model = read_weights(megatron)
    del tensors["decoder.final_layernorm.weight"]
    write_weights(tmp_path / "meg", tensors, model)
    with pytest.raises(ValueError, match="missing tensor decoder.final_layernorm") as error:
        run(*to_hf(tmp_path / "meg", tmp_path / "out"))
    assert str(tmp_path / "meg") in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["meg"]


@pytest.mark.parametrize("name", ["code.model", "words.json"])
def test_tokenizer_under_a_name_of_its_own(name, tmp_path):
    """As preprocessing and training keep it in a checkpoint when it is given as a file."""
    from pose_megatron.checkpoints.sidecars import find_sidecars

    (tmp_path / name).touch()
    expected = {f"tokenizer{Path(name).suffix}": tmp_path / name}
    assert find_sidecars(tmp_path / name) == find_sidecars(tmp_path) == expected
    assert find_sidecars(tmp_path / "none") == {}


def test_command_line(tmp_path, hf):
    def start(*words):
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(TOOL), *map(str, words)]
        return Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=env)

    damaged = shutil.copytree(hf, tmp_path / "damaged")
    cut(damaged / "model.safetensors")
    failing = start(*to_megatron(damaged, tmp_path / "other"))
    passing = start(*to_megatron(hf, tmp_path / "meg"), "--json", tmp_path / "run.json")
    out, err = passing.communicate()
    assert passing.returncode == 0, err
    assert "relative errors: inv_freq" in out and "MB/s" in out
    summary = json.loads((tmp_path / "run.json").read_text())
    assert summary["tensors"] == 1 + 3 * 6 + 2
    assert summary["bytes"] == 4 * (2 * 384 * 64 + 64 + 3 * (2 * 64 + 64 * (3 * 64 + 3 * 96)))
    assert max(summary["rope_errors"].values()) <= 1e-6
    assert summary["seconds"] > sum(summary["phases"].values()) > 0

    _, err = failing.communicate()
    assert failing.returncode == 1 and "Traceback" not in err
    assert "model.safetensors is damaged or cut off" in err.splitlines()[-1]
    expected = ["damaged", "hf", "meg", "run.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == expected
