"""PoSE's samples for pretrain(), and one micro-batch on every rank."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import get_args

from pose_megatron.config.sampler import build_sampler, non_default_flags
from pose_megatron.data.batch import distribute, fields_here
from pose_megatron.data.dataset import DEFAULT_SPLIT, Datasets, build_datasets
from pose_megatron.errors import ConfigError
from pose_megatron.megatron.flags import arguments_of
from pose_megatron.preprocessing.tokenizer import Tokenizer, build_tokenizer

# Kinds of --tokenizer-type that our reader of texts knows.
_TOKENIZERS = ("HuggingFaceTokenizer", "SentencePieceTokenizer")


def train_valid_test_datasets_provider(
    samples: tuple[int, int, int], vp_stage: int | None = None
) -> Datasets:
    """Skip-wise training samples, and plain ones for validation and test.

    Args:
        samples: how many of each pretrain() needs.
        vp_stage: this rank's model chunk in an interleaved pipeline.

    Raises:
        ConfigError: flags, a corpus or a split that cannot be used.
    """
    args = get_args()
    ours = arguments_of(args)
    record = args.pose_megatron.get("model") or args.pose_megatron["rope"]
    train, valid, test = samples
    if not _has_test_documents(ours.data):
        test = 0  # pretrain() asks for them whenever there is --eval-iters
    return build_datasets(
        ours.data,
        build_sampler(ours, args.max_position_embeddings, _tokenizer(args)),
        record["vocab_size"],
        train,
        valid if args.eval_iters else 0,
        positions_only="tokens" not in fields_here(vp_stage),
        test_samples=test,
        materialized_as=non_default_flags(ours.position),
    )


# pretrain() then calls it on every rank; megatron-core's builder has barriers.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def _has_test_documents(data) -> bool:
    if data.train_data_path or data.valid_data_path or data.test_data_path:
        return bool(data.test_data_path)
    share = (data.split or DEFAULT_SPLIT).rpartition(",")[2]
    return share.strip() not in ("0", "0.0")


def _tokenizer(args) -> Tokenizer | None:
    """For --pose-boundaries that are texts."""
    if not args.pose_boundaries or args.tokenizer_type not in _TOKENIZERS:
        return None
    return build_tokenizer(args.tokenizer_type, args.tokenizer_model)


def get_batch(
    iterator: Iterator[dict[str, Any]] | None, vp_stage: int | None = None
) -> dict[str, torch.Tensor | None]:
    """`micro_batch` of the sizes that Megatron's flags give."""
    args = get_args()
    return micro_batch(iterator, args.micro_batch_size, args.seq_length, vp_stage)


def micro_batch(
    iterator: Iterator[dict[str, Any]] | None,
    micro_batch_size: int,
    seq_length: int,
    vp_stage: int | None = None,
) -> dict[str, torch.Tensor | None]:
    """The next micro-batch on this rank: tokens, labels, loss_mask and position_ids as int64
    [b, L / cp], or None where the pipeline stage does not need it. Position ids go to every stage.

    Raises:
        ConfigError: the dataset gives no position ids, or lacks another field.
    """
    fields, packed = fields_here(vp_stage), None
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        assert iterator is not None, "tensor-parallel rank 0 loads"
        sample = next(iterator)
        for name in fields:
            if name not in sample:
                raise ConfigError(
                    f"the batch has no {name}: hand pretrain() "
                    "pose_megatron.megatron.train_valid_test_datasets_provider, or a dataset with "
                    f"{', '.join(fields)} of [seq_length] values each"
                )
        packed = torch.stack([sample[name].long() for name in fields]).cuda(non_blocking=True)
    return distribute(packed, fields, (len(fields), micro_batch_size, seq_length))
