"""Files made to run code, to hang or to fill memory, in every place that our programs read."""

import functools
import gzip
import itertools
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
import zstandard
from damages import CONVERT, RESUME, TRAIN
from material import SHAPE, TRAINING
from pyarrow import parquet
from torch.distributed.checkpoint import FileSystemReader

Put = Callable[[Path], None]  # takes a copy of make()'s folder
EVALUATE = "--load {in}/run --context-lengths 32 --data-path {clean}/corpus_text_document"
TOKENIZE = (
    "preprocess --input {clean}/corpus.jsonl --output-prefix {out}/again --append-eod "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {in}/tokenizer"
)
SAMPLES = (
    f"pretrain {SHAPE} {TRAINING} --train-iters 2 --save {{out}} --materialized {{in}}/samples"
)
LOADERS = (
    f"{CONVERT} --loader megatron --saver hf --load-dir {{in}}/run",
    f"{CONVERT} --loader megatron --saver hf --load-dir {{in}}/run --no-verify",
    "inspect {in}/run",
    "inspect --verify {in}/run",
    "inspect --diff --values {in}/run {clean}/run",
    RESUME,
    f"{RESUME} --load-fallback",
    f"{RESUME} --finetune",
    RESUME.replace("--load {in}", "--pretrained-checkpoint {in}"),
    f"evaluate-perplexity {EVALUATE} --max-documents 2",
    f"evaluate-passkey {EVALUATE} --trials 1",
    "verify --megatron {in}/run --hf {clean}/hf",
)


def from_(loader: str, *more: str) -> tuple[str, ...]:
    folder = {"megatron": "legacy"}.get(loader, loader)
    saver = "megatron" if loader == "hf" else "hf"
    line = f"{CONVERT} --loader {loader} --saver {saver} --load-dir {{in}}/{folder}"
    return (line, f"{line} --no-verify", f"inspect {{in}}/{folder}", *more)


@dataclass(frozen=True)
class Case:
    """Something hostile in one place.

    Attributes:
        kind: for the table.
        put: puts it into a copy of the folder of make().
        programs: what reads it; {in} is the copy.
        harmless: whether a program may pass it over.
    """

    kind: str
    name: str
    put: Put
    programs: tuple[str, ...]
    harmless: bool = False


def cases(clean: Path, marker: Path, large: bool) -> Iterator[Case]:
    """All cases.

    Args:
        marker: a folder that code makes if it is executed.
        large: whether what unpacks makes 10 GB, instead of 1.
    """
    yield from _pickles(marker)
    yield from _code_of_folders(marker)
    yield from _headers()
    yield from _configs()
    yield from _wrong_types(clean, None if large else 40)
    yield from _texts(10 if large else 1)


# ------------------------------------------------------------------------------------- pickled code


def payloads(marker: Path) -> dict[str, object]:
    """Objects whose unpickling, without care, makes the marker."""
    path = str(marker)
    inner = pickle.dumps(_Calls(os.mkdir, path))
    return {
        "os.mkdir": _Calls(os.mkdir, path),
        "eval": _Calls(eval, f"__import__('os').mkdir({path!r})"),
        "subprocess.run": _Calls(subprocess.run, ["mkdir", path]),
        "a pickle inside torch's storage": _Calls(torch.storage._load_from_bytes, inner),
        "functools.reduce": _Calls(functools.reduce, os.makedirs, [path, 0o777]),
    }


