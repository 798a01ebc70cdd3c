"""What can be asked of a run: frozen dataclasses, one for each group of flags.

A field `seq_length` is the flag `--seq-length` and the YAML key `seq-length` (or `seq_length`);
names and meanings are Megatron-LM's wherever it has one: `--seq-length` is the training window L,
`--max-position-embeddings` the target window T.
"""

from dataclasses import dataclass, field

from pose_megatron.positions.laws import CONTENTS, SAMPLERS, SKIP_LAWS
from pose_megatron.rope.scaling import METHODS

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")


def flag(default, help: str, choices=None, nargs=None):
    """A dataclass field that is a flag."""
    if isinstance(default, list):
        options = {"default_factory": lambda: list(default)}
    else:
        options = {"default": default}
    return field(**options, metadata={"help": help, "choices": choices, "nargs": nargs})


@dataclass(frozen=True)
class ModelFlags:
    """Model; with --load the shape is the checkpoint's, and a flag that contradicts it an error"""

    num_layers: int | None = flag(None, "transformer layers")
    hidden_size: int | None = flag(None, "width of the residual stream")
    ffn_hidden_size: int | None = flag(None, "width of the SwiGLU MLP (default: 8/3 hidden, /64)")
    num_attention_heads: int | None = flag(None, "query heads")
    group_query_attention: bool = flag(False, "share keys and values between query heads")
    num_query_groups: int | None = flag(None, "key-value heads, with --group-query-attention")
    kv_channels: int | None = flag(None, "width of a head (default: hidden / heads)")
    vocab_size: int | None = flag(None, "tokens (default: the tokenizer's)")
    make_vocab_size_divisible_by: int | None = flag(None, "pad the vocabulary to it (128)")
    untie_embeddings_and_output_weights: bool = flag(False, "separate output layer, as in LLaMA")
    add_qkv_bias: bool = flag(False, "biases of queries, keys and values, as in Qwen2")
    qk_layernorm: bool = flag(False, "RMSNorm of each query and key head, as in Qwen3")
    norm_epsilon: float | None = flag(None, "RMSNorm epsilon (default: 1e-5)")
    init_method_std: float = flag(0.02, "standard deviation of fresh weights")
    max_position_embeddings: int | None = flag(
        None, "target window T in tokens (default: the checkpoint's, else --seq-length)"
    )
    original_max_position_embeddings: int | None = flag(
        None, "window before extension (default: the checkpoint's T, else --seq-length)"
    )
    rotary_base: float | None = flag(None, "RoPE theta (default: 10000)")
    rotary_percent: float | None = flag(None, "share of a head that rotates (default: 1.0)")
    rope_scaling: str | None = flag(None, "interpolation of the rotary frequencies", METHODS)
    rope_scaling_factor: float | None = flag(None, "default: T / original window")
    rope_scaling_config: str | None = flag(
        None,
        "JSON object, or a file with one, of what else the method takes, in Hugging Face's "
        "words: beta_fast, low_freq_factor, long_factor, attention_factor, ...",
    )
    transformer_impl: str = flag(
        "torch",
        "torch runs everywhere; transformer_engine needs a GPU and the package",
        ("torch", "transformer_engine"),
    )


@dataclass(frozen=True)
class PositionFlags:
    """Positions of the training samples; validation always uses plain ones"""

    position_sampler: str | None = flag(
        None, f"{', '.join(SAMPLERS)}; full is plain (default: pose when T > L, else full)"
    )
    pose_num_chunks: int = flag(2, "chunks N that a window is cut into")
    pose_content: str = flag(
        "uniform", "where a chunk's text comes from: v uniform, v = 0, or v = u", CONTENTS
    )
    pose_skip_law: str = flag(
        "chain",
        "of u: the paper's equation 4, or N - 1 uniform values in order, which for many "
        "chunks does not crowd toward T",
        SKIP_LAWS,
    )
    pose_boundaries: list[str] = flag(
        [],
        "pose-boundary, longrecipe: chunks start after these tokens; an id, or a text that "
        "the token is or ends with (longrecipe's default: . ! ? and newline)",
        nargs="+",
    )
    pose_plain_fraction: float = flag(
        0.0, "share of samples with plain positions and contiguous text"
    )
    pose_target_schedule: list[str] = flag(
        [],
        "a target that grows: '0:8192 64000:32768 128000:131072' says from which sample on "
        "which target, the last of them T",
        nargs="+",
    )


