"""A LLaMA in a Hugging Face model folder, read and written without transformers' model classes.

    config.json                      shape and rope  <-> ModelConfig
    model*.safetensors(.index.json)  weights, in one file or in shards with an index
    tokenizer.*, ...                 SIDECARS: what accompanies the weights and is copied

Reading is lazy: a 70B model's tensors come from disk one by one. What transformers will make of the
rope in config.json is asked of transformers itself (`rope_errors`).
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pose_megatron.directory import TRACKER
from pose_megatron.durable import fsync
from pose_megatron.model_config import ModelConfig
from pose_megatron.rope import attention_factor, from_hf, inverse_frequencies, to_hf
from pose_megatron.tokenizer import FOLDER_FILES

# config.json goes along for the ids of special tokens.
SIDECARS = (*FOLDER_FILES, "chat_template.json", "generation_config.json", "config.json")
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
NAMES = {  # config.json's name: ModelConfig's
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def read_config(folder: Path, make_vocab_size_divisible_by: int = 128) -> ModelConfig:
    """The model that a folder's config.json describes.

    Raises:
        ValueError: it is missing, broken, or says what this LLaMA lacks.
    """
    config = _read_json(folder / "config.json")
    with naming(folder):
        architecture = (config.get("architectures") or [None])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"config.json: architecture {architecture} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        if architecture == "MistralForCausalLM":
            config.setdefault("sliding_window", 4096)  # as transformers does
        for name, only in (FIXED | {"sliding_window": None, "quantization_config": None}).items():
            if (value := config.get(name, only)) != only:
                raise ValueError(
                    f"config.json: {name} {value!r} is not supported, only {only!r} is"
                )

        config = {name: value for name, value in config.items() if value is not None}

        def whole(name: str) -> int:
            if not isinstance(value := config.get(name), int):
                raise ValueError(f"config.json: {name} must be a whole number, not {value!r}")
            return value

        heads = whole("num_attention_heads")
        config.setdefault("num_key_value_heads", heads)
        config.setdefault("head_dim", whole("hidden_size") // max(heads, 1))
        base, scaling = from_hf(config)
        return ModelConfig(
            **{ours: whole(theirs) for theirs, ours in NAMES.items()},
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            rotary_base=base,
            rope_scaling=scaling,
        )


def sizes(model: ModelConfig) -> dict:
    """What pose_megatron.convert asks for to convert this model."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
             "num_query_groups", "kv_channels", "vocab_size", "padded_vocab_size")
    tied = not model.untie_embeddings_and_output_weights
    return {name: getattr(model, name) for name in names} | {"tied": tied}


class Tensors(Mapping):
    """The weights of a folder by name; each is read from disk when it is asked for.

    Attributes:
        bytes: of all files.
        progress: called with the bytes of every tensor that is read.

    Raises:
        ValueError: there are no safetensors, or a shard is missing, damaged or incomplete.
    """

    def __init__(self, folder: Path):
        index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
        weight_map = {}
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map")
        elif not whole.is_file():
            raise ValueError(
                f"{folder}: neither {whole.name} nor {index.name} is here; other formats must be "
                "saved as safetensors first"
            )
        self._files, self.bytes = {}, 0
        self.progress: Callable[[int], object] = lambda count: None
        for shard in sorted(set(weight_map.values())) or [whole.name]:
            path = folder / shard
            if path.parent != folder or not path.is_file():
                raise ValueError(f"{folder}: shard {shard} is missing")
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged or cut off: {error}") from None
            self._files |= dict.fromkeys(file.keys(), file)
            self.bytes += path.stat().st_size
        if lost := weight_map.keys() - self._files.keys():
            raise ValueError(
                f"{folder}: shard {weight_map[min(lost)]} lacks {min(lost)}, which {index.name} "
                "names"
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._files[name].get_tensor(name)
        self.progress(tensor.nbytes)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def find_sidecars(source: Path) -> dict[str, Path]:
    """Files of a tokenizer and its like, by the names that a Hugging Face folder gives them.

    Args:
        source: a folder, or the tokenizer's file; a .model, or a file that is alone, may have any
            name.
    """
    files = [source] if source.is_file() else sorted(source.glob("*"))
    own = [file for file in files if file.name not in SIDECARS]
    found = {
        f"tokenizer{file.suffix}": file
        for file in own
        if file.suffix == ".model" or len(files) == 1
    }
    return found | {file.name: file for file in files if file not in own}


def write_config(
    folder: Path, model: ModelConfig, dtype: torch.dtype, sidecars: Mapping[str, Path]
) -> None:
    """Writes all that a folder holds beside the weights.

    tokenizer_config.json says the model's window, and is made where the tokenizer has none.

    Raises:
        ValueError: LLaMA's config cannot say what the model is.
    """
    if model.rotary_dim != model.kv_channels:
        raise ValueError(
            f"--rotary-percent {model.rotary_percent} has no Hugging Face form: LLaMA rotates "
            "whole heads"
        )
    for name in sidecars.keys() - {"config.json"}:
        shutil.copyfile(sidecars[name], folder / name)
    window = model.max_position_embeddings
    if tokenizer := _tokenizer_config(sidecars):
        _write_json(folder / "tokenizer_config.json", tokenizer | {"model_max_length": window})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(model, ours) for theirs, ours in NAMES.items()},
        **FIXED,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        # transformers 4 and vLLM read the first, transformers 5 the second.
        **dict.fromkeys(("torch_dtype", "dtype"), str(dtype).removeprefix("torch.")),
        **_special_tokens(folder, sidecars),
    }
    rope = to_hf(model.rope_scaling, base=model.rotary_base, rotary_dim=model.rotary_dim,
                 max_position_embeddings=window)
    _write_json(folder / "config.json", config | rope)


