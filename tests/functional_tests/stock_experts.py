"""Loads a converted Qwen3-MoE into stock megatron-core's GPTModel, the experts over the ranks.

    torchrun --standalone --nproc-per-node 2 tests/functional_tests/stock_experts.py hf megatron

Compares every tensor of this rank's experts with the Hugging Face folder's, and the logits with
transformers'. Layers are megatron-core's own but for one thing: its router asks for a function of
Transformer Engine by a name that 0.16.1 defines only where that is installed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from pose_megatron.runtime import cpu

    cpu.install()

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pose_megatron.checkpoints.megatron import directory
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime import distributed

LOCAL_EXPERTS = "decoder.layers.{}.mlp.experts.local_experts.{}."


def stock_model(
    model: ModelConfig,
    ranks: int = 1,
    as_transformer_engine: bool = False,
    spec: ModuleSpec | None = None,
    **more,
) -> GPTModel:
    """A GPTModel by megatron-core's own layer spec.

    Args:
        as_transformer_engine: stores the norm before the experts as that spec does.
        spec: of a layer; by default the local one.
        more: for TransformerConfig.
    """
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        num_moe_experts=model.num_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_router_topk=model.moe_router_topk or 2,
        moe_router_pre_softmax=bool(model.moe_router_pre_softmax),
        expert_model_parallel_size=ranks,
        use_cpu_initialization=True,
        **more,
    )
    spec = spec or get_gpt_layer_local_spec(
        model.num_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=model.qk_layernorm,
        normalization="RMSNorm",
    )
    if as_transformer_engine:
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return GPTModel(
        config,
        spec,
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(model.rotary_base),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
    )


def sharded(stage: GPTModel) -> dict:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return stage.sharded_state_dict(metadata={"dp_cp_group": group})


def load(stage: GPTModel, path: Path) -> None:
    """With all extra state, as Megatron-LM asks for it."""
    state = dist_checkpointing.load({"model": sharded(stage)}, str(path))
    stage.load_state_dict(state["model"])


@torch.no_grad()
def main(hf: Path, megatron: Path) -> None:
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    distributed.initialize(seed=0)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    found, theirs = directory.find(megatron), load_file(hf / "model.safetensors")
    tokens = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()(tokens).logits
    for as_transformer_engine in (False, True):
        stage = stock_model(found.model, ranks, as_transformer_engine).eval()
        load(stage, found.path)
        held = dict(stage.named_parameters())
        count = found.model.num_experts // ranks
        for layer in range(found.model.num_layers):
            for local in range(count):
                mine = LOCAL_EXPERTS.format(layer, local)
                name = f"model.layers.{layer}.mlp.experts.{rank * count + local}."
                fc1 = [theirs[f"{name}{x}_proj.weight"] for x in ("gate", "up")]
                fc2 = theirs[f"{name}down_proj.weight"]
                assert torch.equal(held[f"{mine}linear_fc1.weight"], torch.cat(fc1))
                assert torch.equal(held[f"{mine}linear_fc2.weight"], fc2)
        mask = torch.ones(24, 24).triu(1).bool()[None, None]
        logits = stage(tokens, torch.arange(24)[None], mask)[..., : expected.size(-1)]
        assert expected.abs().max() > 0.5
        assert (logits - expected).abs().max() < 1e-4, (logits - expected).abs().max()
    if rank == 0:
        print(f"{ranks} ranks: every expert, and logits to {(logits - expected).abs().max():.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
