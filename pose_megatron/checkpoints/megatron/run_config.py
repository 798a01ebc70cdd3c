"""A model as Megatron-Bridge writes it: the `model` section of run_config.yaml."""

from pathlib import Path

from pose_megatron.checkpoints.megatron.args import from_args
from pose_megatron.errors import ConfigError
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.json_files import read_yaml


def read_run_config(path: Path, embedding_rows: int) -> tuple[ModelConfig, dict]:
    """The model in Megatron-Bridge's run_config.yaml, and arguments of the run by Megatron-LM's
    names; errors as in from_args, or the file is no such YAML."""
    config = read_yaml(path)
    model = _flat(config)
    run = {
        name: model.get(name, 1)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    }
    run["use_distributed_optimizer"] = bool(
        (config.get("optimizer") or {}).get("use_distributed_optimizer")
    )
    return from_run_config(config, embedding_rows), run


def from_run_config(config: dict, embedding_rows: int) -> ModelConfig:
    """The model in a checkpoint that Megatron-Bridge wrote.

    Args:
        config: the content of run_config.yaml.
        embedding_rows: rows of the stored word embedding, padding included.

    Raises:
        ConfigError: as in from_args.
    """
    model = _flat(config)
    llama3 = _llama3_factor(model)
    activation = model.get("activation_func")
    if isinstance(activation, dict):
        activation = activation.get("_target_")
    gated_silu = model.get("gated_linear_unit") and str(activation).rpartition(".")[2] == "silu"
    return from_args(
        {name: value for name, value in model.items() if value is not None}
        | {
            "swiglu": bool(gated_silu),
            "norm_epsilon": model.get("layernorm_epsilon", 1e-5),
            "untie_embeddings_and_output_weights": not model.get(
                "share_embeddings_and_output_weights", True
            ),
            "group_query_attention": model.get("num_query_groups") is not None,
            "use_rope_scaling": bool(model.get("rope_scaling")) or llama3 is not None,
            "rope_scaling_factor": llama3 or model.get("rope_scaling_factor"),
            "rotary_seq_len_interpolation_factor": model.get("seq_len_interpolation_factor"),
            "num_experts": model.get("num_moe_experts"),
        },
        embedding_rows,
        all_are_the_models=True,
    )


def _llama3_factor(model: dict) -> float | None:
    """Takes the rope of Llama31ModelProvider, up to 0.3, out of the section.

    Raises:
        ConfigError: it is not Llama 3.1's own but for the factor.
    """
    names = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
    factor, *ramp = (model.pop(name, None) for name in names)
    if factor is None and ramp == [None] * 3:
        return None
    if factor is None or ramp != [1.0, 4.0, 8192]:
        said = ", ".join(f"{k} {v}" for k, v in zip(names, (factor, *ramp), strict=True))
        raise ConfigError(f"{said} is not supported, only a scale_factor with 1, 4 and 8192 is")
    return float(factor)


def _flat(config: dict) -> dict:
    model = config.get("model")
    if not isinstance(model, dict):
        raise ConfigError("run_config.yaml has no model section")
    model = {**model, **(model.get("transformer") or {})}  # a section inside it in later releases
    return {name: value for name, value in model.items() if name not in ("transformer", "builder")}
