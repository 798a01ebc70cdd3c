"""Trains a RoPE language model on L tokens at a time, with positions up to T.

    torchrun --nproc-per-node 2 pretrain_pose.py --help
"""

import logging
import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # orders tensor-parallel overlap

from pose_megatron import cpu

cpu.install()

from pose_megatron import distributed, training
from pose_megatron.arguments import parse
from pose_megatron.batch import fields_here
from pose_megatron.dataset import build_datasets
from pose_megatron.distributed import one_sentence_errors, print_rank_0
from pose_megatron.layout import lay_out
from pose_megatron.materialized import read_description
from pose_megatron.model_config import ModelConfig, resolve_model
from pose_megatron.positions import PoseSampler
from pose_megatron.sampler_flags import asked_for, build_sampler
from pose_megatron.tokenizer import Tokenizer, build_tokenizer


@one_sentence_errors
def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if distributed.rank() == 0:
        logging.getLogger("pose_megatron").setLevel(logging.INFO)

    # The model: its shape is the checkpoint's, where there is one.
    loaded, resume = training.starting_point(args.checkpoint)
    tokenizer = build_tokenizer_of(args)
    config = resolve_model(
        args.model, args.data.seq_length, loaded and loaded.model,
        tokenizer and tokenizer.vocab_size,
    )
    layout = lay_out(args, config, distributed.world_size())
    sampler = build_sampler(args, config.max_position_embeddings, tokenizer)
    describe(args, config, layout, sampler)
    if args.logging.dry_run:
        return

    distributed.initialize(args.parallel, args.training.seed, config.num_layers)

    # The corpus: skip-wise positions for training, plain ones for validation.
    samples = training.samples_needed(args.training, layout, loaded if resume else None)
    validations = args.logging.eval_iters if args.logging.eval_interval else 0
    tests = args.logging.eval_iters if args.data.test_data_path else 0
    positions_only = "tokens" not in fields_here()
    train_set, valid_set, test_set = build_datasets(
        args.data, sampler, config.vocab_size, samples, validations * layout.global_batch_size,
        positions_only, tests * layout.global_batch_size, asked_for(args.position),
    )

    trainer = training.setup(args, config, layout, loaded, resume)
    training.train(trainer, train_set, valid_set, test_set)


def build_tokenizer_of(args) -> Tokenizer | None:
    if args.data.tokenizer_model is None:
        return None
    return build_tokenizer(args.data.tokenizer_type, args.data.tokenizer_model)


def describe(args, config: ModelConfig, layout, sampler: PoseSampler) -> None:
    """What this run is, in one look."""
    p, t = args.parallel, args.training
    positions = sampler.describe()
    if args.data.materialized:
        law = read_description(args.data.materialized)["law"]
        positions = f"of {args.data.materialized}: {law}"
    steps, samples = layout.end(t) if t.train_iters or t.train_samples else (0, 0)
    batch = layout.global_batch_size
    print_rank_0(
        f"model      {config.num_parameters:,} parameters: {config.num_layers} layers, hidden "
        f"{config.hidden_size}, ffn {config.ffn_hidden_size}, {config.num_attention_heads} heads, "
        f"{config.num_query_groups} groups, vocabulary {config.vocab_size} "
        f"(padded {config.padded_vocab_size}), {'bf16' if t.bf16 else 'float32'}\n"
        f"rope       theta {config.rotary_base:g}, {config.rope_scaling}\n"
        f"positions  {positions}\n"
        f"layout     tensor {p.tensor_model_parallel_size} x pipeline "
        f"{p.pipeline_model_parallel_size} x context {p.context_parallel_size} x data "
        f"{layout.data_parallel_size}, batch {batch} = {t.micro_batch_size} x "
        f"{layout.num_microbatches(batch)} micro-batches x {layout.data_parallel_size}"
        f"{f', from {layout.batch_size(0)} up' if layout.rampup else ''}\n"
        f"training   {steps} steps, {samples * sampler.window:,} tokens, seed {t.seed}"
    )
    if args.data.materialized:
        return
    if args.logging.dry_run and sampler.reads_tokens:
        print_rank_0("plans      depend on the text")
    elif args.logging.dry_run:
        print_rank_0("plans, over a source of 4 L tokens (length @ position <- text):")
        for index in range(3):
            plan = sampler.plan(index, 4 * sampler.window)
            chunks = list(zip(plan.lengths, plan.position_starts, plan.text_starts, strict=True))
            shown = ", ".join(f"{n} @ {u} <- {v}" for n, u, v in chunks[:8])
            print_rank_0(f"  sample {index}: {shown}{', ...' if len(chunks) > 8 else ''}")


if __name__ == "__main__":
    main()
