"""Reading with a Megatron checkpoint, under any TP x PP x CP: megatron-core's own forward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from pose_megatron.evaluation.kept_attention import KeptAttention, Place
from pose_megatron.evaluation.reading import UNASKED, Reader, Scores, first_asked, score
from pose_megatron.models.gpt import PoseModel
from pose_megatron.runtime.device import device

_SCORED_AT_ONCE = 1024  # tokens whose logits stand in memory together


class MegatronReader(Reader):
    """A model's stages on the ranks of a job; all of them call its methods alike.

    Chunks are the micro-batches of megatron-core's schedule, so the stages of a pipeline read one
    chunk each. Data-parallel replicas know nothing of each other.

    Args:
        stage: this rank's, in evaluation mode and without sequence parallelism. It becomes the
            reader's: its attention remembers, and its output layer scores.
        vocab_size: columns beyond it, which pad the vocabulary, are no tokens.
    """

    def __init__(self, stage: PoseModel, vocab_size: int, batch_tokens: int):
        super().__init__(vocab_size, batch_tokens)
        self._stage, self._place = stage, Place()
        self._attention = []
        for layer in stage.decoder.layers:
            attention = layer.self_attention
            attention.core_attention = KeptAttention(attention.core_attention, self._place)
            self._attention.append(attention.core_attention)
        if stage.post_process:
            stage.output_layer = ScoringHead(stage.output_layer, vocab_size)
        self.multiple = parallel_state.get_context_parallel_world_size()

    def _begin(self, rows: int, tokens: int) -> None:
        for attention in self._attention:
            attention.forget()
        self._place.capacity = -(-tokens // self.multiple)
        rotary = self._stage.rotary_pos_emb
        if rotary.scaling.depends_on_length:
            rotary.set_length(tokens)

    def _read(self, chunks: Sequence[tuple[Tensor, Tensor]], start: int) -> list[Scores]:
        scores: list[Scores] = []
        for _, alike in groupby(chunks, key=lambda chunk: chunk[0].size(1)):
            batch = list(alike)
            scores += self._run(batch, start)
            start += sum(tokens.size(1) for tokens, _ in batch)
        return scores

    @torch.no_grad()
    def _run(self, chunks: Sequence[tuple[Tensor, Tensor]], start: int) -> list[Scores]:
        """Chunks of one length, through megatron-core's schedule."""
        rows, n = chunks[0][0].shape
        parts = self.multiple
        padded = -(-n // parts) * parts
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=_parts(chunks, start, padded, parts),
            model=self._stage,
            num_microbatches=len(chunks),
            seq_length=padded,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if self._stage.post_process:
            here = torch.stack(reports)
        else:
            shape = (len(chunks), rows, padded // parts, 2)
            here = torch.empty(shape, dtype=torch.float64, device=device())
        whole = _over_ranks(here)[:, :, :n]
        return [Scores(chunk[..., 0].float(), chunk[..., 1].long()) for chunk in whole]

    def _forward_step(self, data_iterator: Iterator["_Part"], model: PoseModel):
        part = next(data_iterator)
        self._place.before = part.before
        if model.post_process:
            model.output_layer.labels, model.output_layer.first = part.labels, part.first
        output = model(part.tokens, part.position_ids, None)
        if model.pre_process:
            self.progress(part.tokens.numel() * self.multiple)
        return output, lambda scores, non_loss_data: scores


@dataclass(frozen=True)
class _Part:
    """This context rank's part of a chunk.

    Attributes:
        tokens, labels, position_ids: [b, s].
        first: the first column of labels that holds one, found before a GPU would be waited for.
        before: how many tokens of the rank stand before it.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    first: int
    before: int


def _parts(chunks, start: int, padded: int, parts: int) -> Iterator[_Part]:
    rank, s = parallel_state.get_context_parallel_rank(), padded // parts
    here = slice(rank * s, (rank + 1) * s)
    for tokens, labels in chunks:
        missing = (0, padded - tokens.size(1))
        positions = torch.arange(start, start + padded, device=device()).expand(len(tokens), -1)
        own = F.pad(labels, missing, value=UNASKED)[:, here]
        yield _Part(
            F.pad(tokens, missing)[:, here].to(device()),
            own.to(device()),
            positions[:, here],
            first_asked(own),
            start // parts,
        )
        start += tokens.size(1)


def _over_ranks(here: Tensor) -> Tensor:
    """The last stage's [m, b, s, 2] of each context rank -> [m, b, cp*s, 2] on every rank."""
    p = parallel_state
    if p.get_pipeline_model_parallel_world_size() > 1:
        last = p.get_pipeline_model_parallel_last_rank()
        dist.broadcast(here, last, p.get_pipeline_model_parallel_group())
    ranks = p.get_context_parallel_world_size()
    if ranks == 1:
        return here
    parts = [torch.empty_like(here) for _ in range(ranks)]
    dist.all_gather(parts, here, p.get_context_parallel_group())
    return torch.cat(parts, dim=2)


class ScoringHead(torch.nn.Module):
    """An output layer that says of each label what its logits say, in place of the logits.

    Attributes:
        labels: of the micro-batch in hand, int64 [b, s].
        first: its first column that holds one; s where none does.
    """

    labels: Tensor
    first: int

    def __init__(self, layer: torch.nn.Module, vocab_size: int):
        super().__init__()
        self.layer, self._vocab_size = layer, vocab_size
        self.sequence_parallel = False  # GPTModel asks

    @property
    def weight(self) -> Any:
        return self.layer.weight

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **_) -> tuple[Tensor, None]:
        """Hidden states [s, b, h] -> loss and best token as float64 [s, b, 2]."""
        group = parallel_state.get_tensor_model_parallel_group()
        scores = torch.zeros(*hidden.shape[:2], 2, dtype=torch.float64, device=hidden.device)
        for start in range(self.first, len(hidden), _SCORED_AT_ONCE):
            here = slice(start, start + _SCORED_AT_ONCE)
            logits, _ = self.layer(hidden[here], weight=weight)
            first_id = group.rank() * logits.size(-1)
            tokens = max(min(logits.size(-1), self._vocab_size - first_id), 0)
            found = score(logits[..., :tokens], self.labels[:, here].t(), first_id, group)
            scores[here, :, 0], scores[here, :, 1] = found.loss, found.best
        return scores, None