class _Calls:
    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _pickles(marker: Path) -> Iterator[Case]:
    for name, payload in payloads(marker).items():
        kind = "code in pickles"

        def in_metadata(folder: Path, payload=payload) -> None:
            path = folder / "run" / "iter_0000002"
            metadata = FileSystemReader(path).read_metadata()
            metadata.planner_data = payload
            (path / ".metadata").write_bytes(pickle.dumps(metadata))

        yield Case(kind, f"{name} in .metadata", in_metadata, LOADERS)

        def in_common(folder: Path, payload=payload) -> None:
            file = folder / "run" / "iter_0000002" / "common.pt"
            torch.save(torch.load(file, weights_only=False) | {"more": payload}, file)

        yield Case(kind, f"{name} in common.pt", in_common, LOADERS)

        def in_object(folder: Path, payload=payload) -> None:
            """Among the tensors, in every object that is none."""
            path = folder / "run" / "iter_0000002"
            metadata = FileSystemReader(path).read_metadata()
            for where, info in metadata.storage_data.items():
                if where.fqn.startswith(("rng_state", "common_state")) or "_extra_" in where.fqn:
                    with open(path / info.relative_path, "ab") as out:
                        info.offset = out.tell()
                        torch.save([payload], out)
                        info.length = out.tell() - info.offset
            (path / ".metadata").write_bytes(pickle.dumps(metadata))

        yield Case(kind, f"{name} among the tensors", in_object, LOADERS, harmless=True)
        for place, loader in (
            ("legacy/iter_0000002/mp_rank_00/model_optim_rng.pt", "megatron"),
            ("meta/consolidated.00.pth", "meta"),
            ("bin/pytorch_model.bin", "bin"),
        ):

            def in_weights(folder: Path, payload=payload, place=place) -> None:
                content = torch.load(folder / place, weights_only=False)
                torch.save(content | {"more": payload}, folder / place)

            def bare(folder: Path, payload=payload, place=place) -> None:
                (folder / place).write_bytes(pickle.dumps(payload))

            programs = from_(loader)
            if loader == "bin":
                programs = tuple(
                    words.replace("--loader bin --saver hf", "--loader hf --saver megatron")
                    for words in programs
                )
            # inspect opens no file of weights whose names and shapes lie elsewhere
            yield Case(kind, f"{name} in {place}", in_weights, programs)
            yield Case(kind, f"{name} as {place}", bare, programs)


# -------------------------------------------------------------------------------- code beside files


def _code_of_folders(marker: Path) -> Iterator[Case]:
    kind = "code beside weights"
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Thing:\n    pass\n"
    tokenize = TOKENIZE.replace("{in}/tokenizer", "{in}/hf")

    def auto_map(folder: Path) -> None:
        for file in ("config.json", "tokenizer_config.json"):
            names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
            _edit(folder / "hf" / file, auto_map=dict.fromkeys(names, "thing.Thing"))
        _edit(folder / "hf" / "tokenizer_config.json", tokenizer_class="Thing")
        (folder / "hf" / "thing.py").write_text(code, encoding="utf-8")

    yield Case(kind, "auto_map", auto_map, (*from_("hf"), tokenize), harmless=True)

    def unknown_model(folder: Path) -> None:
        auto_map(folder)
        _edit(folder / "hf" / "config.json", model_type="thing", architectures=["Thing"])

    yield Case(kind, "auto_map of an unknown model", unknown_model, from_("hf"))

    def template(folder: Path) -> None:
        line = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}"
        _edit(folder / "hf" / "tokenizer_config.json", chat_template=line)

    yield Case(kind, "a chat template", template, (*from_("hf"), tokenize), harmless=True)

    def run_config(folder: Path) -> None:
        path = folder / "run" / "iter_0000002"
        common = torch.load(path / "common.pt", weights_only=False)
        del common["args"], common["pose_megatron"]
        torch.save(common, path / "common.pt")
        line = f"model: !!python/object/apply:os.mkdir [{str(marker)!r}]\n"
        (path / "run_config.yaml").write_text(line, encoding="utf-8")

    yield Case(kind, "run_config.yaml", run_config, LOADERS)

    def run_yaml(folder: Path) -> None:
        line = f"lr: !!python/object/apply:os.mkdir [{str(marker)!r}]\n"
        (folder / "run.yaml").write_text(line, encoding="utf-8")

    yield Case(kind, "run.yaml", run_yaml, (f"{TRAIN} --config {{in}}/run.yaml",))

    def link(folder: Path) -> None:
        """A secret of this machine that an export would carry away."""
        secret = folder / "secret.json"
        secret.write_text("{}", encoding="utf-8")
        for place in ("run/tokenizer", "hf"):
            file = folder / place / "tokenizer_config.json"
            file.unlink()
            file.symlink_to(secret)

    yield Case(kind, "a link out of the folder", link, (LOADERS[0], from_("hf")[0]))


# ------------------------------------------------------------------------------------------ headers


