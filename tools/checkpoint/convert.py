"""Converts a LLaMA checkpoint between Hugging Face and Megatron, exactly.

Hugging Face's side is safetensors with config.json and the tokenizer's files; Megatron's side is a
torch_dist checkpoint that every layout of ranks loads. The output is built in a temporary folder
beside --save-dir, read back and compared, and only then renamed: it is whole or it is not there.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pose_megatron import cpu

cpu.install()

from pose_megatron.arguments import ModelConfig
from pose_megatron.checkpoint import TRACKER, find, read_weights, write_weights
from pose_megatron.convert import hf_to_megatron, megatron_to_hf
from pose_megatron.distributed import one_sentence_errors
from pose_megatron.rope import attention_factor, from_hf, inverse_frequencies, to_hf

EXAMPLES = """examples:
  # a Hugging Face folder into Megatron's format
  python tools/checkpoint/convert.py --loader hf --saver megatron \\
      --load-dir models/llama-2-7b --save-dir checkpoints/llama-2-7b

  # the extended model back, in bfloat16; config.json carries the interpolation
  python tools/checkpoint/convert.py --loader megatron --saver hf --dtype bfloat16 \\
      --load-dir checkpoints/llama-2-7b-pose-128k --save-dir models/llama-2-7b-pose-128k