@dataclass(frozen=True)
class DataFlags:
    """Data"""

    data_path: list[str] = flag(
        [], "corpus prefixes, or 'weight prefix weight prefix ...'", nargs="+"
    )
    data_args_path: str | None = flag(None, "a file with the words of --data-path")
    train_data_path: list[str] = flag([], "corpora of training alone, like --data-path", nargs="+")
    valid_data_path: list[str] = flag([], "corpora of validation alone", nargs="+")
    test_data_path: list[str] = flag([], "corpora of a test after the last step", nargs="+")
    split: str | None = flag(None, "train,valid,test shares of the documents (default: 969,30,1)")
    data_cache_path: str | None = flag(
        None,
        "folder for dataset indices, made once and memory-mapped; jobs may share it "
        "(default: in memory)",
    )
    data_mode: str = flag(
        "document",
        "a sample is cut from one document, or from all packed end to end",
        ("document", "packed"),
    )
    packed_skips: str = flag(
        "document",
        "packed: text skips stay inside a document, or go up to T tokens along the stream",
        ("document", "stream"),
    )
    materialized: str | None = flag(
        None, "train on the samples that tools/materialize_positions.py wrote at this prefix"
    )
    seq_length: int = flag(2048, "training window L in tokens")
    short_documents: str = flag(
        "drop", "documents below L + 1 tokens: drop them, or pack them end to end", ("drop", "pack")
    )
    tokenizer_type: str = flag(
        "HuggingFaceTokenizer", "", ("SentencePieceTokenizer", "HuggingFaceTokenizer")
    )
    tokenizer_model: str | None = flag(None, "tokenizer file or folder; copied into checkpoints")
    num_workers: int = flag(2, "loader processes of a rank; 0 loads in the training process")


@dataclass(frozen=True)
class TrainingFlags:
    """Training"""

    micro_batch_size: int = flag(1, "samples in one forward pass of a rank")
    global_batch_size: int | None = flag(None, "samples in a step (default: micro x data ranks)")
    rampup_batch_size: list[int] = flag(
        [],
        "with --train-samples: first batch, increment, and samples after which "
        "--global-batch-size is reached",
        nargs=3,
    )
    train_iters: int | None = flag(None, "steps of the whole run")
    train_samples: int | None = flag(
        None,
        "samples of the whole run, in place of --train-iters; the --lr flags then count "
        "samples, too",
    )
    lr: float = flag(1e-4, "peak learning rate")
    min_lr: float = flag(0.0, "final learning rate")
    lr_decay_style: str = flag("cosine", "", LR_DECAY_STYLES)
    lr_decay_iters: int | None = flag(None, "steps of decay (default: --train-iters)")
    lr_decay_samples: int | None = flag(None, "samples of decay (default: --train-samples)")
    lr_warmup_iters: int = flag(0, "steps of linear warm-up")
    lr_warmup_samples: int = flag(0, "samples of linear warm-up")
    lr_wsd_decay_iters: int | None = flag(None, "with WSD: steps of the final decay")
    lr_wsd_decay_samples: int | None = flag(None, "with WSD: samples of the final decay")
    lr_wsd_decay_style: str = flag(
        "exponential",
        "with WSD: shape of the final decay",
        ("exponential", "linear", "cosine", "minus_sqrt"),
    )
    weight_decay: float = flag(0.01, "decoupled; not for norms")
    clip_grad: float = flag(1.0, "largest gradient norm; 0 never clips")
    adam_beta1: float = flag(0.9, "")
    adam_beta2: float = flag(0.95, "")
    adam_eps: float = flag(1e-8, "")
    bf16: bool = flag(False, "bfloat16 weights and activations, float32 main copies and gradients")
    seed: int = flag(1234, "of weights, sample order and positions")
    exit_duration_in_mins: float | None = flag(None, "save and stop after so many minutes")
    max_skipped_iterations: int = flag(
        5,
        "stop after so many steps in a row whose loss or gradient was not finite; such a step "
        "changes no weight",
    )
    loss_spike_factor: float = flag(
        1.5,
        "name the samples of a step whose loss is above so many times the mean of the last "
        "20; 0 never does",
    )
    recompute_granularity: str | None = flag(
        None,
        "compute activations again in the backward pass: of whole layers, or selectively",
        ("full", "selective"),
    )
    recompute_method: str | None = flag(
        None, "with full: groups of layers, or the first layers", ("uniform", "block")
    )
    recompute_num_layers: int | None = flag(None, "with full: layers of a group, or how many")
    recompute_modules: list[str] = flag(
        ["core_attn"], "with selective: which (default: core_attn)", nargs="+"
    )