def _headers() -> Iterator[Case]:
    kind = "headers"
    header: dict[str, object] = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    for name, content in {
        "a header of 2^62 bytes": struct.pack("<Q", 1 << 62) + b"{}",
        "a header of 900 MB": struct.pack("<Q", 900_000_000) + b"{}",
        "a nested header": _safetensors("[" * 200_000),
        "an offset out of the file": _safetensors(header | {"data_offsets": [0, 1 << 40]}),
        "a negative offset": _safetensors(header | {"data_offsets": [-16, 0]}),
        "a shape of 10^18": _safetensors(header | {"shape": [10**9, 10**9]}),
        "a negative shape": _safetensors(header | {"shape": [-2, -2]}),
        "a shape of words": _safetensors(header | {"shape": ["four"]}),
        "an unknown dtype": _safetensors(header | {"dtype": "F33"}),
        "a list for an entry": _safetensors([1, 2]),
    }.items():

        def weights(folder: Path, content=content) -> None:
            (folder / "hf" / "model.safetensors").write_bytes(content)

        yield Case(kind, f"safetensors: {name}", weights, from_("hf"))
    tokens = ("inspect {in}/corpus_text_document", TRAIN)
    tokens += ("merge --input {in}/corpus_text_document --output-prefix {out}/merged",)
    for name, change in _INDICES.items():

        def index(folder: Path, change=change) -> None:
            change(folder / "corpus_text_document.idx")
            (folder / "corpus_summary.json").unlink()  # its digests see every change

        yield Case(kind, f"token files: {name}", index, tokens)
    for name, values in {"beyond T": 1 << 20, "negative": -1}.items():

        def positions(folder: Path, values=values) -> None:
            file = folder / "samples_positions.bin"
            found = np.fromfile(file, np.int32)
            found[:] = values
            found.tofile(file)

        yield Case(kind, f"samples: positions {name}", positions, (SAMPLES,))
    for loader, place in (
        ("megatron", "legacy/iter_0000002/mp_rank_00/model_optim_rng.pt"),
        ("meta", "meta/consolidated.00.pth"),
    ):

        def expanded(folder: Path, place=place) -> None:
            """A tensor of 10^12 elements, one of which is stored."""
            content = torch.load(folder / place, weights_only=False)
            weights = content.get("model", content)
            for key in list(weights):
                weights[key] = torch.zeros(1).expand(10**6, 10**6)
            torch.save(content, folder / place)

        yield Case(kind, f"{place}: 10^12 elements of one", expanded, from_(loader))

    def chunks(folder: Path) -> None:
        path = folder / "run" / "iter_0000002"
        metadata = FileSystemReader(path).read_metadata()
        for info in metadata.storage_data.values():
            info.offset, info.length = 1 << 60, 1 << 60
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    yield Case(kind, ".metadata: offsets of 2^60", chunks, (*LOADERS[:2], *LOADERS[3:]))

    def outside(folder: Path) -> None:
        path = folder / "run" / "iter_0000002"
        metadata = FileSystemReader(path).read_metadata()
        for info in metadata.storage_data.values():
            info.relative_path = "../../../clean/run/iter_0000002/" + info.relative_path
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    yield Case(kind, ".metadata: files of another folder", outside, (*LOADERS[:2], *LOADERS[3:]))


def _safetensors(entry: object) -> bytes:
    if isinstance(entry, str):
        text = entry
    else:
        text = json.dumps({"model.embed_tokens.weight": entry})
    return struct.pack("<Q", len(text)) + text.encode() + bytes(64)


def _number(offset: int, form: str, value: int) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        struct.pack_into(form, content, offset, value)
        file.write_bytes(content)

    return change


# 9 bytes, version (8), dtype (1), sequences (8), documents (8), lengths (4 each), pointers (8 each)
_INDICES: dict[str, Callable[[Path], None]] = {
    "an unknown version": _number(9, "<Q", 7),
    "an unknown dtype": _number(17, "<B", 200),
    "2^62 sequences": _number(18, "<Q", 1 << 62),
    "2^62 documents": _number(26, "<Q", 1 << 62),
    "a negative length": _number(34, "<i", -5),
    "a length of 2^31 - 1": _number(34, "<i", (1 << 31) - 1),
    "a pointer out of the file": _number(34 + 40 * 4 + 8, "<q", 1 << 50),
    "a negative pointer": _number(34 + 40 * 4 + 8, "<q", -8),
    "documents out of order": _number(34 + 40 * 12 + 8, "<q", 39),
    "a document beyond the end": _number(34 + 40 * 12 + 8, "<q", 1 << 40),
}


