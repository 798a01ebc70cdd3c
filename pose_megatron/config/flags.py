"""The flags of a run: frozen dataclasses, one for each group.

A field `seq_length` is the flag `--seq-length` and the YAML key `seq-length` (or `seq_length`);
names and meanings are Megatron-LM's wherever it has one: `--seq-length` is the training window L,
`--max-position-embeddings` the target window T.
"""

from dataclasses import dataclass
from typing import Any

from pose_megatron.config.flag import Flags, flag
from pose_megatron.positions.laws import CONTENTS, SAMPLERS, SKIP_LAWS
from pose_megatron.rope.names import METHOD_NAMES
from pose_megatron.runtime.ranges import LARGEST_INT32, LARGEST_SEED, real, whole
from pose_megatron.runtime.startup import DEVICES

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")


_SIZE = whole(1, LARGEST_INT32)
_TINY = 1e-37  # an epsilon that float32 does not round to zero
_YEAR = 365 * 24 * 60  # minutes


@dataclass(frozen=True)
class ModelFlags(Flags):
    """Model; with --load the shape is the checkpoint's, and contradicting flags are errors"""

    num_layers: int | None = flag(None, "transformer layers", within=_SIZE)
    hidden_size: int | None = flag(None, "width of the residual stream", within=_SIZE)
    ffn_hidden_size: int | None = flag(
        None, "width of the SwiGLU MLP (default: 8/3 hidden, in 64s)", within=_SIZE
    )
    num_attention_heads: int | None = flag(None, "query heads", within=_SIZE)
    group_query_attention: bool = flag(False, "share keys and values between query heads")
    num_query_groups: int | None = flag(
        None, "key-value heads, with --group-query-attention", within=_SIZE
    )
    kv_channels: int | None = flag(None, "width of a head (default: hidden / heads)", within=_SIZE)
    vocab_size: int | None = flag(
        None, "tokens in the vocabulary (default: the tokenizer's)", within=_SIZE
    )
    make_vocab_size_divisible_by: int | None = flag(
        None, "pad the vocabulary to a multiple (default: 128)", within=_SIZE
    )
    untie_embeddings_and_output_weights: bool | None = flag(
        None, "separate output layer, as in LLaMA"
    )
    add_qkv_bias: bool | None = flag(None, "biases for queries, keys and values, as in Qwen2")
    qk_layernorm: bool | None = flag(None, "RMSNorm on each query and key head, as in Qwen3")
    num_experts: int | None = flag(
        None,
        "make every MLP a mixture of so many experts, as in Mixtral and Qwen3-MoE",
        within=_SIZE,
    )
    moe_router_topk: int | None = flag(
        None, "experts that a token goes to (default: 2)", within=_SIZE
    )
    moe_ffn_hidden_size: int | None = flag(
        None, "width of an expert (default: --ffn-hidden-size)", within=_SIZE
    )
    moe_router_pre_softmax: bool | None = flag(
        None, "weigh the experts by the softmax over all of them, not over those of the token"
    )
    norm_epsilon: float | None = flag(
        None, "RMSNorm epsilon (default: 1e-5)", within=real(at_least=_TINY, below=1)
    )
    init_method_std: float = flag(0.02, "standard deviation of fresh weights", within=real(above=0))
    max_position_embeddings: int | None = flag(
        None,
        "target window T in tokens (default: the checkpoint's, else --seq-length)",
        within=_SIZE,
    )
    original_max_position_embeddings: int | None = flag(
        None,
        "window before extension (default: the checkpoint's T, else --seq-length)",
        within=_SIZE,
    )
    rotary_base: float | None = flag(None, "RoPE theta (default: 10000)", within=real(above=1))
    rotary_percent: float | None = flag(
        None,
        "share of a head's dimensions that rotate (default: 1.0)",
        within=real(above=0, at_most=1),
    )
    rope_scaling: str | None = flag(None, "interpolation of the rotary frequencies", METHOD_NAMES)
    rope_scaling_factor: float | None = flag(
        None, "default: T / original window", within=real(at_least=1)
    )
    rope_scaling_config: str | None = flag(
        None,
        "the method's other options, a JSON object or a file with one, under Hugging Face's "
        "names: beta_fast, low_freq_factor, long_factor, attention_factor, ...",
        in_yaml=dict,
    )
    transformer_impl: str = flag(
        "torch",
        "torch runs everywhere; transformer_engine needs a GPU and the package",
        ("torch", "transformer_engine"),
    )
    attention_backend: str = flag(
        "auto",
        "kernels of Transformer Engine's attention; torch takes fused ones wherever they run",
        ("auto", "flash", "fused", "unfused"),
    )
    model_class: str = flag(
        "gpt",
        "megatron-core's GPTModel, or its successor HybridModel from 0.19 on: same weights, same "
        "losses, same checkpoints",
        ("gpt", "hybrid"),
    )
    bias_swiglu_fusion: bool = flag(
        True, "fuse SwiGLU on GPUs, which keeps its input only for the backward pass"
    )
    gradient_accumulation_fusion: bool = flag(
        True,
        "with --bf16 on GPUs, add up gradients of weights in float32 by the product that computes "
        "them, without Transformer Engine",
    )
    fused_rotary: str = flag(
        "auto",
        "rotate queries and keys by one kernel, forward and backward; auto: wherever there is a "
        "CUDA device and Triton",
        ("auto", "on", "off"),
    )
    fused_cross_entropy: str = flag(
        "auto",
        "compute the loss by one kernel each way, without a copy of the logits; auto: as above",
        ("auto", "on", "off"),
    )