"""
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
SIDECARS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    *("chat_template.json", "generation_config.json", "config.json"),
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Weights:
    """A whole model between loader and saver.

    Attributes:
        tensors: by Megatron's names.
        sidecars: files that accompany the weights, by the name they have in a Hugging Face folder:
            the tokenizer's, generation_config.json, and config.json for the ids of special tokens.
    """

    tensors: dict[str, torch.Tensor]
    model: ModelConfig
    sidecars: dict[str, Path]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="convert.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = ("hf", "megatron")
    p.add_argument("--loader", required=True, choices=formats, help="format of --load-dir")
    p.add_argument("--saver", required=True, choices=formats, help="format of --save-dir")
    p.add_argument("--load-dir", required=True, type=Path)
    p.add_argument("--save-dir", required=True, type=Path)
    p.add_argument("--overwrite", action="store_true", help="replace a checkpoint in --save-dir")
    p.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep", help="[keep]"
    )
    p.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="loader hf: the embedding gets zero rows up to a multiple of N [128]",
    )
    p.add_argument(
        "--iteration", type=int, help="loader megatron: which one [the latest of the folder]"
    )
    p.add_argument(
        "--tokenizer-model",
        type=Path,
        help="tokenizer file or folder to copy [the one that the source carries]",
    )
    p.add_argument(
        "--max-shard-size", default="5GB", help="saver hf: of one safetensors file [5GB]"
    )
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the result back and compare every bit; the rope is always checked",
    )
    return p


@one_sentence_errors
def main() -> None:
    convert(parser().parse_args())


def convert(args: argparse.Namespace) -> None:
    load, save = args.load_dir.resolve(), args.save_dir.resolve()
    if save == load or save in load.parents:
        raise ValueError(f"--save-dir {save} would replace --load-dir {load}; choose another")
    if args.tokenizer_model and not args.tokenizer_model.exists():
        raise ValueError(f"--tokenizer-model {args.tokenizer_model} does not exist")
    shard_bytes = _bytes(args.max_shard_size)
    with _staged(save, args.overwrite) as folder:
        weights = _load_hf(load, args) if args.loader == "hf" else _load_megatron(load, args)
        if args.dtype != "keep":
            dtype = getattr(torch, args.dtype)
            cast = {name: tensor.to(dtype) for name, tensor in weights.tensors.items()}
            weights = Weights(cast, weights.model, weights.sidecars)
        if args.saver == "hf":
            _save_hf(folder, weights, shard_bytes, args.verify)
        else:
            _save_megatron(folder, weights, args.verify)
    print(f"wrote {save}", flush=True)


def _load_hf(folder: Path, args: argparse.Namespace) -> Weights:
    config = _json(folder / "config.json")
    with _naming(folder):
        model = _model_of(config, args.make_vocab_size_divisible_by)
        _check_rope(folder, model)
        tensors = _Safetensors(folder)
        with _Phase("read", tensors.bytes) as tensors.phase:
            converted = hf_to_megatron(tensors, **_sizes(model))
    return Weights(converted, model, _sidecars(args.tokenizer_model or folder))


def _load_megatron(folder: Path, args: argparse.Namespace) -> Weights:
    print(f"loading {find(folder, args.iteration).path}", flush=True)
    with _Phase("read") as phase:
        tensors, model = read_weights(folder, args.iteration)
        phase.update(_total(tensors))
    return Weights(tensors, model, _sidecars(args.tokenizer_model or folder / "tokenizer"))


def _save_megatron(folder: Path, weights: Weights, verify: bool) -> None:
    total = _total(weights.tensors)
    with _Phase("write", total) as phase, _scratch(folder) as renamed:
        for name, path in weights.sidecars.items():
            shutil.copyfile(path, renamed / name)
        write_weights(folder, weights.tensors, weights.model, renamed.iterdir())
        phase.update(total)
    if verify:
        with _Phase("verify", total) as phase:
            tensors, model = read_weights(folder)
            _compare(weights.tensors, tensors, phase)
            if model != weights.model:
                raise ValueError(f"read back {model}, wrote {weights.model}")


def _save_hf(folder: Path, weights: Weights, shard_bytes: int, verify: bool) -> None:
    model = weights.model
    if model.rotary_dim != model.kv_channels:
        raise ValueError(
            f"--rotary-percent {model.rotary_percent} has no Hugging Face form: LLaMA rotates "
            "whole heads"
        )
    tensors = megatron_to_hf(weights.tensors, **_sizes(model))
    _write_tokenizer(folder, weights.sidecars, model.max_position_embeddings)
    config = _config_of(model, tensors["model.embed_tokens.weight"].dtype)
    _write_json(folder / "config.json", config | _token_ids(folder, weights.sidecars))
    _check_rope(folder, model)
    with _Phase("write", total := _total(tensors)) as phase:
        _write_shards(folder, tensors, shard_bytes, phase)
    if verify:
        with _Phase("verify", total) as phase:
            _compare(tensors, _Safetensors(folder), phase)
    if model.rope_scaling.method == "linear":
        print(
            "note: vLLM multiplies the window by the factor of linear interpolation; start it with "
            f"--max-model-len {model.max_position_embeddings}"
        )


def _sizes(model: ModelConfig) -> dict:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    names += ("num_query_groups", "kv_channels", "vocab_size", "padded_vocab_size")
    tied = not model.untie_embeddings_and_output_weights
    return {name: getattr(model, name) for name in names} | {"tied": tied}


def _model_of(config: dict, divisible_by: int) -> ModelConfig:
    """The model that a Hugging Face config.json describes; refuses what LLaMA's layout lacks."""
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    window = 4096 if architecture == "MistralForCausalLM" else None  # what transformers fills in
    for name, default, wanted, why in [
        ("sliding_window", window, None, "attention would be cut off"),
        ("hidden_act", "silu", "silu", "the feed-forward layer is SwiGLU"),
        ("attention_bias", False, False, "there is no bias to put it in"),
        ("mlp_bias", False, False, "there is no bias to put it in"),
        ("quantization_config", None, None, "weights must not be quantized"),
    ]:
        if (value := config.get(name, default)) != wanted:
            raise ValueError(f"config.json: {name} {value!r} is not supported: {why}")

    def whole(name: str, default: int | None = None) -> int:
        value = default if config.get(name) is None else config[name]
        if not isinstance(value, int):
            raise ValueError(f"config.json: {name} must be a whole number, not {value!r}")
        return value

    hidden, heads = whole("hidden_size"), whole("num_attention_heads")
    base, scaling = from_hf(config)
    return ModelConfig(
        num_layers=whole("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=whole("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=whole("num_key_value_heads", heads),
        kv_channels=whole("head_dim", hidden // max(heads, 1)),
        vocab_size=whole("vocab_size"),
        max_position_embeddings=whole("max_position_embeddings"),
        make_vocab_size_divisible_by=divisible_by,
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rotary_base=base,
        rope_scaling=scaling,
    )


def _config_of(model: ModelConfig, dtype: torch.dtype) -> dict:
    dtype = str(dtype).removeprefix("torch.")
    rope = to_hf(
        model.rope_scaling,
        base=model.rotary_base,
        rotary_dim=model.rotary_dim,
        max_position_embeddings=model.max_position_embeddings,
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        "torch_dtype": dtype,  # read by transformers 4 and vLLM
        "dtype": dtype,  # by transformers 5
        **rope,
    }


def _check_rope(folder: Path, model: ModelConfig) -> None:
    """Compares what transformers makes of config.json with the angles that Megatron trains with."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        config = AutoConfig.from_pretrained(folder)
        rotary = LlamaRotaryEmbedding(config)
    except Exception as error:  # of many classes, for what it finds wrong in the file
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers refuses config.json: {reason}") from error
    ours = inverse_frequencies(model.rotary_dim, model.rotary_base, model.rope_scaling)
    wrong = 0.0
    for position in (0, model.max_position_embeddings - 1):  # longrope chooses a list by position
        rotary(torch.zeros(1), torch.tensor([[position]]))
        theirs = rotary.inv_freq.double()
        if theirs.shape != ours.shape:
            raise ValueError(f"transformers rotates {2 * len(theirs)} channels, we {2 * len(ours)}")
        wrong = max(wrong, ((theirs - ours).abs() / ours).max().item())
    factor = attention_factor(model.rope_scaling)
    wrong_factor = abs(rotary.attention_scaling - factor) / factor
    errors = f"relative errors: inv_freq {wrong:.1e}, attention factor {wrong_factor:.1e}"
    print(f"rope as transformers reads it: {errors}", flush=True)
    if not (wrong <= 1e-6 and wrong_factor <= 1e-6):
        raise ValueError(
            f"transformers reads another rope from config.json than {model.rope_scaling}: {errors}"
        )
    if config.max_position_embeddings != model.max_position_embeddings:
        raise ValueError(f"transformers reads a window of {config.max_position_embeddings}")


class _Safetensors(Mapping):
    """The tensors of a Hugging Face folder, mapped from disk when they are asked for.

    `bytes` is their size on disk; `phase`, when set, advances as they are fetched.
    """

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = _json(index).get("weight_map")
            if not isinstance(names, dict):
                raise ValueError(f"{index.name} has no weight_map")
        elif (folder / "model.safetensors").is_file():
            names = None
        else:
            raise ValueError(
                "neither model.safetensors nor model.safetensors.index.json is here; other formats "
                "must be saved as safetensors first"
            )
        self._files, self.bytes, self.phase = {}, 0, None
        for shard in sorted(set(names.values())) if names else ["model.safetensors"]:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise ValueError(f"shard {shard} is missing")
            try:
                file = safe_open(folder / shard, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{shard} is damaged or cut off: {error}") from None
            self._files |= dict.fromkeys(file.keys(), file)
            self.bytes += (folder / shard).stat().st_size
            if names and (lost := {n for n, s in names.items() if s == shard} - set(file.keys())):
                raise ValueError(f"shard {shard} lacks {min(lost)}, which {index.name} names")

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._files[name].get_tensor(name)
        if self.phase:
            self.phase.update(tensor.nbytes)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _write_shards(folder: Path, tensors: dict, shard_bytes: int, phase) -> None:
    shards = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and _total(shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        phase.update(_total(shard))
    if len(shards) > 1:
        index = {"metadata": {"total_size": _total(tensors)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _sidecars(tokenizer: Path) -> dict[str, Path]:
    """Tokenizer and generation files, by the names that a Hugging Face folder gives them."""
    if tokenizer.is_file():
        return {"tokenizer.model" if tokenizer.suffix == ".model" else "tokenizer.json": tokenizer}
    found = {name: tokenizer / name for name in SIDECARS if (tokenizer / name).is_file()}
    if models := list(tokenizer.glob("*.model")):  # sentencepiece's own name for it is free
        found.setdefault("tokenizer.model", models[0])
    return found


def _write_tokenizer(folder: Path, sidecars: dict[str, Path], window: int) -> None:
    """Copies the tokenizer; its config says the new window, and is made where there was none."""
    for name, path in sidecars.items():
        if name != "config.json":
            shutil.copyfile(path, folder / name)
    if "tokenizer_config.json" in sidecars:
        config = _json(folder / "tokenizer_config.json")
    elif "tokenizer.json" in sidecars:
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif "tokenizer.model" in sidecars:
        from sentencepiece import SentencePieceProcessor

        tokens = SentencePieceProcessor(model_file=str(sidecars["tokenizer.model"]))
        special = {"bos": tokens.bos_id(), "eos": tokens.eos_id(), "unk": tokens.unk_id()}
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,  # as tools/preprocess_data.py
            "add_prefix_space": tokens.encode("a", out_type=str)[0].startswith("\u2581"),
            **{f"{name}_token": tokens.id_to_piece(i) for name, i in special.items() if i >= 0},
        }
    else:
        print("note: no tokenizer to copy; name one with --tokenizer-model", flush=True)
        return
    _write_json(folder / "tokenizer_config.json", config | {"model_max_length": window})


def _token_ids(folder: Path, sidecars: dict[str, Path]) -> dict:
    """Ids of the special tokens: those of the source's config.json, else the tokenizer's."""
    if "config.json" in sidecars:
        source = _json(sidecars["config.json"])
        return {name: source[name] for name in TOKEN_IDS if name in source}
    if not (folder / "tokenizer_config.json").is_file():
        return dict.fromkeys(TOKEN_IDS)  # transformers would fill in 1 and 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {name: getattr(tokenizer, name) for name in TOKEN_IDS}


@contextlib.contextmanager
def _staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target` that takes its place if all goes well, and vanishes if not."""
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise ValueError(f"--save-dir {target} is not empty; choose another or add --overwrite")
    if occupied and not any((target / name).is_file() for name in ("config.json", TRACKER)):
        raise ValueError(f"--save-dir {target} holds no checkpoint that --overwrite could replace")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(target) as folder:
        yield folder
        for path in (*folder.rglob("*"), folder):
            _fsync(path)
        if occupied:
            with _scratch(target) as old:
                target.rename(old / target.name)
                try:
                    folder.rename(target)
                except OSError:
                    (old / target.name).rename(target)
                    raise
        else:
            folder.rename(target)
        _fsync(target.parent)


@contextlib.contextmanager
def _scratch(beside: Path) -> Iterator[Path]:
    """A fresh hidden folder beside a path; what is still there at the end is removed."""
    folder = beside.with_name(f".{beside.name}.{os.getpid()}-{time.time_ns()}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Phase:
    """A progress bar in bytes on a terminal; everywhere one line with MB/s at the end."""

    def __init__(self, name: str, total: int | None = None):
        self.name, self.done, self.start = name, 0, time.perf_counter()
        self.bar = tqdm(
            desc=name, total=total, unit="B", unit_scale=True, leave=False, disable=None
        )

    def update(self, count: int) -> None:
        self.done += count
        self.bar.update(count)

    def __enter__(self) -> "_Phase":
        return self

    def __exit__(self, kind, *_) -> None:
        self.bar.close()
        seconds, size = time.perf_counter() - self.start, self.done / 1e6
        if kind is None:
            line = f"{self.name:6} {size:10,.1f} MB {seconds:8.1f} s {size / seconds:8,.0f} MB/s"
            print(line, flush=True)


def _compare(written: Mapping, read: Mapping, phase) -> None:
    if written.keys() != set(read):
        raise ValueError(f"read back other tensors: {min(written.keys() ^ set(read))}")
    for name, tensor in written.items():
        again = read[name]
        same = tensor.dtype == again.dtype and tensor.shape == again.shape
        if not (same and torch.equal(_bits(tensor), _bits(again))):
            raise ValueError(f"read back another {name} than was written")
        phase.update(tensor.nbytes)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _total(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B", size.strip().upper())
    if not match or float(match[1]) == 0:
        raise ValueError(f"--max-shard-size {size} is not a size such as 5GB or 200MB")
    return int(float(match[1]) * 1000 ** ["", *"KMGT"].index(match[2]))


def _json(path: Path) -> dict:
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


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Puts the folder in front of a message about what is in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


if __name__ == "__main__":
    main()