# ------------------------------------------------------------------------------------------ configs


def _configs() -> Iterator[Case]:
    kind = "configs"
    nested = "[" * 200_000
    for name, values in {
        "10^9 layers": {"num_hidden_layers": 10**9},
        "10^12 wide": {"hidden_size": 10**12, "head_dim": None},
        "a vocabulary of 10^15": {"vocab_size": 10**15},
        "10^9 heads": {"num_attention_heads": 10**9},
        "a window of 10^30": {"max_position_embeddings": 10**30},
        "a rope base of infinity": {"rope_theta": float("inf"), "rope_parameters": None},
        "layers of words": {"num_hidden_layers": "two"},
        "an object for a number": {"hidden_size": {"a": 1}},
    }.items():

        def config(folder: Path, values=values) -> None:
            _edit(folder / "hf" / "config.json", **values)

        yield Case(kind, f"config.json: {name}", config, from_("hf"))

        def params(folder: Path, values=values) -> None:
            names = {
                "num_hidden_layers": "n_layers",
                "hidden_size": "dim",
                "vocab_size": "vocab_size",
            }
            names |= {"num_attention_heads": "n_heads", "rope_theta": "rope_theta"}
            given = {names[key]: value for key, value in values.items() if key in names}
            _edit(folder / "meta" / "params.json", **given)

        if "window" not in name:
            yield Case(kind, f"params.json: {name}", params, from_("meta"))
    for place, programs in {
        "hf/config.json": from_("hf"),
        "hf/tokenizer_config.json": from_("hf")[:2],
        "hf/tokenizer.json": from_("hf")[:2],
        "meta/params.json": from_("meta"),
        "run/iter_0000002/metadata.json": LOADERS[:2],
        "run/tokenizer/tokenizer_config.json": LOADERS[:2],
        "samples.json": (SAMPLES,),
        "corpus_summary.json": ("inspect {in}/corpus_text_document",),
    }.items():
        for name, content in {
            "nested 200,000 deep": nested,
            "a list": "[]",
            "no JSON": "{'a': 1}",
            "not UTF-8": b'{"a": "\xff\xfe"}',
        }.items():

            def write(folder: Path, place=place, content=content) -> None:
                data = content if isinstance(content, bytes) else content.encode()
                (folder / place).write_bytes(data)

            yield Case(kind, f"{place}: {name}", write, programs)

    def index(folder: Path) -> None:
        (folder / "hf" / "model.safetensors").rename(folder / "hf" / "outside.safetensors")
        shutil.copytree(folder / "hf", folder / "other")
        (folder / "hf" / "outside.safetensors").unlink()
        content = {"weight_map": {"model.embed_tokens.weight": "../other/outside.safetensors"}}
        file = folder / "hf" / "model.safetensors.index.json"
        file.write_text(json.dumps(content), encoding="utf-8")

    yield Case(kind, "an index that points out of its folder", index, from_("hf"))
    for place, words in {
        "run.yaml": f"{TRAIN} --config {{in}}/run.yaml",
        "run/iter_0000002/run_config.yaml": LOADERS[0],
    }.items():

        def laughs(folder: Path, place=place) -> None:
            if "run/" in place:
                _without_args(folder)
            lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
            lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
            (folder / place).write_text("\n".join([*lines, "model: *a11"]), encoding="utf-8")

        yield Case(kind, f"{place}: a billion laughs", laughs, (words,))

        def deep(folder: Path, place=place) -> None:
            if "run/" in place:
                _without_args(folder)
            (folder / place).write_text("model: " + "[" * 50_000, encoding="utf-8")

        yield Case(kind, f"{place}: nested 50,000 deep", deep, (words,))


