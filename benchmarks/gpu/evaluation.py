"""Perplexity by position at long contexts: the time of a document, and the peak of its memory."""

import gc
import time
from collections.abc import Iterator

import torch
import trainers
from shapes import Scale

from pose_megatron.config.arguments import parse
from pose_megatron.config.model import resolve_model
from pose_megatron.evaluation.megatron_reader import MegatronReader
from pose_megatron.evaluation.perplexity import Perplexities
from pose_megatron.evaluation.record import Record
from pose_megatron.models.build import build_model, transformer_config
from pose_megatron.runtime import distributed

CHUNK = 4096  # tokens of one forward pass


def rows(scale: Scale) -> Iterator[dict]:
    """A document of each length, read once to warm up and once for the figures."""
    shape, longest = scale.reader, max(scale.lengths)
    args = parse(shape.flags(scale.windows[0], longest, layers=shape.layers[0]), trains=False)
    model = resolve_model(args.model, args.data.seq_length, None, None)
    distributed.initialize()
    # Fresh weights, as megatron-core draws them on the device: time and memory know no others.
    stage = build_model(transformer_config(model, bf16=True), model).eval()
    reader = MegatronReader(stage, model.vocab_size, min(CHUNK, scale.lengths[0] // 2))
    for length in scale.lengths:
        try:
            yield {"tokens": length, **_read(reader, length, model.vocab_size)}
        except torch.OutOfMemoryError:
            yield {"tokens": length, "error": "out of memory"}
        reader.begin(1, 0)
        gc.collect()
        torch.cuda.empty_cache()


def _read(reader: MegatronReader, length: int, vocabulary: int) -> dict:
    document = torch.randint(vocabulary, (length + 1,), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        trainers.synchronize()
        start = time.perf_counter()
        list(Perplexities(reader, [document], [length], Record(None, {}, [])).by_position())
        trainers.synchronize()
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens_per_second": length / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
