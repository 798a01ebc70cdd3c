"""Three formats behind one interface: a source reads rows of the conversion table, a sink writes
them. What is in memory at a time is the row that is read and the row that is written.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pose_megatron.checkpoints import meta
from pose_megatron.checkpoints.huggingface import config_json, shards
from pose_megatron.checkpoints.mapping import (
    ParamMapping,
    check_hf,
    check_megatron,
    one_dtype,
    param_mappings,
)
from pose_megatron.checkpoints.megatron import torch_dist
from pose_megatron.checkpoints.tensor_files import size
from pose_megatron.errors import ConfigError
from pose_megatron.models.families import family_as_llama, family_named
from pose_megatron.models.shape import ModelConfig

FORMATS = ("hf", "megatron", "meta")


class Source:
    """A model on disk, row by row; all names and shapes are checked when it is opened.

    Args:
        format: of FORMATS.
        iteration: megatron: which one, None for the latest.
        window: meta: max_position_embeddings, None for the published model's.
        make_vocab_size_divisible_by: hf, meta: of the embedding's padding.
        as_llama: makes of a Baichuan2 the LLaMA that computes the same: the rows of its head have
            length one already. Its own code cannot interpolate, LLaMA's can.

    Attributes:
        model: shape and rope.
        rows: the table.
        by_row: whether it stores the rows themselves, padding included.
        dtypes: by the rows' names.
        tokenizer: folder where its tokenizer may be.
        hashes: (algorithm, digest) of files that came with one.
        warnings: what is odd and harms nothing.

    Raises:
        ConfigError: it is missing, damaged, incomplete, or no model of ours.
    """

    def __init__(
        self,
        format: str,
        folder: Path,
        iteration: int | None = None,
        window: int | None = None,
        make_vocab_size_divisible_by: int = 128,
        as_llama: bool = False,
    ):
        self.folder, self.tokenizer = folder, folder
        if format == "megatron":
            self._tensors = torch_dist.open_weights(folder, iteration)
            self.model, self.tokenizer = self._tensors.model, folder / "tokenizer"
        elif format == "meta":
            self._tensors = meta.Tensors(folder)
            with config_json.naming(folder):
                self.model = meta.read_config(self._tensors, window, make_vocab_size_divisible_by)
        else:
            self.model = config_json.read_config(folder, make_vocab_size_divisible_by)
            self._tensors = shards.Tensors(folder)
        self.hashes = getattr(self._tensors, "hashes", {})
        self.warnings = getattr(self._tensors, "warnings", [])
        self.by_row = format == "megatron"
        with config_json.naming(folder):
            sizes = config_json.sizes(self.model)
            self.rows = list(param_mappings(**sizes))
            shapes, dtypes = self._tensors.shapes, self._tensors.dtypes
            if self.by_row:
                check_megatron(shapes, self.rows)
                self.dtypes = dict(dtypes)
            else:
                self._check_heads(check_hf(shapes, self.rows, sizes["tied"]))
                self.dtypes = {
                    row.name: one_dtype(row, (dtypes[part] for part in row.parts))
                    for row in self.rows
                }
            self._own_rows = {row.name: row for row in self.rows}
            self._family = family_named(self.model.family) if as_llama else None
            if as_llama:
                llama = family_as_llama(self.model.family)
                self.model = dataclasses.replace(self.model, family=llama)
                self.rows = list(param_mappings(**config_json.sizes(self.model)))

    def _check_heads(self, heads: Iterable[str]) -> None:
        (embedding,) = self.rows[0].parts
        for head in heads:
            if self._tensors.shapes[head] != self._tensors.shapes[embedding] or not torch.equal(
                self._tensors[head], self._tensors[embedding]
            ):
                raise ConfigError(f"the embeddings are tied, but {head} differs from {embedding}")

    def read(self, row: ParamMapping, out: Tensor) -> Tensor:
        """Fills `out` with Megatron's tensor of the row."""
        if self.by_row:
            self._tensors.read(row.name, out)
        else:
            self._own_rows[row.name].join(self._tensors.read, out)
        if self._family:
            self._family.weight_as_llama(row.name, out)
        return out


class HuggingFaceSink:
    """safetensors, a file for each of `jobs`.

    Attributes:
        jobs: rows that are to be written together, in one process.
    """

    def __init__(
        self,
        folder: Path,
        rows: list[ParamMapping],
        dtypes: Mapping[str, torch.dtype],
        shard_bytes: int,
    ):
        self.folder, self._dtypes = folder, dtypes
        items = {name: dtype.itemsize for name, dtype in dtypes.items()}
        self.jobs = shards.plan(rows, items, shard_bytes)

    def write(self, number: int, tensors: Iterable[tuple[ParamMapping, Tensor]]) -> None:
        """Writes job `number`."""
        path = self.folder / shards.name_of(number, len(self.jobs))
        with shards.create(path, self.jobs[number], self._dtypes) as file:
            for row, tensor in tensors:
                for name, pieces in row.pieces(tensor).items():
                    file.put(name, *pieces)

    def finish(self, results: list) -> None:
        """Once, when all jobs are written; `results` is what they returned."""
        shards.write_index(self.folder, self.jobs, self._dtypes)


