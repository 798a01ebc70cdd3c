"""One of each kind of folder and file that the tools read, all of one small model and one text."""

import json
import sysconfig
from pathlib import Path

import torch
from attempt import attempt
from safetensors.torch import load_file

from pose_megatron.checkpoints.megatron.common_state import read_common_state
from pose_megatron.checkpoints.megatron.directory import TRACKER, find
from pose_megatron.checkpoints.megatron.torch_dist import open_weights

SHAPE = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64
    --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 64"""
TRAINING = """
    --data-path {clean}/corpus_text_document --split 100,0,0 --tokenizer-model {clean}/tokenizer
    --seq-length 32 --max-position-embeddings 256 --rope-scaling yarn --rope-scaling-factor 8
    --micro-batch-size 2 --global-batch-size 2 --num-workers 0 --log-interval 1"""


def make(root: Path) -> Path:
    """Makes everything in a folder, with our own programs as users run them; returns its path.

    corpus.jsonl                             text
    tokenizer/                               SentencePiece's, 512 tokens
    corpus_text_document.bin/.idx            token files, and corpus_summary.json
    samples_*                                materialised samples
    run/                                     a Megatron checkpoint of two iterations
    hf/, shards/, bin/, meta/, legacy/       its weights: safetensors, in one file and in several,
                                             pytorch_model.bin, Meta's format, Megatron-LM's old one
    """
    root.mkdir(parents=True)
    _write_text(root / "corpus.jsonl")
    where = {"clean": root}

    def ours(words: str) -> None:
        ended = attempt(words.format(**where).split())
        if ended.how != "accepted":
            raise RuntimeError(f"{words}: {ended.how}, {ended.said}")

    ours(
        "train-tokenizer --input {clean}/corpus.jsonl --vocab-size 512 "
        "--output-dir {clean}/tokenizer"
    )
    ours(
        "preprocess --input {clean}/corpus.jsonl --append-eod --output-prefix {clean}/corpus "
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model {clean}/tokenizer"
    )
    ours(f"pretrain {SHAPE} {TRAINING} --train-iters 2 --save-interval 1 --save {{clean}}/run")
    ours(f"materialize --output {{clean}}/samples --samples 8 --train-iters 4 {SHAPE} {TRAINING}")
    ours("convert --loader megatron --saver hf --load-dir {clean}/run --save-dir {clean}/hf")
    ours(
        "convert --loader megatron --saver hf --load-dir {clean}/run --save-dir {clean}/shards "
        "--max-shard-size 50KB"
    )
    _write_bin(root / "hf", root / "bin")
    _write_plain(root / "hf", root / "plain")  # neither of these formats has yarn
    ours("convert --loader hf --saver meta --load-dir {clean}/plain --save-dir {clean}/meta")
    ours("convert --loader hf --saver megatron --load-dir {clean}/plain --save-dir {clean}/release")
    _write_legacy(root / "release", root / "legacy")
    return root


def _write_text(path: Path) -> None:
    """Some files of the Python standard library, one document each."""
    library = Path(sysconfig.get_path("stdlib"))
    with open(path, "w", encoding="utf-8") as out:
        for file in sorted(library.glob("*.py"))[:40]:
            text = file.read_text(encoding="utf-8", errors="replace")[:4000]
            out.write(json.dumps({"text": text}) + "\n")


def _write_bin(source: Path, folder: Path) -> None:
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")


def _write_plain(source: Path, folder: Path) -> None:
    """The same weights without interpolation."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if not key.startswith("rope_")}
    config |= {"max_position_embeddings": 2048, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_legacy(source: Path, folder: Path) -> None:
    """As a Megatron-LM of 2023 wrote what one rank has."""
    weights, found = open_weights(source), find(source)
    state = {
        "model": {name: weights[name] for name in weights.shapes},
        "args": read_common_state(found.path)["args"],
        "checkpoint_version": 3.0,
        "iteration": 2,
    }
    path = folder / "iter_0000002" / "mp_rank_00"
    path.mkdir(parents=True)
    torch.save(state, path / "model_optim_rng.pt")
    (folder / TRACKER).write_text("2", encoding="utf-8")
