"""Headers, configs and texts that ask for too much, nest too deeply or have wrong types."""

import functools
import gzip
import itertools
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
import zstandard
from hostile import ITERATION, Case, edit, edited_metadata, without_args
from programs import (
    INSPECT_TOKENS,
    MERGE,
    RUN_READERS,
    SAMPLES,
    TOKENIZE,
    TRAIN,
    convert,
    readers,
)
from pyarrow import parquet


def files(clean: Path, large: bool) -> Iterator[Case]:
    """All cases; `large` are those that unpack to 10 GB, instead of 1, and all wrong types."""
    yield from _headers()
    yield from _configs()
    yield from _wrong_types(clean, None if large else 40)
    yield from _texts(10 if large else 1)


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

        yield Case(kind, f"safetensors: {name}", weights, readers("hf", "hf"))
    tokens = (INSPECT_TOKENS, MERGE, TRAIN)
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
    for place, programs in {
        "legacy/iter_0000002/mp_rank_00/model_optim_rng.pt": readers("legacy", "megatron"),
        "meta/consolidated.00.pth": readers("meta", "meta"),
    }.items():

        def expanded(folder: Path, place=place) -> None:
            """A tensor of 10^12 elements, one of which is stored."""
            content = torch.load(folder / place, weights_only=False)
            weights = content.get("model", content)
            for key in list(weights):
                weights[key] = torch.zeros(1).expand(10**6, 10**6)
            torch.save(content, folder / place)

        yield Case(kind, f"{place}: 10^12 elements of one", expanded, programs)

    def chunks(folder: Path) -> None:
        with edited_metadata(folder) as metadata:
            for info in metadata.storage_data.values():
                info.offset, info.length = 1 << 60, 1 << 60

    yield Case(kind, ".metadata: offsets of 2^60", chunks, RUN_READERS)

    def outside(folder: Path) -> None:
        with edited_metadata(folder) as metadata:
            for info in metadata.storage_data.values():
                info.relative_path = f"../../../clean/{ITERATION}/{info.relative_path}"

    yield Case(kind, ".metadata: files of another folder", outside, RUN_READERS)


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
            edit(folder / "hf" / "config.json", **values)

        yield Case(kind, f"config.json: {name}", config, readers("hf", "hf"))

        def params(folder: Path, values=values) -> None:
            names = {
                "num_hidden_layers": "n_layers",
                "hidden_size": "dim",
                "vocab_size": "vocab_size",
            }
            names |= {"num_attention_heads": "n_heads", "rope_theta": "rope_theta"}
            given = {names[key]: value for key, value in values.items() if key in names}
            edit(folder / "meta" / "params.json", **given)

        if "window" not in name:
            yield Case(kind, f"params.json: {name}", params, readers("meta", "meta"))
    for place, programs in {
        "hf/config.json": readers("hf", "hf"),
        "hf/tokenizer_config.json": readers("hf", "hf")[:2],
        "hf/tokenizer.json": readers("hf", "hf")[:2],
        "shards/model.safetensors.index.json": readers("shards", "hf"),
        "meta/params.json": readers("meta", "meta"),
        "run/iter_0000002/metadata.json": RUN_READERS[:2],
        "run/tokenizer/tokenizer_config.json": RUN_READERS[:2],
        "samples.json": (SAMPLES,),
        "corpus_summary.json": (INSPECT_TOKENS,),
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

    yield Case(kind, "an index that points out of its folder", index, readers("hf", "hf"))
    for place, words in {
        "run.yaml": f"{TRAIN} --config {{in}}/run.yaml",
        "run/iter_0000002/run_config.yaml": convert("run", "megatron"),
    }.items():

        def laughs(folder: Path, place=place) -> None:
            if "run/" in place:
                without_args(folder)
            lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
            lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
            (folder / place).write_text("\n".join([*lines, "model: *a11"]), encoding="utf-8")

        yield Case(kind, f"{place}: a billion laughs", laughs, (words,))

        def deep(folder: Path, place=place) -> None:
            if "run/" in place:
                without_args(folder)
            (folder / place).write_text("model: " + "[" * 50_000, encoding="utf-8")

        yield Case(kind, f"{place}: nested 50,000 deep", deep, (words,))


def _wrong_types(clean: Path, count: int | None) -> Iterator[Case]:
    """Values of other types than are meant, one at a time, in every place of a JSON file; `count`
    of them, or all."""
    found: list[tuple] = []
    for place, program in {
        "hf/config.json": convert("hf", "hf"),
        "hf/tokenizer_config.json": TOKENIZE.replace("{in}/tokenizer", "{in}/hf"),
        "shards/model.safetensors.index.json": convert("shards", "hf"),
        "meta/params.json": convert("meta", "meta"),
        "samples.json": SAMPLES,
        "run/iter_0000002/metadata.json": RUN_READERS[1],
        "corpus_summary.json": INSPECT_TOKENS,
    }.items():
        content = json.loads((clean / place).read_text(encoding="utf-8"))
        found += itertools.product([place], [program], _paths(content), _VALUES)
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


_VALUES = (None, True, -1, 2.5, 10**30, float("nan"), "word", [], [[]], {"a": 1})


def _paths(content: Any) -> Iterator[tuple]:
    """Of every value inside, the keys that lead to it; of long lists and objects some."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in itertools.islice(items, 40):
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *rest) for rest in _paths(value))


def _texts(gigabytes: int) -> Iterator[Case]:
    kind = "texts"
    block = b"a" * 10_000_000

    def tokenize(name: str) -> str:
        return TOKENIZE.replace("{clean}/corpus.jsonl", f"{{in}}/{name}")

    def packed(name: str, pack: Callable[[bytes], bytes]) -> Case:
        def put(folder: Path) -> None:
            with open(folder / name, "wb") as out:
                out.write(pack(b'{"text": "'))
                for _ in range(100 * gigabytes):
                    out.write(pack_once[name])

        pack_once = {name: pack(block)}
        return Case(kind, f"{name}: a line of {gigabytes} GB", put, (tokenize(name),))

    yield packed("line.jsonl.gz", gzip.compress)
    yield packed("line.jsonl.zst", zstandard.ZstdCompressor().compress)

    def plain(folder: Path) -> None:
        with open(folder / "line.jsonl", "wb") as out:
            out.write(b'{"text": "')
            out.truncate(gigabytes * 10**9)  # a file with a hole

    yield Case(kind, f"line.jsonl: {gigabytes} GB of zeros", plain, (tokenize("line.jsonl"),))

    def rows(folder: Path) -> None:
        """Long rows, each stored once: a dictionary's."""
        text = "word " * 200_000  # 1 MB
        column = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array(np.zeros(1000, np.int32)), pyarrow.array([text])
        )
        parquet.write_table(pyarrow.table({"text": column}), folder / "rows.parquet")

    yield Case(
        kind,
        "rows.parquet: 1000 rows of 1 MB",
        rows,
        (tokenize("rows.parquet"),),
        harmless=True,
    )

    def row(folder: Path) -> None:
        text = "word " * (200_000 * 300)
        parquet.write_table(pyarrow.table({"text": [text]}), folder / "row.parquet")

    yield Case(kind, "row.parquet: one row of 300 MB", row, (tokenize("row.parquet"),))

    def deep(folder: Path) -> None:
        (folder / "deep.jsonl").write_text('{"text": ' + "[" * 500_000 + "\n", encoding="utf-8")

    yield Case(kind, "deep.jsonl: nested 500,000 deep", deep, (tokenize("deep.jsonl"),))
    for name, content in {
        "bytes.jsonl": b'{"text": "\xff\xfe"}\n',
        "number.jsonl": b'{"text": 1e999}\n',
        "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 1000)[:-20],
        "cut.jsonl.zst": zstandard.ZstdCompressor().compress(b'{"text": "a"}\n' * 1000)[:-9],
        "noise.parquet": b"PAR1" + bytes(range(256)) + b"PAR1",
    }.items():

        def write(folder: Path, name=name, content=content) -> None:
            (folder / name).write_bytes(content)

        yield Case(kind, name, write, (tokenize(name),))