def _wrong_types(clean: Path, count: int | None) -> Iterator[Case]:
    """Values of other types than are meant, one at a time, in every place of a JSON file; `count`
    of them, or all."""
    found = []
    for place, program in {
        "hf/config.json": from_("hf")[0],
        "hf/tokenizer_config.json": TOKENIZE.replace("{in}/tokenizer", "{in}/hf"),
        "meta/params.json": from_("meta")[0],
        "samples.json": SAMPLES,
        "run/iter_0000002/metadata.json": LOADERS[1],
        "corpus_summary.json": "inspect {in}/corpus_text_document",
    }.items():
        content = json.loads((clean / place).read_text(encoding="utf-8"))
        for path in _paths(content):
            for value in (None, True, -1, 2.5, 10**30, float("nan"), "word", [], [[]], {"a": 1}):
                found.append((place, program, path, value))
    if count is not None:
        found = random.Random(0).sample(found, count)
    for place, program, path, value in found:

        def put(folder: Path, place=place, path=path, value=value) -> None:
            content = json.loads((folder / place).read_text(encoding="utf-8"))
            holder = functools.reduce(lambda inner, key: inner[key], path[:-1], content)
            holder[path[-1]] = value
            (folder / place).write_text(json.dumps(content), encoding="utf-8")

        name = f"{place}: {'.'.join(map(str, path))} = {value!r}"
        yield Case("wrong types", name, put, (program,), harmless=True)


def _paths(content: Any) -> Iterator[tuple]:
    """Of every value inside, the keys that lead to it; of long lists and objects some."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in itertools.islice(items, 40):
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *rest) for rest in _paths(value))


def _without_args(folder: Path) -> None:
    file = folder / "run" / "iter_0000002" / "common.pt"
    common = torch.load(file, weights_only=False)
    torch.save({k: v for k, v in common.items() if k not in ("args", "pose_megatron")}, file)


# -------------------------------------------------------------------------------------------- texts


def _texts(gigabytes: int) -> Iterator[Case]:
    kind = "texts"
    block = b"a" * 10_000_000
    words = (
        "preprocess --output-prefix {{out}}/again --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model {{clean}}/tokenizer --input {{in}}/{}"
    )

    def packed(name: str, pack: Callable[[bytes], bytes]) -> Case:
        def put(folder: Path) -> None:
            with open(folder / name, "wb") as out:
                out.write(pack(b'{"text": "'))
                for _ in range(100 * gigabytes):
                    out.write(pack_once[name])

        pack_once = {name: pack(block)}
        return Case(kind, f"{name}: a line of {gigabytes} GB", put, (words.format(name),))

    yield packed("line.jsonl.gz", gzip.compress)
    yield packed("line.jsonl.zst", zstandard.ZstdCompressor().compress)

    def plain(folder: Path) -> None:
        with open(folder / "line.jsonl", "wb") as out:
            out.write(b'{"text": "')
            out.truncate(gigabytes * 10**9)  # a file with a hole

    yield Case(kind, f"line.jsonl: {gigabytes} GB of zeros", plain, (words.format("line.jsonl"),))

    def rows(folder: Path) -> None:
        """Long rows, each stored once: a dictionary's."""
        text = "word " * 200_000  # 1 MB
        column = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array(np.zeros(1000 * gigabytes, np.int32)), pyarrow.array([text])
        )
        parquet.write_table(pyarrow.table({"text": column}), folder / "rows.parquet")

    yield Case(
        kind,
        f"rows.parquet: {1000 * gigabytes} rows of 1 MB",
        rows,
        (words.format("rows.parquet"),),
        harmless=True,
    )

    def row(folder: Path) -> None:
        text = "word " * (200_000 * 300)
        parquet.write_table(pyarrow.table({"text": [text]}), folder / "row.parquet")

    yield Case(kind, "row.parquet: one row of 300 MB", row, (words.format("row.parquet"),))

    def deep(folder: Path) -> None:
        (folder / "deep.jsonl").write_text('{"text": ' + "[" * 500_000 + "\n", encoding="utf-8")

    yield Case(kind, "deep.jsonl: nested 500,000 deep", deep, (words.format("deep.jsonl"),))
    for name, content in {
        "bytes.jsonl": b'{"text": "\xff\xfe"}\n',
        "number.jsonl": b'{"text": 1e999}\n',
        "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 1000)[:-20],
        "cut.jsonl.zst": zstandard.ZstdCompressor().compress(b'{"text": "a"}\n' * 1000)[:-9],
        "noise.parquet": b"PAR1" + bytes(range(256)) + b"PAR1",
    }.items():

        def write(folder: Path, name=name, content=content) -> None:
            (folder / name).write_bytes(content)

        yield Case(kind, name, write, (words.format(name),))


def _edit(file: Path, **values: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps(content), encoding="utf-8")