class MegatronSink:
    """A torch_dist checkpoint named `release`, a file for each of `ranks` processes."""

    def __init__(
        self,
        folder: Path,
        rows: list[ParamMapping],
        dtypes: Mapping[str, torch.dtype],
        model: ModelConfig,
        ranks: int,
    ):
        self.folder, self._model = folder, model
        whole = sum(size(dtypes[row.name], row.shape) for row in rows)
        self.jobs, done = [[] for _ in range(ranks)], 0
        for row in rows:
            self.jobs[min(done * ranks // whole, ranks - 1)].append(row)
            done += size(dtypes[row.name], row.shape)
        self.jobs = [job for job in self.jobs if job]

    def write(self, number: int, tensors: Iterable[tuple[ParamMapping, Tensor]]) -> list:
        with torch_dist.Writer(self.folder, number) as file:
            for row, tensor in tensors:
                file.put(row.name, tensor)
        return file.places

    def finish(self, results: list) -> None:
        torch_dist.finish(
            self.folder, self._model, [place for places in results for place in places]
        )


class MetaSink:
    """consolidated.NN.pth for `ranks` tensor-parallel ranks of Meta's code."""

    def __init__(
        self,
        folder: Path,
        rows: list[ParamMapping],
        dtypes: Mapping[str, torch.dtype],
        model: ModelConfig,
        ranks: int,
    ):
        self.folder, self._model, self._ranks = folder, model, ranks
        self.jobs = [rows] * ranks
        parts = [
            (part, shape, dtypes[row.name]) for row in rows for part, shape in row.parts.items()
        ]
        self._shapes = {part: shape for part, shape, _ in parts}
        self._dtypes = {part: dtype for part, _, dtype in parts}
        self._tied = not model.untie_embeddings_and_output_weights
        if self._tied:  # Meta's code has a head of its own all the same
            for of in (self._shapes, self._dtypes):
                of["lm_head.weight"] = of["model.embed_tokens.weight"]

    def write(self, number: int, tensors: Iterable[tuple[ParamMapping, Tensor]]) -> None:
        with meta.Writer(
            self.folder, self._model, self._shapes, self._dtypes, number, self._ranks
        ) as file:
            for row, tensor in tensors:
                for name, pieces in row.pieces(tensor).items():
                    part = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
                    file.put(name, part)
                    if self._tied and name == "model.embed_tokens.weight":
                        file.put("lm_head.weight", part)

    def finish(self, results: list) -> None:
        pass


def read_ahead(
    source: Source,
    rows: Iterable[ParamMapping],
    dtypes: Mapping[str, torch.dtype],
    look: Callable[[ParamMapping, Tensor], None] = lambda row, tensor: None,
    buffers: int = 2,
) -> Iterator[tuple[ParamMapping, Tensor]]:
    """The rows' tensors in `dtypes`; the next one is read while the caller works on this one.

    A tensor is the caller's until it asks for the next one.

    Args:
        look: called with each.
        buffers: of the size of the largest row. With one, nothing is read ahead.
    """
    rows = list(rows)
    largest = max(size(source.dtypes[row.name], row.shape) for row in rows)
    free, ready = queue.Queue(), queue.Queue()
    for _ in range(buffers):  # used again and again: fresh memory costs as much as reading does
        free.put(torch.empty(largest, dtype=torch.uint8))

    def produce() -> None:
        try:
            for row in rows:
                if (buffer := free.get()) is None:
                    return
                dtype = source.dtypes[row.name]
                out = buffer[: size(dtype, row.shape)].view(dtype).view(row.shape)
                tensor = source.read(row, out).to(dtypes[row.name])
                look(row, tensor)
                ready.put((row, tensor, buffer))
        except BaseException as error:  # the caller's to raise
            ready.put(error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        for _ in rows:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            row, tensor, buffer = item
            yield row, tensor
            free.put(buffer)
    finally:
        free.put(None)
        thread.join()


def differing(one: Tensor, other: Tensor) -> bool:
    """Whether a bit differs; NaN is like itself."""
    return one.dtype != other.dtype or not torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def count_nonfinite(tensor: Tensor) -> int:
    """Values that are NaN or infinite."""
    wide = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
    if torch.isfinite(tensor.sum(dtype=wide)):
        return 0
    return int((~torch.isfinite(tensor)).sum())