@dataclass(frozen=True)
class PositionFlags(Flags):
    """Positions of the training samples; validation always uses plain ones"""

    position_sampler: str | None = flag(
        None, f"{', '.join(SAMPLERS)}; full is plain (default: pose when T > L, else full)"
    )
    pose_num_chunks: int = flag(2, "number of chunks N in a window", within=whole(1))
    pose_content: str = flag(
        "uniform",
        "where a chunk's text starts: after a skip of its own (uniform), where the last chunk "
        "ended (contiguous), or after the skip of its positions (aligned)",
        CONTENTS,
    )
    pose_skip_law: str = flag(
        "chain",
        "how skips are drawn: chain (paper, eq. 4) or sorted-uniform (sorted uniform draws; "
        "many chunks do not pile up near T)",
        SKIP_LAWS,
    )
    pose_boundaries: list[str] = flag(
        [],
        "pose-boundary, longrecipe: chunks start after these tokens, each given as its id or as "
        "a text with which it ends (longrecipe's default: . ! ? and newline)",
        nargs="+",
    )
    pose_plain_fraction: float = flag(
        0.0,
        "share of samples with plain positions and contiguous text",
        within=real(at_least=0, at_most=1),
    )
    pose_target_schedule: list[str] = flag(
        [],
        "a growing target, as 'first-sample:target' pairs such as '0:8192 64000:32768 "
        "128000:131072'; the last target is T",
        nargs="+",
    )


@dataclass(frozen=True)
class DataFlags(Flags):
    """Data"""

    data_path: list[str] = flag(
        [], "corpus prefixes, or 'weight prefix weight prefix ...'", nargs="+"
    )
    data_args_path: str | None = flag(
        None, "a file that holds the arguments of --data-path; with # comments and quoted paths"
    )
    train_data_path: list[str] = flag([], "corpora for training only, like --data-path", nargs="+")
    valid_data_path: list[str] = flag([], "corpora for validation only", nargs="+")
    test_data_path: list[str] = flag([], "corpora for a test after the last step", nargs="+")
    split: str | None = flag(
        None, "train,valid,test shares of the documents (default: 969,30,1)", in_yaml=list
    )
    data_cache_path: str | None = flag(
        None,
        "folder for dataset indices, built once and memory-mapped; jobs may share it "
        "(default: in memory)",
    )
    data_mode: str = flag(
        "document",
        "a sample comes from one document, or from all documents packed end to end",
        ("document", "packed"),
    )
    packed_skips: str = flag(
        "document",
        "packed: text skips stay inside a document, or reach up to T tokens along the stream",
        ("document", "stream"),
    )
    materialized: str | None = flag(
        None, "train on the samples that tools/materialize_positions.py wrote at this prefix"
    )
    seq_length: int = flag(2048, "training window L in tokens", within=_SIZE)
    short_documents: str = flag(
        "drop",
        "documents of fewer than L + 1 tokens: drop them, or pack them end to end",
        ("drop", "pack"),
    )
    tokenizer_type: str = flag(
        "HuggingFaceTokenizer",
        "the kind of --tokenizer-model",
        ("SentencePieceTokenizer", "HuggingFaceTokenizer"),
    )
    tokenizer_model: str | None = flag(None, "tokenizer file or folder; copied into checkpoints")
    num_workers: int = flag(
        2, "loader processes per rank; 0 loads in the training process", within=whole(0)
    )


