"""What stock Megatron-LM must be told beside --use-checkpoint-args: sentences derived by hand from
its load_args_from_checkpoint and pretrain_gpt.py."""

import dataclasses

import pytest

from pose_megatron.checkpoints.megatron.stock_flags import notes
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import RopeScaling

LLAMA = ModelConfig(
    num_layers=1,
    hidden_size=64,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=256,
    max_position_embeddings=256,
    norm_epsilon=1e-5,
)
NEEDS = "stock Megatron-LM needs, beside --use-checkpoint-args, which does not set them: "
OURS = "train with pretrain_pose.py, or with the plugin pose_megatron.megatron"
PLAIN = f", and takes its rope for a plain one: {OURS}"
NO_FLAGS = "stock Megatron-LM has no flags for this model's "


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, []),
        # Another base is in the checkpoint's arguments and is taken from there.
        ({"rotary_base": 500000.0}, []),
        ({"rope_scaling": RopeScaling("ntk", 4.0)}, []),
        ({"family": "qwen2"}, []),
        ({"norm_epsilon": 1e-6}, [f"{NEEDS}--norm-epsilon 1e-06"]),
        (
            {"norm_epsilon": 1e-6, "family": "qwen3"},
            [f"{NEEDS}--norm-epsilon 1e-06 --qk-layernorm"],
        ),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 8192)}, [f"{NEEDS}--use-rope-scaling"]),
        (  # --rope-scaling-factor is not passed on to the model: the factor is always 8
            {"rope_scaling": RopeScaling("llama3", 32.0, 8192), "norm_epsilon": 1e-6},
            [f"{NEEDS}--norm-epsilon 1e-06", f"{NO_FLAGS}llama3 scaling by 32{PLAIN}"],
        ),
        (
            {"rope_scaling": RopeScaling("linear", 4.0, 64)},
            [
                f"{NEEDS}--rotary-seq-len-interpolation-factor 4",
                "pretrain_gpt.py of Megatron-LM before 0.19 ignores "
                f"--rotary-seq-len-interpolation-factor: {OURS}",
            ],
        ),
        (  # the flag takes whole numbers only
            {"rope_scaling": RopeScaling("linear", 2.5, 64)},
            [f"{NO_FLAGS}linear scaling by 2.5{PLAIN}"],
        ),
        (
            {"rope_scaling": RopeScaling("yarn", 4.0, 64)},
            [f"{NO_FLAGS}yarn scaling by 4{PLAIN}"],
        ),
        (
            {"rope_scaling": RopeScaling("ntk", 2.0, over=RopeScaling("llama3", 8.0, 8192))},
            [f"{NO_FLAGS}ntk scaling by 2{PLAIN}"],
        ),
        ({"family": "gptj"}, [f"stock Megatron-LM does not compute GPT-J: {OURS}"]),
        ({"family": "baichuan"}, [f"stock Megatron-LM does not compute Baichuan2: {OURS}"]),
    ],
    ids=str,
)
def test_what_stock_megatron_lm_must_be_told(changes, sentences):
    assert notes(dataclasses.replace(LLAMA, **changes)) == sentences
