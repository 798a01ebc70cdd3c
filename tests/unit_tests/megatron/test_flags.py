"""Megatron's flags that PoSE refuses, and what the plugin needs."""

import argparse

import pytest

from pose_megatron.megatron import prepare
from pose_megatron.megatron.flags import add_pose_args, arguments_of, check_args, model_flags_of
from pose_megatron.runtime.megatron_core import common_state_is_an_object


def parsed(*words):
    """Megatron's flags that the plugin reads, and ours beside them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq-length", type=int, default=32)
    parser.add_argument("--max-position-embeddings", type=int, default=256)
    parser.add_argument("--position-embedding-type", default="rope")
    parser.add_argument("--rope-scaling-factor", type=float, default=8.0)
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--split")
    parser.add_argument("--seed", type=int, default=1234)
    return add_pose_args(parser).parse_args(words)


def test_our_flags_stand_beside_theirs():
    args = parsed("--rope-scaling", "yarn", "--pose-num-chunks", "3", "--data-path", "a", "b")
    check_args(args)
    ours = arguments_of(args)
    assert (ours.position.pose_num_chunks, ours.data.data_path) == (3, ["a", "b"])
    assert (ours.data.seq_length, ours.training.seed, ours.data.split) == (32, 1234, None)
    # Megatron's default, 8, is not a wish: the factor is T over L.
    flags = model_flags_of(args)
    assert (flags.rope_scaling, flags.rope_scaling_factor) == ("yarn", None)
    given = model_flags_of(parsed("--rope-scaling", "yarn", "--rope-scaling-factor", "4"))
    assert given.rope_scaling_factor == 4.0


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("position_embedding_type", "learned_absolute", "learned_absolute: PoSE needs rope"),
        ("position_embedding_type", "yarn", "yarn: PoSE needs rope; give --rope-scaling yarn"),
        ("use_rope_scaling", True, "--use-rope-scaling contradicts PoSE: give --rope-scaling"),
        ("rotary_seq_len_interpolation_factor", 4, "--rotary-seq-len-interpolation-factor 4"),
        ("sft", True, "--sft contradicts PoSE"),
        ("dataloader_inter_document_masking", True, "samples are dense and causal"),
        ("hybrid_context_parallel", True, r"\(THD\)"),
        ("mtp_num_layers", 1, "--mtp-num-layers 1 contradicts PoSE"),
        ("multi_latent_attention", True, "rotates without the position ids"),
        ("reset_position_ids", True, "skip-wise positions"),
        ("mock_data", True, "name a corpus with --data-path"),
        ("max_position_embeddings", 16, "must be at least --seq-length 32"),
    ],
)
def test_a_flag_that_contradicts_is_refused_by_name(name, value, message):
    args = parsed()
    setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        check_args(args)


@pytest.mark.skipif(common_state_is_an_object(), reason="megatron-core 0.19 has what it needs")
def test_an_older_megatron_core_is_refused():
    message = "needs megatron.training of megatron-core 0.19 or newer, not of 0.1"
    with pytest.raises(ValueError, match=message):
        prepare()


def test_the_fused_rotary_embedding_is_chosen_as_in_our_trainer():
    assert model_flags_of(parsed()).fused_rotary == "auto"
    assert model_flags_of(parsed("--fused-rotary", "off")).fused_rotary == "off"


def test_the_fused_cross_entropy_is_chosen_as_in_our_trainer():
    assert model_flags_of(parsed()).fused_cross_entropy == "auto"
    chosen = model_flags_of(parsed("--fused-cross-entropy", "off"))
    assert chosen.fused_cross_entropy == "off"