@dataclass(frozen=True)
class TrainingFlags(Flags):
    """Training"""

    micro_batch_size: int = flag(1, "samples per forward pass of a rank", within=_SIZE)
    global_batch_size: int | None = flag(
        None, "samples per step (default: micro x data-parallel ranks)", within=_SIZE
    )
    rampup_batch_size: list[int] = flag(
        [],
        "with --train-samples: first batch size, increment, and the number of samples after "
        "which --global-batch-size is reached",
        nargs=3,
        within=whole(1),
    )
    train_iters: int | None = flag(None, "length of the run in steps", within=whole(1))
    train_samples: int | None = flag(
        None,
        "length of the run in samples, instead of --train-iters; the --lr flags then count "
        "samples, too",
        within=whole(1),
    )
    lr: float = flag(1e-4, "peak learning rate", within=real(at_least=0))
    min_lr: float = flag(0.0, "final learning rate", within=real(at_least=0))
    lr_decay_style: str = flag("cosine", "shape of the decay", LR_DECAY_STYLES)
    lr_decay_iters: int | None = flag(
        None, "steps of decay (default: --train-iters)", within=whole(1)
    )
    lr_decay_samples: int | None = flag(
        None, "samples of decay (default: --train-samples)", within=whole(1)
    )
    lr_warmup_iters: int = flag(0, "steps of linear warm-up", within=whole(0))
    lr_warmup_samples: int = flag(0, "samples of linear warm-up", within=whole(0))
    lr_wsd_decay_iters: int | None = flag(
        None, "with WSD: steps of the final decay", within=whole(1)
    )
    lr_wsd_decay_samples: int | None = flag(
        None, "with WSD: samples of the final decay", within=whole(1)
    )
    lr_wsd_decay_style: str = flag(
        "exponential",
        "with WSD: shape of the final decay",
        ("exponential", "linear", "cosine", "minus_sqrt"),
    )
    weight_decay: float = flag(
        0.01, "decoupled weight decay; norms have none", within=real(at_least=0)
    )
    moe_aux_loss_coeff: float = flag(
        0.0,
        "weight of the loss that spreads the tokens of each micro-batch over the experts",
        within=real(at_least=0),
    )
    clip_grad: float = flag(
        1.0, "clip the gradient to this norm; 0: never", within=real(at_least=0)
    )
    adam_beta1: float = flag(
        0.9, "Adam's decay of the first moment", within=real(at_least=0, below=1)
    )
    adam_beta2: float = flag(
        0.95, "Adam's decay of the second moment", within=real(at_least=0, below=1)
    )
    adam_eps: float = flag(1e-8, "Adam's epsilon", within=real(at_least=_TINY))
    bf16: bool = flag(False, "bfloat16 weights and activations, float32 main copies and gradients")
    seed: int = flag(
        1234, "seed of weights, sample order and positions", within=whole(0, LARGEST_SEED)
    )
    exit_duration_in_mins: float | None = flag(
        None, "save and stop after this many minutes", within=real(above=0, at_most=_YEAR)
    )
    max_skipped_iterations: int = flag(
        5,
        "stop after this many steps in a row with a loss or gradient that is not finite; such "
        "steps change no weight",
        within=whole(1),
    )
    loss_spike_factor: float = flag(
        1.5,
        "name the samples of a step whose loss is above this many times the mean of the last "
        "20 steps; 0: never",
        within=real(above=1, also=0),
    )
    recompute_granularity: str | None = flag(
        None,
        "recompute activations in the backward pass: all of a layer's, or selected ones",
        ("full", "selective"),
    )
    recompute_method: str | None = flag(
        None,
        "with full: recompute groups of layers, or only the first layers",
        ("uniform", "block"),
    )
    recompute_num_layers: int | None = flag(
        None, "with full: layers per group, or number of first layers", within=whole(1)
    )
    recompute_modules: list[str] = flag(
        ["core_attn"],
        "with selective: modules to recompute; mlp gives most memory back, core_attn (the default) "
        "hardly any, as fused attention keeps no scores",
        nargs="+",
    )