@dataclass(frozen=True)
class ParallelFlags:
    """Layout of the ranks; what is left over is data parallel"""

    tensor_model_parallel_size: int = flag(1, "")
    pipeline_model_parallel_size: int = flag(1, "")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "interleave the pipeline: layers of one model chunk"
    )
    context_parallel_size: int = flag(1, "ranks that share a sequence")
    sequence_parallel: bool = flag(False, "split activations between layers over the tensor ranks")
    use_distributed_optimizer: bool = flag(False, "shard optimizer state over the data ranks")
    overlap_grad_reduce: bool = flag(False, "reduce gradients while the backward pass goes on")
    overlap_param_gather: bool = flag(
        False, "gather weights while the forward pass goes on; with the two flags above"
    )
    distributed_timeout_minutes: int = flag(10, "of a collective before the run gives up")

    def virtual_pipeline_size(self, num_layers: int) -> int | None:
        """Model chunks of a rank; None without interleaving."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        per_rank = num_layers // self.pipeline_model_parallel_size
        return per_rank // self.num_layers_per_virtual_pipeline_stage

    def sizes(self, num_layers: int) -> dict[str, int | None]:
        """megatron-core's sizes of the layout for a model of so many layers."""
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline_size(num_layers),
            "context_parallel_size": self.context_parallel_size,
        }


@dataclass(frozen=True)
class CheckpointFlags:
    """Checkpoints, in Megatron-LM's directory layout"""

    load: str | None = flag(
        None,
        "folder with latest_checkpointed_iteration.txt; where it is --save's, too, the first "
        "start of a job may find it empty",
    )
    save: str | None = flag(None, "folder to write iter_0000000/ into")
    save_interval: int | None = flag(None, "steps between saves (default: only at the end)")
    async_save: bool = flag(False, "write checkpoints in the background")
    save_retain: int | None = flag(None, "keep only so many checkpoints of --save (default: all)")
    load_fallback: bool = flag(False, "where the latest of --load is damaged, take the one before")
    finetune: bool = flag(False, "take only the weights of --load and start at step 0")
    pretrained_checkpoint: str | None = flag(
        None,
        "take its weights and start at step 0 where --load holds no checkpoint yet: a job "
        "with the same --load and --save can then be restarted as it is",
    )


@dataclass(frozen=True)
class LoggingFlags:
    """Evaluation and log"""

    log_interval: int = flag(10, "steps between log lines")
    eval_interval: int | None = flag(None, "steps between validations (default: never)")
    eval_iters: int = flag(10, "batches of a validation")
    tensorboard_dir: str | None = flag(None, "write scalars for TensorBoard here")
    wandb_project: str | None = flag(
        None,
        "send scalars to this project of Weights & Biases; WANDB_MODE=offline keeps them on disk",
    )
    wandb_exp_name: str | None = flag(None, "name of the run there")
    wandb_save_dir: str | None = flag(None, "folder of its files (default: wandb/)")
    log_file: str | None = flag(None, "append one JSON object per log line here")
    dry_run: bool = flag(False, "print the resolved run and exit")


@dataclass(frozen=True)
class Arguments:
    """Everything a run is a function of. `model` says what was asked of the model's shape."""

    model: ModelFlags
    position: PositionFlags
    data: DataFlags
    training: TrainingFlags
    parallel: ParallelFlags
    checkpoint: CheckpointFlags
    logging: LoggingFlags
