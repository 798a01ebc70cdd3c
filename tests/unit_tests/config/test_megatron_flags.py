"""megatron_flags.py: arrays of Megatron-LM's scripts are accepted, and what contradicts us is not."""

import pytest

from pose_megatron.config.arguments import parse
from pose_megatron.config.megatron_flags import FACTS, REFUSED

RUN = ["--train-iters", "10"]
# Llama 3 8B with the flags that Megatron-LM's examples/llama/*.sh set for it.
LLAMA3_8B = """
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
    --position-embedding-type rope --rotary-base 500000 --rotary-percent 1.0 --swiglu
    --attention-dropout 0.0 --hidden-dropout 0.0 --init-method-std 0.01 --norm-epsilon 1e-5
    --untie-embeddings-and-output-weights --disable-bias-linear
    --seq-length 8192 --max-position-embeddings 8192 --micro-batch-size 1 --global-batch-size 64
    --train-samples 1000000 --lr-decay-samples 900000 --lr-warmup-samples 2000 --lr 3e-5
    --min-lr 3e-6 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9
    --adam-beta2 0.95 --bf16 --calculate-per-token-loss --exit-duration-in-mins 230 --save out
    --tensor-model-parallel-size 2 --context-parallel-size 2 --sequence-parallel
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model llama3 --split 99,1,0
    --data-cache-path cache --no-create-attention-mask-in-dataloader --num-workers 1
    --log-interval 1 --log-throughput --eval-iters 32 --eval-interval 100 --save-interval 500
    --ckpt-format torch_dist --distributed-timeout-minutes 60
"""
# What older scripts say besides.
LLAMA2 = """
    --normalization RMSNorm --no-masked-softmax-fusion --no-position-embedding
    --use-rotary-position-embeddings --tokenizer-type Llama2Tokenizer
    --tokenizer-model tokenizer.model --use-flash-attn --distributed-backend nccl
    --train-iters 10
"""
# As one writes them in a script, and what contradicts them.
PAIRS = [
    ("--position-embedding-type rope", "--position-embedding-type learned_absolute", "rotary"),
    ("--use-rotary-position-embeddings", "--no-use-rotary-position-embeddings", "rotary"),
    ("--no-position-embedding", "--position-embedding", "no table of learned positions"),
    ("--swiglu", "--no-swiglu", "the MLP is SwiGLU"),
    ("--normalization RMSNorm", "--normalization LayerNorm", "norms are RMSNorm"),
    ("--disable-bias-linear", "--no-disable-bias-linear", "linear layers have no bias"),
    ("--attention-dropout 0", "--attention-dropout 0.1", "there is no dropout"),
    ("--hidden-dropout 0.0", "--hidden-dropout 0.1", "there is no dropout"),
    ("--use-flash-attn", "--no-use-flash-attn", "fused kernels"),
    ("--attention-softmax-in-fp32", "--no-attention-softmax-in-fp32", "in float32"),
    ("--no-rope-fusion", "--rope-fusion", "--fused-rotary says whether"),
    ("--optimizer adam", "--optimizer sgd", "the optimizer is Adam"),
    ("--ckpt-format torch_dist", "--ckpt-format zarr", "written as torch_dist"),
    ("--distributed-backend gloo", "--distributed-backend mpi", "nccl on GPUs"),
    ("--dataloader-type single", "--dataloader-type cyclic", "the dataset shuffles"),
]


def yaml(flag: str) -> str:
    """`--name value` and `--name` as a line of run.yaml."""
    name, _, value = flag.removeprefix("--").partition(" ")
    return f"{name}: {value or 'true'}\n"


@pytest.fixture
def config(tmp_path):
    """config(text): flags that read it as a run.yaml."""

    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return ["--config", str(tmp_path / "run.yaml")]

    return write


def test_arrays_of_megatrons_scripts_can_be_pasted():
    args = parse(LLAMA3_8B.split())
    assert args.model.num_query_groups == 8 and args.model.rotary_base == 5e5
    assert args.training.train_samples == 1000000 and args.parallel.context_parallel_size == 2
    args = parse(LLAMA2.split())
    assert args.data.tokenizer_type == "SentencePieceTokenizer"
    assert args.data.tokenizer_model == "tokenizer.model"


@pytest.mark.parametrize("states, contradicts, holds", PAIRS)
def test_a_fact_is_accepted_and_its_contradiction_refused(config, states, contradicts, holds):
    plain = parse(RUN)
    assert parse([*RUN, *states.split()]) == parse([*RUN, *config(yaml(states))]) == plain
    message = f"^{contradicts} contradicts this trainer: .*{holds}.*; leave the flag out$"
    for flags in (contradicts.split(), config(yaml(contradicts))):
        with pytest.raises(ValueError, match=message):
            parse([*RUN, *flags])
    # The flag wins over the file, as any other.
    assert parse([*RUN, *config(yaml(contradicts)), *states.split()]) == plain


@pytest.mark.parametrize(
    "text", ["swiglu: false\n", "position-embedding: true\n", "no_position_embedding: false\n"]
)
def test_a_switch_of_a_file_is_read_either_way(config, text):
    with pytest.raises(ValueError, match="contradicts this trainer"):
        parse([*RUN, *config(text)])


def test_our_own_switches_may_be_written_with_no(config):
    assert not parse([*RUN, *config("no-sequence-parallel: true\n")]).parallel.sequence_parallel
    assert parse([*RUN, *config("no-bf16: false\n")]).training.bf16


def test_a_refused_flag_that_a_file_turns_off_says_nothing(config):
    assert parse([*RUN, *config("fp16: false\nnum-experts:\n")]) == parse(RUN)


def test_a_value_that_is_none_is_named():
    with pytest.raises(ValueError, match="--attention-dropout: 'no' is not a number"):
        parse([*RUN, "--attention-dropout", "no"])


def test_local_is_megatrons_word_for_torch():
    assert parse([*RUN, "--transformer-impl", "local"]).model.transformer_impl == "torch"


def test_no_validation_batches_are_no_validation():
    args = parse([*RUN, "--eval-interval", "5", "--eval-iters", "0"])
    assert args.logging.eval_interval is None
    with pytest.raises(ValueError, match="--eval-iters 0 leaves nothing of --test-data-path"):
        parse([*RUN, "--eval-iters", "0", "--test-data-path", "x"])


def test_help_lists_the_facts_in_a_group_of_their_own(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    group = capsys.readouterr().out.partition("flags that state what holds anyway")[2]
    assert len(group.partition("example:")[0].splitlines()) < 20
    for flag in ("--swiglu,", "--normalization RMSNorm,", "--ckpt-format torch_dist,"):
        assert flag in group


def test_a_flag_is_either_a_fact_or_refused():
    assert not FACTS.keys() & REFUSED.keys()