@dataclass(frozen=True)
class ParallelFlags(Flags):
    """Layout of the ranks; the remaining factor is data parallelism"""

    tensor_model_parallel_size: int = flag(1, "ranks that share each layer", within=whole(1))
    pipeline_model_parallel_size: int = flag(
        1, "ranks that hold consecutive layers", within=whole(1)
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "interleave the pipeline: layers per model chunk", within=whole(1)
    )
    context_parallel_size: int = flag(1, "ranks that share a sequence", within=whole(1))
    expert_model_parallel_size: int = flag(
        1,
        "ranks, of those with other samples, that share the experts of --num-experts",
        within=whole(1),
    )
    sequence_parallel: bool = flag(
        False, "split the activations between layers over the tensor-parallel ranks"
    )
    use_distributed_optimizer: bool = flag(
        False, "shard the optimizer state over the data-parallel ranks"
    )
    overlap_grad_reduce: bool = flag(False, "reduce gradients during the backward pass")
    overlap_param_gather: bool = flag(
        False, "gather weights during the forward pass; needs the two flags above"
    )
    device: str = flag("auto", "compute on cuda, on the cpu, or on what there is", DEVICES)
    distributed_timeout_minutes: int = flag(
        10, "minutes until a collective gives up", within=whole(1, _YEAR)
    )

    def virtual_pipeline_size(self, num_layers: int) -> int | None:
        """Model chunks per rank; None without interleaving."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        per_rank = num_layers // self.pipeline_model_parallel_size
        return per_rank // self.num_layers_per_virtual_pipeline_stage

    def sizes(self, num_layers: int) -> dict[str, Any]:
        """The layout as megatron-core's sizes, for a model of `num_layers`."""
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline_size(num_layers),
            "context_parallel_size": self.context_parallel_size,
            "expert_model_parallel_size": self.expert_model_parallel_size,
        }


@dataclass(frozen=True)
class CheckpointFlags(Flags):
    """Checkpoints, in Megatron-LM's directory layout"""

    load: str | None = flag(
        None,
        "checkpoint folder, with latest_checkpointed_iteration.txt; may be empty at the first "
        "start of a job whose --save is the same folder",
    )
    save: str | None = flag(None, "folder to write checkpoints (iter_0000000/) into")
    save_interval: int | None = flag(
        None, "steps between saves (default: only at the end)", within=whole(1)
    )
    async_save: bool = flag(False, "write checkpoints in the background")
    save_retain: int | None = flag(
        None, "keep only the newest checkpoints in --save (default: all)", within=whole(1)
    )
    dist_ckpt_optim_fully_reshardable: bool = flag(
        True,
        "with --use-distributed-optimizer: every checkpoint resumes in every layout of ranks, for "
        "which a rank gathers its group's optimizer. Without it only the one at the end or at a "
        "stop does; those on the way are written by all ranks at once",
    )
    load_fallback: bool = flag(
        False, "if the latest checkpoint in --load is damaged, take the one before"
    )
    checksums: bool = flag(
        False, "compare what is loaded with the CRC-32 that the checkpoint holds"
    )
    finetune: bool = flag(False, "take only the weights from --load and start at step 0")
    pretrained_checkpoint: str | None = flag(
        None,
        "take the weights from this folder and start at step 0 while --load holds no checkpoint "
        "yet: a job with the same --load and --save can then be restarted unchanged",
    )


@dataclass(frozen=True)
class LoggingFlags(Flags):
    """Evaluation and log"""

    log_interval: int = flag(10, "steps between log lines", within=whole(1))
    eval_interval: int | None = flag(
        None, "steps between validations (default: never)", within=whole(1)
    )
    eval_iters: int = flag(10, "batches per validation; 0 turns validation off", within=whole(0))
    tensorboard_dir: str | None = flag(None, "write scalars for TensorBoard here")
    wandb_project: str | None = flag(
        None,
        "send scalars to this project of Weights & Biases; WANDB_MODE=offline keeps them on disk",
    )
    wandb_exp_name: str | None = flag(None, "name of the run in Weights & Biases")
    wandb_save_dir: str | None = flag(None, "folder for its files (default: wandb/)")
    log_file: str | None = flag(None, "append one JSON object per log line here")
    dry_run: bool = flag(False, "print the resolved run and exit")


@dataclass(frozen=True)
class Arguments:
    """Everything a run depends on. `model` holds the shape as flags, before `resolve_model`."""

    model: ModelFlags
    position: PositionFlags
    data: DataFlags
    training: TrainingFlags
    parallel: ParallelFlags
    checkpoint: CheckpointFlags
    logging: LoggingFlags
