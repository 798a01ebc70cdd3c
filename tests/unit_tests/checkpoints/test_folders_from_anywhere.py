"""Hugging Face folders that are odd and right, and those that cannot be: against transformers."""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pose_megatron
from pose_megatron.checkpoints import convert as converting
from pose_megatron.checkpoints.huggingface.format import HuggingFace
from pose_megatron.errors import ConfigError, DamagedCheckpoint
from pose_megatron.models.shape import ModelConfig
from tests.whole_models import TOKENIZER

ROOT = Path(__file__).resolve().parents[3]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def make(folder, tied=False, **config):
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **config,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


def write(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path, **keys):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))


def convert(load, save, **how):
    formats = {"loader": "hf", "saver": "hf", "quiet": True}
    pose_megatron.convert(load, save, **formats | how)
    return load_file(save / "model.safetensors") if (save / "config.json").is_file() else None


@torch.no_grad()
def logits(folder):
    tokens = torch.arange(128).view(2, 64)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


@pytest.mark.parametrize("other", [False, True])
def test_a_tied_model_is_what_transformers_makes_of_it(tmp_path, other, capsys):
    hf, tensors = make(tmp_path / "hf", tied=True)
    if other:
        tensors[HEAD] = tensors[EMBEDDING].roll(1, 0).contiguous()
    else:
        tensors[HEAD] = tensors.pop(EMBEDDING)  # stored under this name alone
    write(hf, tensors)
    out = convert(hf, tmp_path / "out")
    assert (HEAD in out) == other
    assert ("read as an untied one" in capsys.readouterr().err) == other
    assert torch.equal(logits(tmp_path / "out"), logits(hf))


def test_queries_of_another_precision_need_dtype(tmp_path):
    hf, tensors = make(tmp_path / "hf")
    name = "model.layers.0.self_attn.k_proj.weight"
    write(hf, tensors | {name: tensors[name].bfloat16()})
    with pytest.raises(ConfigError, match="stored as bfloat16 and float32; say with --dtype"):
        convert(hf, tmp_path / "out")
    out = convert(hf, tmp_path / "out", dtype=torch.float32)
    assert torch.equal(out[name], tensors[name].bfloat16().float())
    assert all(torch.equal(out[n], tensors[n]) for n in tensors if n != name)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float8_e5m2fnuz])
def test_quantized_weights_are_named(tmp_path, dtype, scales):
    hf, tensors = make(tmp_path / "hf")
    name = "model.layers.1.mlp.up_proj.weight"
    write(hf, tensors | {name: tensors[name].to(dtype)})
    if scales:
        write(hf, load_file(hf / "model.safetensors") | {f"{name}_scale_inv": torch.ones(1)})
    with pytest.raises(ConfigError, match=f"{name} is stored as .*, and quantized"):
        convert(hf, tmp_path / "out", verify=False, dtype=torch.bfloat16)


def test_a_baichuan2_folder_becomes_its_llama(tmp_path):
    hf, tensors = make(tmp_path / "hf")
    expected = make(tmp_path / "llama")[1]
    write(tmp_path / "llama", expected | {HEAD: F.normalize(expected[HEAD])})
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{name}{x}_proj.weight") for x in "qkv"]
        tensors[f"{name}W_pack.weight"] = torch.cat(parts)
    write(hf, tensors)
    edit(hf / "config.json", architectures=["BaichuanForCausalLM"], model_type="baichuan")
    convert(hf, tmp_path / "out", as_llama=True)
    assert (logits(tmp_path / "out") - logits(tmp_path / "llama")).abs().max() < 1e-5


def test_files_that_go_along(tmp_path):
    hf, _ = make(tmp_path / "hf")
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "rag.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    (hf / "tokenization_own.py").write_text("raise SystemExit('executed')")
    own = {"AutoTokenizer": ["tokenization_own.Own", None]}
    edit(hf / "tokenizer_config.json", tokenizer_class="TokenizersBackend", auto_map=own)
    (hf / "tokenizer.json").write_text(TOKENIZER)
    convert(hf, tmp_path / "megatron", saver="megatron")
    convert(tmp_path / "megatron", tmp_path / "out", loader="megatron")
    out = tmp_path / "out"
    assert "é" in (out / "additional_chat_templates/rag.jinja").read_text(encoding="utf-8")
    assert (out / "tokenization_own.py").is_file()
    said = json.loads((out / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast" and said["auto_map"] == own
    (hf / "tokenization_own.py").unlink()
    convert(hf, tmp_path / "without")
    said = json.loads((tmp_path / "without" / "tokenizer_config.json").read_text())
    assert "auto_map" not in said and said["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.model"]
)
def test_git_lfs_pointers_are_named(tmp_path, name):
    hf, _ = make(tmp_path / "hf")
    if name == "pytorch_model.bin":
        (hf / "model.safetensors").unlink()
    (hf / name).write_text(POINTER)
    with pytest.raises((ConfigError, DamagedCheckpoint), match=f"{name} is a Git LFS pointer"):
        convert(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV])
def test_the_process_that_asks_transformers_may_be_killed(monkeypatch, number):
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(
        converting.rope_check, "rope_errors", lambda *_: os.kill(os.getpid(), number)
    )
    folders = [(Path("folder"), ModelConfig)]
    with (
        pytest.raises(ConfigError, match="config.json was killed or crashed"),
        converting._rope_check(folders) as result,
    ):
        result()


def test_json_is_utf8_in_any_locale(tmp_path):
    hf, _ = make(tmp_path / "hf")
    edit(hf / "tokenizer_config.json")
    (hf / "tokenizer_config.json").write_text('{"bos_token": "<début▁>"}', encoding="utf-8")
    code = (
        "import sys; from pathlib import Path\n"
        "from pose_megatron.runtime.json_files import read_json, write_json\n"
        "write_json(Path(sys.argv[2]), read_json(Path(sys.argv[1])))"
    )
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    files = [str(hf / "tokenizer_config.json"), str(tmp_path / "written")]
    subprocess.run([sys.executable, "-c", code, *files], env=env, cwd=ROOT, check=True)
    assert json.loads((tmp_path / "written").read_text())["bos_token"] == "<début▁>"


def test_every_text_file_is_opened_with_an_encoding():
    for path in sorted((ROOT / "pose_megatron").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            binary = any("b" in mode for mode in modes if isinstance(mode, str))
            literal = len(modes) == len(node.args) - 1 or len(node.args) == 1  # else unknown here
            is_open = isinstance(node.func, ast.Name) and name == "open" and literal and not binary
            if is_open or name in ("read_text", "write_text"):
                keywords = {keyword.arg for keyword in node.keywords}
                assert "encoding" in keywords, f"{path}:{node.lineno} depends on the locale"


def test_a_head_of_the_same_values_stays_tied(tmp_path):
    hf, tensors = make(tmp_path / "hf", tied=True)
    write(hf, tensors | {HEAD: tensors[EMBEDDING].clone()})
    reader = HuggingFace().open(hf)
    assert not reader.model.untie_embeddings_and_output_weights and not reader.weights.warnings
