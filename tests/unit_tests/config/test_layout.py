"""layout.py: the sizes that follow from the ranks, and how long a run is; megatron-core's own ramp
is the outside answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator

from pose_megatron.config.arguments import parse
from pose_megatron.config.flags import TrainingFlags
from pose_megatron.config.layout import Layout, lay_out
from pose_megatron.config.model import resolve_model

SHAPE = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --vocab-size 257""".split()


def check(words, world_size=1):
    length = [] if "--train-samples" in words else ["--train-iters", "10"]
    args = parse([*SHAPE, *length, *words])
    return lay_out(args, resolve_model(args.model, args.data.seq_length, None, None), world_size)


def sizes(layout):
    batch = layout.global_batch_size
    return layout.data_parallel_size, batch, layout.num_microbatches(batch)


def test_layout_follows_from_the_ranks():
    layout = check([])
    assert sizes(layout) == (1, 1, 1)
    layout = check("--micro-batch-size 2 --global-batch-size 24".split(), world_size=3)
    assert sizes(layout) == (3, 24, 4)
    layout = check(
        "--micro-batch-size 2 --tensor-model-parallel-size 2 "
        "--pipeline-model-parallel-size 2".split(),
        world_size=12,
    )
    assert sizes(layout) == (3, 6, 1)


@pytest.mark.parametrize(
    "words, ranks, message",
    [
        (
            "--expert-model-parallel-size 2",
            2,
            "--expert-model-parallel-size 2 has no effect: the model has no experts",
        ),
        (
            "--moe-aux-loss-coeff 0.1",
            1,
            "--moe-aux-loss-coeff 0.1 has no effect: the model has no experts",
        ),
        (
            "--num-experts 4 --tensor-model-parallel-size 2",
            2,
            "--tensor-model-parallel-size 2 needs --sequence-parallel in a mixture",
        ),
        (
            "--num-experts 4 --expert-model-parallel-size 3",
            3,
            "--num-experts 4 is not a multiple of --expert-model-parallel-size 3",
        ),
        (
            "--num-experts 4 --expert-model-parallel-size 2",
            3,
            "--expert-model-parallel-size 2 does not divide the 3 ranks",
        ),
        (
            "--num-experts 4 --moe-aux-loss-coeff 0.1 --context-parallel-size 2",
            2,
            "--moe-aux-loss-coeff 0.1 counts less where ranks share a sequence",
        ),
        (
            "--num-experts 4 --moe-ffn-hidden-size 25 --tensor-model-parallel-size 2 --sequence-parallel",
            2,
            "moe_ffn_hidden_size 25 is not a multiple of",
        ),
        (
            "--train-samples 99 --rampup-batch-size 4 3 30 --global-batch-size 12",
            1,
            "steps of 3 do not lead from 4 to --global-batch-size 12",
        ),
        (
            "--train-samples 99 --rampup-batch-size 3 3 30 --global-batch-size 12 --micro-batch-size 2",
            1,
            "--rampup-batch-size 3 3 30: a batch of 3 is not a multiple of --micro-batch-size 2 x 1",
        ),
        (
            "--train-samples 99 --rampup-batch-size 2 2 30 --global-batch-size 8 "
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
            "--micro-batch-size 2",
            2,
            "the 1 micro-batches of a step of 2 samples to be a multiple of "
            "--pipeline-model-parallel-size 2",
        ),
        (
            "--tensor-model-parallel-size 2",
            3,
            "3 ranks do not divide into --tensor-model-parallel-size 2 x --pipeline-model-parallel-size 1 "
            "x --context-parallel-size 1; start a multiple of 2 ranks",
        ),
        (
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
            2,
            "start a multiple of 4 ranks",
        ),
        (
            "--global-batch-size 6 --micro-batch-size 2",
            2,
            "--global-batch-size 6 is not a multiple of --micro-batch-size 2 x 2 data-parallel ranks",
        ),
        (
            "--tensor-model-parallel-size 3",
            3,
            "4 is not a multiple of --tensor-model-parallel-size 3",
        ),
        (
            "--tensor-model-parallel-size 2 --ffn-hidden-size 129",
            2,
            "129 is not a multiple of --tensor-model-parallel-size 2",
        ),
        (
            "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 1",
            2,
            "257 is not a multiple of --tensor-model-parallel-size 2",
        ),
        (
            "--num-attention-heads 12 --kv-channels 8 --group-query-attention --num-query-groups 3 "
            "--tensor-model-parallel-size 4",
            4,
            "--num-query-groups 3 and --tensor-model-parallel-size 4",
        ),
        (
            "--pipeline-model-parallel-size 3",
            3,
            "--num-layers 4 is not a multiple of --pipeline-model-parallel-size 3",
        ),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 33",
            2,
            "--sequence-parallel needs --seq-length 33",
        ),
        (
            "--seq-length 64 --max-position-embeddings 1024 --rope-scaling linear "
            "--rope-scaling-factor 8",
            1,
            "--rope-scaling linear x8 from 64 reaches 512 positions, not the 1024 of "
            "--max-position-embeddings",
        ),
        (
            "--seq-length 64 --max-position-embeddings 32",
            1,
            "--seq-length 64 .*is greater than --max-position-embeddings 32",
        ),
    ],
)
def test_a_layout_that_cannot_be_names_flag_and_value(words, ranks, message):
    with pytest.raises(ValueError, match=message):
        check(words.split(), ranks)


def test_fewer_groups_than_tensor_ranks_are_fine():
    words = "--group-query-attention --num-query-groups 2 --tensor-model-parallel-size 4"
    assert check(words.split(), world_size=4).data_parallel_size == 1


RAMPS = st.builds(
    lambda first, increment, count, samples: (first, increment, first + increment * count, samples),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(1, 200),
)


@pytest.mark.skipif(
    not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"),
    reason="megatron-core 0.18 has removed its batch size ramp",
)
@given(RAMPS, st.integers(0, 400))
def test_the_batch_ramps_as_megatron_core_ramps(ramp, consumed):
    first, increment, batch, samples = ramp
    theirs = num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator(
        batch,
        1,
        1,
        False,
        rank=1,
        start_global_batch_size=first,
        batch_size_increment=increment,
        ramup_samples=samples,
    )
    theirs.update(consumed, consistency_check=True)
    layout = Layout(1, 1, batch, (first, increment, samples))
    assert layout.batch_size(consumed) == theirs.get_current_global_batch_size()
    assert layout.num_microbatches(layout.batch_size(consumed)) == theirs.get()


@given(RAMPS | st.just(None), st.integers(1, 500), st.data())
def test_a_run_in_samples_ends_before_the_step_that_would_exceed_them(ramp, total, data):
    layout = Layout(1, 1, 8) if ramp is None else Layout(1, 1, ramp[2], (ramp[0], ramp[1], ramp[3]))
    t = TrainingFlags(train_samples=total)
    # Step by step, as training goes.
    states = [(0, 0)]
    while (now := states[-1][1]) + layout.batch_size(now) <= total:
        states.append((states[-1][0] + 1, now + layout.batch_size(now)))
    resumed = data.draw(st.sampled_from(states))
    assert layout.end(t) == layout.end(t, *resumed) == states[-1]


def test_a_run_in_steps_goes_on_with_another_batch_size():
    t = TrainingFlags(train_iters=10)
    assert Layout(1, 1, 8).end(t) == (10, 80)
    assert Layout(1, 1, 4).end(t, 6, 48) == (10, 64)
    assert Layout(1, 1, 4).end(t, 12, 96) == (12, 96)