def _tokenizer_config(sidecars: Mapping[str, Path]) -> dict:
    if "tokenizer_config.json" in sidecars:
        return _read_json(sidecars["tokenizer_config.json"])
    if "tokenizer.json" in sidecars:
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    if "tokenizer.model" not in sidecars:
        return {}
    from sentencepiece import SentencePieceProcessor

    tokens = SentencePieceProcessor(model_file=str(sidecars["tokenizer.model"]))
    special = {"bos": tokens.bos_id(), "eos": tokens.eos_id(), "unk": tokens.unk_id()}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,  # as tools/preprocess_data.py
        "add_prefix_space": tokens.encode("a", out_type=str)[0].startswith("\u2581"),
        **{f"{name}_token": tokens.id_to_piece(i) for name, i in special.items() if i >= 0},
    }


def _special_tokens(folder: Path, sidecars: Mapping[str, Path]) -> dict:
    """Their ids: those of the source's config.json, else the tokenizer's."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if "config.json" in sidecars:
        source = _read_json(sidecars["config.json"])
        return {name: source[name] for name in names if name in source}
    if not (folder / "tokenizer_config.json").is_file():
        return dict.fromkeys(names)  # transformers would fill in 1 and 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {name: getattr(tokenizer, name) for name in names}


def write_tensors(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    shard_bytes: int,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes weights in their order, a new shard where `shard_bytes` would be exceeded.

    `progress` is called with the bytes of every shard that is written.
    """
    shards, filled = [{}], [0]
    for name, tensor in tensors.items():
        if filled[-1] and filled[-1] + tensor.nbytes > shard_bytes:
            shards.append({})
            filled.append(0)
        shards[-1][name] = tensor
        filled[-1] += tensor.nbytes
    weight_map = {}
    for number, (shard, size) in enumerate(zip(shards, filled, strict=True), 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        save_file(shard, folder / f"model{part}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"model{part}.safetensors")
        progress(size)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(filled)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def rope_errors(folder: Path, model: ModelConfig) -> dict[str, float]:
    """How far the rope that transformers makes of config.json is from the one Megatron trains with.

    Returns:
        Relative errors of `inv_freq` (the largest) and `attention_factor`, both at most 1e-6.

    Raises:
        ValueError: transformers refuses config.json, or reads another rope from it.
    """
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    except Exception as error:  # of many classes, for what it finds wrong in the file
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: transformers refuses config.json: {reason}") from error
    ours = inverse_frequencies(model.rotary_dim, model.rotary_base, model.rope_scaling)
    errors = {"inv_freq": 0.0}
    for position in (0, model.max_position_embeddings - 1):  # longrope chooses a list by position
        rotary(torch.zeros(1), torch.tensor([[position]]))
        theirs = rotary.inv_freq.double()
        same = theirs.shape == ours.shape
        wrong = ((theirs - ours).abs() / ours).max().item() if same else float("inf")
        errors["inv_freq"] = max(errors["inv_freq"], wrong)
    factor = attention_factor(model.rope_scaling)
    errors["attention_factor"] = abs(rotary.attention_scaling - factor) / factor
    if not all(error <= 1e-6 for error in errors.values()):
        raise ValueError(
            f"{folder}: transformers reads another rope from config.json than "
            f"{model.rope_scaling}; relative errors {errors}"
        )
    return errors


@contextlib.contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target` that takes its place if all goes well, and vanishes if not.

    Raises:
        ValueError: there is something at `target`, and it must not or cannot be replaced.
    """
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise ValueError(f"--save-dir {target} is not empty; choose another or add --overwrite")
    if occupied and not any((target / name).is_file() for name in ("config.json", TRACKER)):
        raise ValueError(
            f"--save-dir {target} holds no checkpoint that --overwrite could replace; choose "
            "another"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as private:
        folder = Path(private, target.name)  # inside, as others may not read `private` itself
        folder.mkdir()
        yield folder
        for path in (*folder.rglob("*"), folder):
            fsync(path)
        old = Path(f"{private}.old")  # outside: never swept away before the new one is in place
        if occupied:
            target.rename(old)
        folder.rename(target)
        fsync(target.parent)
        if occupied:
            shutil.rmtree(old)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path in front of a message about what is in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
