"""What a run is, in one look, before it starts."""

from pose_megatron.config.layout import Layout
from pose_megatron.data.materialized import read_description
from pose_megatron.runtime.device import describe_device
from pose_megatron.runtime.ranks import print_rank_0
from pose_megatron.training.resume import trained_tokens
from pose_megatron.training.run import Run


def describe(run: Run, layout: Layout) -> None:
    """What this run is, in one look."""
    args, model, sampler = run.args, run.model, run.sampler
    p, t = args.parallel, args.training
    experts = ""
    if model.num_experts is not None:
        experts = (
            f"{model.num_experts} experts of {model.moe_ffn_hidden_size}, "
            f"{model.moe_router_topk} to a token, "
        )
    ep = p.expert_model_parallel_size
    shared = f", experts over {ep} ranks" if ep > 1 else ""
    positions = sampler.describe()
    if args.data.materialized:
        law = read_description(args.data.materialized)["law"]
        positions = f"of {args.data.materialized}: {law}"
    batch = layout.global_batch_size
    print_rank_0(
        f"model      {model.num_parameters:,} parameters: {model.num_layers} layers, hidden "
        f"{model.hidden_size}, ffn {model.ffn_hidden_size}, {model.num_attention_heads} heads, "
        f"{model.num_query_groups} groups, {experts}vocabulary {model.vocab_size} "
        f"(padded {model.padded_vocab_size}), {'bf16' if t.bf16 else 'float32'}\n"
        f"rope       theta {model.rotary_base:g}, {model.rope_scaling}\n"
        f"positions  {positions}\n"
        f"layout     tensor {p.tensor_model_parallel_size} x pipeline "
        f"{p.pipeline_model_parallel_size} x context {p.context_parallel_size} x data "
        f"{layout.data_parallel_size}{shared}, batch {batch} = {t.micro_batch_size} x "
        f"{layout.num_microbatches(batch)} micro-batches x {layout.data_parallel_size}"
        f"{f', from {layout.batch_size(0)} up' if layout.rampup else ''}\n"
        f"device     {describe_device()}\n"
        f"training   {length(run, layout)}, seed {t.seed}"
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


def length(run: Run, layout: Layout) -> str:
    """The steps and tokens of the run, and how much of them a resumed one has done."""
    t, window = run.args.training, run.sampler.window
    if not (t.train_iters or t.train_samples):
        return "0 steps"
    if not (run.loaded and run.resume):
        steps, samples = layout.end(t)
        return f"{steps} steps, {samples * window:,} tokens"
    done, consumed = run.loaded.iteration, run.loaded.consumed_samples
    trained = trained_tokens(run.loaded, window)
    steps, samples = layout.end(t, done, consumed)
    tokens = trained + (samples - consumed) * window
    return (
        f"{steps} steps, {tokens:,} tokens, of which {done} steps and {trained:,} tokens are done"
    )
