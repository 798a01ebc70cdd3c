"""arguments.py: what the flags mean, and how each mistake is answered."""

import dataclasses
import json

import pytest

from pose_megatron.config.arguments import parse
from pose_megatron.config.flags import LR_DECAY_STYLES, ModelFlags
from pose_megatron.config.layout import lay_out
from pose_megatron.config.megatron_flags import REFUSED
from pose_megatron.config.model import resolve_model
from pose_megatron.errors import flag_name
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import RopeScaling

SHAPE = ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"]
RUN = ["--train-iters", "10"]
VOCAB = ["--vocab-size", "257"]


def resolve(words, loaded=None, tokenizer=None):
    args = parse([*words, *RUN])
    return resolve_model(args.model, args.data.seq_length, loaded, tokenizer)


LOADED = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=257,
    max_position_embeddings=2048,
    norm_epsilon=1e-6,
    rotary_base=50000.0,
    untie_embeddings_and_output_weights=True,
)


def extended(method="yarn", factor=16.0, target=32768):
    return dataclasses.replace(
        LOADED,
        max_position_embeddings=target,
        rope_scaling=RopeScaling(method, factor, original_max_position_embeddings=2048),
    )


# Flags and files.


def test_defaults_that_a_run_is_made_of():
    args = parse(RUN)
    assert args.data.seq_length == 2048 and args.data.split is None
    assert args.training.micro_batch_size == 1 and args.training.train_iters == 10
    assert (args.training.lr, args.training.adam_beta1, args.training.adam_beta2) == (
        1e-4,
        0.9,
        0.95,
    )
    assert args.position.pose_num_chunks == 2 and args.position.pose_content == "uniform"
    assert args.position.position_sampler is None
    assert not args.training.bf16 and not args.parallel.sequence_parallel
    assert args.checkpoint.load is None and args.logging.eval_interval is None


def test_every_flag_of_the_issue_is_understood():
    args = parse(
        """
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention
        --num-query-groups 2 --ffn-hidden-size 128 --seq-length 32 --max-position-embeddings 256
        --micro-batch-size 2 --global-batch-size 8 --train-iters 7 --lr 1e-3 --min-lr 1e-5
        --lr-decay-style linear --lr-warmup-iters 2 --weight-decay 0.1 --clip-grad 0.5
        --adam-beta1 0.8 --adam-beta2 0.99 --bf16 --tensor-model-parallel-size 2
        --pipeline-model-parallel-size 2 --sequence-parallel --load a --save b --save-interval 3
        --eval-interval 5 --eval-iters 4 --log-interval 1 --data-path 0.3 x 0.7 y --split 8,1,1
        --seed 7 --tensorboard-dir t --position-sampler randpos --pose-num-chunks 3
        --pose-content aligned --rope-scaling yarn --rope-scaling-factor 8
        --original-max-position-embeddings 32 --dry-run
        """.split()
    )
    assert args.model.group_query_attention and args.model.num_query_groups == 2
    assert args.data.data_path == ["0.3", "x", "0.7", "y"] and args.data.split == "8,1,1"
    assert args.training.lr == 1e-3 and args.training.lr_decay_style == "linear"
    assert args.training.bf16 and args.parallel.sequence_parallel and args.logging.dry_run
    assert args.position.pose_content == "aligned" and args.position.position_sampler == "randpos"
    assert args.model.rope_scaling_factor == 8.0
    assert args.model.original_max_position_embeddings == 32


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_a_config_file_says_the_same_as_flags(tmp_path):
    path = write(
        tmp_path,
        """
seq-length: 64
max_position_embeddings: 512
data-path: [0.3, x, 0.7, y]
lr: 1.0e-3
bf16: true
sequence-parallel: false
split: "8,1,1"
load:
train-iters: 5
""",
    )
    flags = (
        "--seq-length 64 --max-position-embeddings 512 --data-path 0.3 x 0.7 y --lr 1e-3 "
        "--bf16 --no-sequence-parallel --split 8,1,1 --train-iters 5"
    )
    assert parse(["--config", path]) == parse(flags.split())


def test_flags_win_over_the_file(tmp_path):
    path = write(tmp_path, "seq-length: 64\nbf16: true\ndata-path: [a, b]\ntrain-iters: 5\n")
    args = parse(["--config", path, "--seq-length", "32", "--no-bf16", "--data-path", "c"])
    assert args.data.seq_length == 32 and not args.training.bf16
    assert args.data.data_path == ["c"] and args.training.train_iters == 5


@pytest.mark.parametrize(
    "text, message",
    [
        ("sequence_length: 64\n", "line 1: unknown name 'sequence_length'"),
        ("seq-length: [1\n", "is not YAML"),
        ("- seq-length\n", "must be a mapping"),
        ("just words\n", "must be a mapping"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        parse(["--config", path])
    assert message in str(error.value) and path in str(error.value)


def test_a_missing_config_file_is_named():
    with pytest.raises(ValueError, match="--config nowhere.yaml: no such file"):
        parse(["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--sequence-length", "3"], "--sequence-length"),
        (["--seq", "3"], "--seq"),
        (["--lr-decay-style", "step"], "--lr-decay-style.*'step'.*cosine"),
        (["--num-layers", "two"], "--num-layers.*'two'"),
        (["--config"], "--config"),
    ],
)
def test_unknown_and_abbreviated_flags_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse([*RUN, *words])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seq-length", "0"], "--seq-length must be at least 1, not 0"),
        (["--micro-batch-size", "0"], "--micro-batch-size must be at least 1, not 0"),
        (["--global-batch-size", "-4"], "--global-batch-size must be at least 1, not -4"),
        (["--train-iters", "0"], "--train-iters must be at least 1, not 0"),
        (["--lr-decay-iters", "0"], "--lr-decay-iters must be at least 1"),
        (["--pose-num-chunks", "0"], "--pose-num-chunks must be at least 1"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size must be at least 1"),
        (
            ["--pipeline-model-parallel-size", "0"],
            "--pipeline-model-parallel-size must be at least",
        ),
        (["--save", "x", "--save-interval", "0"], "--save-interval must be at least 1"),
        (["--log-interval", "0"], "--log-interval must be at least 1"),
        (["--eval-interval", "0"], "--eval-interval must be at least 1"),
        (["--eval-iters", "-1"], "--eval-iters must be at least 0, not -1"),
        (["--num-workers", "-1"], "--num-workers must be at least 0, not -1"),
        (["--lr-warmup-iters", "10"], "--lr-warmup-iters 10 leaves nothing of --train-iters 10"),
        (["--lr", "1e-5", "--min-lr", "1e-4"], "--min-lr 0.0001 is greater than --lr 1e-05"),
        (["--finetune"], "--finetune .*--load"),
        (["--split", "969,30"], "--split 969,30 must be three shares"),
        (["--split", "1,nan,0"], "--split 1,nan,0 must be three shares"),
        (["--save-interval", "5"], "--save-interval .*--save"),
    ],
)
def test_values_out_of_range_name_flag_and_value(words, message):
    with pytest.raises(ValueError, match=message):
        parse([*RUN, *words])


def test_train_iters_is_needed_except_for_a_dry_run():
    with pytest.raises(ValueError, match="--train-iters is missing"):
        parse([])
    assert parse(["--dry-run"]).training.train_iters is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--train-iters 5 --train-samples 50",
            "--train-iters 5 and --train-samples 50 both say how long",
        ),
        (
            "--train-samples 50 --lr-warmup-iters 5",
            "--lr-warmup-iters 5 has no meaning with --train-samples; say --lr-warmup-samples",
        ),
        ("--train-iters 5 --lr-decay-samples 5", "say --lr-decay-iters"),
        (
            "--train-samples 50 --lr-warmup-samples 50",
            "--lr-warmup-samples 50 leaves nothing of --train-samples 50",
        ),
        ("--train-samples 50 --lr-decay-style WSD", "WSD needs --lr-wsd-decay-samples"),
        (
            "--train-iters 10 --lr-decay-style WSD --lr-wsd-decay-iters 50",
            "--lr-wsd-decay-iters 50 does not fit into --train-iters 10: at most 10",
        ),
        (
            "--train-iters 10 --lr-decay-style WSD --lr-wsd-decay-iters 5 --lr-warmup-iters 6",
            "-iters 5 does not fit into --train-iters 10 after --lr-warmup-iters 6: at most 4",
        ),
        (
            "--train-samples 10 --lr-decay-style WSD --lr-wsd-decay-samples 5 "
            "--lr-warmup-samples 6",
            "-samples 5 does not fit into --train-samples 10 after --lr-warmup-samples 6: at",
        ),
        (
            "--train-iters 100 --lr-decay-iters 8 --lr-decay-style WSD --lr-wsd-decay-iters 9",
            "--lr-wsd-decay-iters 9 does not fit into --lr-decay-iters 8: at most 8",
        ),
        (
            "--train-iters 10 --lr-warmup-iters 5 --lr-decay-iters 3",
            "--lr-warmup-iters 5 leaves nothing of --lr-decay-iters 3",
        ),
        (
            "--train-iters 10 --lr-warmup-iters 3 --lr-decay-iters 3 --lr-decay-style constant",
            "--lr-warmup-iters 3 leaves nothing of --lr-decay-iters 3",
        ),
        (
            "--train-samples 10 --lr-warmup-samples 3 --lr-decay-samples 3",
            "--lr-warmup-samples 3 leaves nothing of --lr-decay-samples 3",
        ),
        (
            "--train-iters 5 --rampup-batch-size 2 2 8 --global-batch-size 8",
            "--rampup-batch-size needs --train-samples",
        ),
        (
            "--train-samples 5 --rampup-batch-size 2 0 8 --global-batch-size 8",
            "--rampup-batch-size must be at least 1, not 0",
        ),
        (
            "--train-iters 5 --overlap-param-gather --overlap-grad-reduce",
            "--overlap-param-gather needs --overlap-grad-reduce and --use-distributed-optimizer",
        ),
        (
            "--train-iters 5 --loss-spike-factor 0.5",
            "--loss-spike-factor must be 0 or above 1, not 0.5",
        ),
        (
            "--train-iters 5 --max-skipped-iterations 0",
            "--max-skipped-iterations must be at least 1",
        ),
    ],
)
def test_lengths_and_schedules_that_contradict_each_other(words, message):
    with pytest.raises(ValueError, match=message):
        parse(words.split())


@pytest.mark.parametrize("unit", ["iters", "samples"])
def test_a_schedule_that_just_fits(unit):
    words = f"--lr-decay-style WSD --lr-wsd-decay-{unit} 4 --lr-warmup-{unit} 6"
    parse([f"--train-{unit}", "10", *words.split()])
    # The decay of a run that a later one will end may lie beyond this one.
    parse(
        [
            f"--train-{unit}",
            "10",
            f"--lr-decay-{unit}",
            "1000",
            *words.replace(" 4", " 500").split(),
        ]
    )


@pytest.mark.parametrize("name", REFUSED)
def test_flags_of_megatron_that_would_be_wrong_are_refused_with_a_reason(name, tmp_path):
    message = f"{flag_name(name)} cannot be used: .*; leave it out"
    for word in (flag_name(name), f"{flag_name(name)}=1"):
        with pytest.raises(ValueError, match=message):
            parse([*RUN, word])
    (tmp_path / "run.yaml").write_text(f"{name.replace('_', '-')}: 1\n")
    with pytest.raises(ValueError, match=message):
        parse([*RUN, "--config", str(tmp_path / "run.yaml")])


def test_a_refused_name_may_be_a_value():
    assert parse([*RUN, "--data-path", "sft"]).data.data_path == ["sft"]


def test_every_schedule_can_be_asked_for():
    for style in LR_DECAY_STYLES:
        length = ["--lr-wsd-decay-iters", "2"] if style == "WSD" else []
        args = parse([*RUN, "--lr-decay-style", style, *length])
        assert args.training.lr_decay_style == style


# The model.


def test_a_shape_from_flags_alone():
    config = resolve([*SHAPE, *VOCAB, "--seq-length", "128"])
    assert config == ModelConfig(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=16,
        vocab_size=257,
        max_position_embeddings=128,
    )
    assert config.padded_vocab_size == 384 and config.rotary_dim == 16
    # LLaMA-2 7B: 11008 is what its authors publish; Megatron-LM's rule gives 10880.
    big = resolve(
        "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --vocab-size 32000 "
        "--ffn-hidden-size 11008 --untie-embeddings-and-output-weights".split()
    )
    assert big.num_parameters == 6_738_415_616  # as published for LLaMA-2 7B


def test_the_parameters_are_those_that_transformers_counts():
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (False, True):
        flag = "--untie-embeddings-and-output-weights"
        config = resolve(
            [
                *SHAPE,
                "--vocab-size",
                "384",
                "--group-query-attention",
                "--num-query-groups",
                "2",
                *([] if tied else [flag]),
            ]
        )
        theirs = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=384,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=tied,
            )
        )
        assert config.num_parameters == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    "words, message",
    [
        ([*SHAPE[2:], *VOCAB], "--num-layers is missing"),
        ([*SHAPE[:2], *SHAPE[4:], *VOCAB], "--hidden-size is missing"),
        ([*SHAPE[:4], *VOCAB], "--num-attention-heads is missing"),
        (SHAPE, "--vocab-size is missing"),
        (
            [*SHAPE, *VOCAB, "--num-attention-heads", "5"],
            "--hidden-size 64 is not a multiple of --num-attention-heads 5; give --kv-channels",
        ),
        ([*SHAPE, *VOCAB, "--num-query-groups", "2"], "--num-query-groups has no effect without"),
        ([*SHAPE, *VOCAB, "--group-query-attention"], "needs --num-query-groups"),
        (
            [*SHAPE, *VOCAB, "--group-query-attention", "--num-query-groups", "3"],
            "--num-attention-heads 4 is not a multiple of --num-query-groups 3",
        ),
        ([*SHAPE, *VOCAB, "--rotary-percent", "0"], r"--rotary-percent must be in \(0, 1\], not 0"),
        ([*SHAPE, *VOCAB, "--rotary-percent", "1.5"], "--rotary-percent must be in"),
        ([*SHAPE, *VOCAB, "--kv-channels", "15"], "gives 15 rotary dimensions; they must be even"),
        ([*SHAPE, *VOCAB, "--num-layers", "0"], "--num-layers must be at least 1, not 0"),
        ([*SHAPE, "--vocab-size", "-5"], "--vocab-size must be at least 1, not -5"),
        ([*SHAPE, *VOCAB, "--hidden-size", "0"], "--hidden-size must be at least 1, not 0"),
        (
            [*SHAPE, *VOCAB, "--num-attention-heads", "0"],
            "--num-attention-heads must be at least 1, not 0",
        ),
        ([*SHAPE, *VOCAB, "--ffn-hidden-size", "0"], "--ffn-hidden-size must be at least 1, not 0"),
        ([*SHAPE, *VOCAB, "--kv-channels", "0"], "--kv-channels must be at least 1, not 0"),
        (
            [*SHAPE, *VOCAB, "--max-position-embeddings", "0"],
            "--max-position-embeddings must be at least 1, not 0",
        ),
        (
            [*SHAPE, *VOCAB, "--group-query-attention", "--num-query-groups", "0"],
            "--num-query-groups must be at least 1, not 0",
        ),
    ],
)
def test_a_shape_that_cannot_be_names_flag_and_value(words, message):
    with pytest.raises(ValueError, match=message):
        resolve(words)


def test_the_vocabulary_comes_from_flag_then_tokenizer():
    assert resolve(SHAPE, tokenizer=1000).vocab_size == 1000
    assert resolve([*SHAPE, "--vocab-size", "1200"], tokenizer=1000).vocab_size == 1200
    with pytest.raises(ValueError, match="--tokenizer-model has 1000 tokens, the model only 257"):
        resolve([*SHAPE, *VOCAB], tokenizer=1000)
    with pytest.raises(ValueError, match="--tokenizer-model has 1000 tokens, the model only 257"):
        resolve([], loaded=LOADED, tokenizer=1000)


def test_the_shape_is_the_checkpoints():
    assert resolve([], loaded=LOADED) == LOADED
    same = (
        "--num-layers 4 --hidden-size 64 --num-query-groups 2 --norm-epsilon 1e-6 "
        "--rotary-base 50000 --vocab-size 257 --untie-embeddings-and-output-weights".split()
    )
    assert resolve(same, loaded=LOADED) == LOADED


@pytest.mark.parametrize(
    "flag, value, has",
    [
        ("--num-layers", "5", "4"),
        ("--hidden-size", "128", "64"),
        ("--ffn-hidden-size", "64", "128"),
        ("--num-attention-heads", "8", "4"),
        ("--num-query-groups", "4", "2"),
        ("--kv-channels", "32", "16"),
        ("--vocab-size", "300", "257"),
        ("--make-vocab-size-divisible-by", "64", "128"),
        ("--norm-epsilon", "1e-05", "1e-06"),
        ("--rotary-base", "10000.0", "50000.0"),
        ("--rotary-percent", "0.5", "1.0"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_an_error(flag, value, has):
    with pytest.raises(
        ValueError, match=f"{flag} {value} contradicts the checkpoint, which has {has}"
    ):
        resolve([flag, value], loaded=LOADED)


def test_untied_weights_contradict_a_tied_checkpoint():
    tied = dataclasses.replace(LOADED, untie_embeddings_and_output_weights=False)
    with pytest.raises(ValueError, match="--untie-embeddings-and-output-weights True contradicts"):
        resolve(["--untie-embeddings-and-output-weights"], loaded=tied)


def test_grouped_flags_without_a_number_contradict_no_checkpoint():
    assert resolve(["--group-query-attention"], loaded=LOADED) == LOADED


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "yarn_revised"])
def test_extension_of_a_checkpoint_takes_its_window_as_the_original(method):
    config = resolve(
        ["--seq-length", "512", "--max-position-embeddings", "32768", "--rope-scaling", method],
        loaded=LOADED,
    )
    assert config == extended(method)


def test_extension_of_a_fresh_model_takes_the_training_window():
    config = resolve(
        [
            *SHAPE,
            *VOCAB,
            "--seq-length",
            "128",
            "--max-position-embeddings",
            "1024",
            "--rope-scaling",
            "linear",
        ]
    )
    assert config.rope_scaling == RopeScaling("linear", 8.0, 128)


def test_factor_and_original_window_can_be_said():
    words = ["--max-position-embeddings", "32768", "--rope-scaling", "linear"]
    said = resolve([*words, "--rope-scaling-factor", "20"], loaded=LOADED).rope_scaling
    assert said == RopeScaling("linear", 20.0, 2048)
    said = resolve([*words, "--original-max-position-embeddings", "4096"], loaded=LOADED)
    assert said.rope_scaling == RopeScaling("linear", 8.0, 4096)
    shrunk = resolve(
        ["--max-position-embeddings", "1024", "--rope-scaling", "linear"], loaded=LOADED
    )
    assert shrunk.rope_scaling.factor == 1.0


def test_a_longer_target_says_how_it_is_reached():
    longer = ["--max-position-embeddings", "32768"]
    with pytest.raises(ValueError, match="32768 is beyond the checkpoint.s 2048: choose a --rope"):
        resolve(longer, loaded=LOADED)
    config = resolve([*longer, "--rope-scaling", "none"], loaded=LOADED)
    assert config.rope_scaling == RopeScaling() and config.max_position_embeddings == 32768
    assert resolve(longer, loaded=config) == config  # trained further, or resumed


def test_a_factor_needs_a_method():
    with pytest.raises(ValueError, match="--rope-scaling-factor 8.0 needs a --rope-scaling method"):
        resolve(["--rope-scaling-factor", "8"], loaded=LOADED)
    assert resolve(["--rope-scaling-factor", "1"], loaded=LOADED) == LOADED


def test_an_extended_checkpoint_is_trained_further_as_it_is():
    before = extended()
    assert resolve([], loaded=before) == before
    same = [
        "--rope-scaling",
        "yarn",
        "--rope-scaling-factor",
        "16",
        "--original-max-position-embeddings",
        "2048",
        "--max-position-embeddings",
        "32768",
    ]
    assert resolve(same, loaded=before) == before


FURTHER = ["--max-position-embeddings", "262144"]


def llama31(**more):
    return dataclasses.replace(
        LOADED,
        max_position_embeddings=131072,
        rotary_base=5e5,
        rope_scaling=RopeScaling("llama3", 8.0, 8192, **more),
    )


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "yarn_revised"])
def test_a_scaled_checkpoint_is_extended_by_a_scaling_over_its_own(method):
    """Llama 3.1, from its window of 131072 to twice that."""
    config = resolve([*FURTHER, "--rope-scaling", method], loaded=llama31())
    before = RopeScaling("llama3", 8.0, 8192)
    assert config.rope_scaling == RopeScaling(method, 2.0, 131072, over=before)
    # A restart with the same words finds its own checkpoint, and goes on with it.
    again = resolve([*FURTHER, "--rope-scaling", method], loaded=config)
    assert again == resolve([], loaded=config) == config
    factor = resolve(
        [*FURTHER, "--rope-scaling", method, "--rope-scaling-factor", "3"], loaded=llama31()
    )
    assert factor.rope_scaling.factor == 3.0
    assert (
        resolve([*FURTHER, "--rope-scaling", method, "--rope-scaling-factor", "3"], loaded=factor)
        == factor
    )


def test_the_same_method_again_is_one_extension_by_the_product():
    config = resolve([*FURTHER, "--rope-scaling", "llama3"], loaded=llama31(high_freq_factor=5.0))
    assert config.rope_scaling == RopeScaling("llama3", 16.0, 8192, high_freq_factor=5.0)
    yarn = resolve(
        ["--max-position-embeddings", "65536", "--rope-scaling", "yarn"], loaded=extended()
    )
    assert yarn.rope_scaling == RopeScaling("yarn", 32.0, 2048)
    assert (
        resolve(["--max-position-embeddings", "65536", "--rope-scaling", "yarn"], loaded=yarn)
        == yarn
    )
    with pytest.raises(ValueError, match="-factor 2 is less than 16, the checkpoint's"):
        resolve(
            [
                "--max-position-embeddings",
                "65536",
                "--rope-scaling",
                "yarn",
                "--rope-scaling-factor",
                "2",
            ],
            loaded=extended(),
        )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rope-scaling", "linear"], "interpolated already.*--rope-scaling yarn"),
        (["--rope-scaling", "none"], "interpolated already"),
        (["--rope-scaling-factor", "32"], "interpolated already.*--rope-scaling-factor 16"),
        (["--original-max-position-embeddings", "4096"], "interpolated already"),
        (["--rope-scaling-config", '{"beta_fast": 16}'], "interpolated already"),
        (
            ["--max-position-embeddings", "65536"],
            "interpolated already, to 32768 positions .*give --rope-scaling and a greater",
        ),
        (
            ["--max-position-embeddings", "65536", "--rope-scaling", "none"],
            "--rope-scaling none contradicts the checkpoint, which has yarn",
        ),
        (["--max-position-embeddings", "16384", "--rope-scaling", "yarn"], "interpolated already"),
        (
            [
                "--max-position-embeddings",
                "65536",
                "--rope-scaling",
                "longrope",
                "--rope-scaling-config",
                '{"long_factor": [1, 2]}',
            ],
            "'longrope' cannot extend a model that is already scaled",
        ),
    ],
)
def test_what_does_not_extend_an_extended_checkpoint(words, message):
    with pytest.raises(ValueError, match=message):
        resolve(words, loaded=extended())


def test_options_of_a_method_come_in_hugging_faces_words(tmp_path):
    pairs = LOADED.rotary_dim // 2
    (tmp_path / "rope.json").write_text(
        json.dumps({"rope_type": "longrope", "long_factor": [2.0] * pairs})
    )
    words = ["--max-position-embeddings", "32768", "--rope-scaling-config"]
    config = resolve([*words, str(tmp_path / "rope.json")], loaded=LOADED)
    assert config.rope_scaling == RopeScaling("longrope", 16.0, 2048, long_factor=[2.0] * pairs)
    assert resolve([*words, str(tmp_path / "rope.json")], loaded=config) == config
    config = resolve([*words, '{"beta_fast": 16}', "--rope-scaling", "yarn"], loaded=LOADED)
    assert config.rope_scaling == RopeScaling("yarn", 16.0, 2048, beta_fast=16)
    for given, message in [
        ('{"rope_type": "longrope", "long_factor": [2.0]}', "'longrope' has 1 factors; "),
        ('{"beta_fast": 16}', "--rope-scaling-config beta_fast needs a --rope-scaling method"),
        ('{"beta_fats": 16}', "does not know beta_fats"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve([*words, given], loaded=LOADED)
    with pytest.raises(ValueError, match="config says method 'yarn', another flag 'linear'"):
        resolve([*words, '{"type": "yarn"}', "--rope-scaling", "linear"], loaded=LOADED)


def test_dynamic_is_not_trained():
    config = resolve(
        ["--max-position-embeddings", "32768", "--rope-scaling", "dynamic"], loaded=LOADED
    )
    with pytest.raises(ValueError, match="'dynamic' has no frequencies to train with"):
        lay_out(parse(["--train-iters", "1", "--seq-length", "128"]), config, 1)


def test_a_config_survives_a_checkpoint():
    over = resolve([*FURTHER, "--rope-scaling", "ntk"], loaded=llama31())
    for config in (LOADED, extended(), over, resolve([*SHAPE, *VOCAB])):
        values = config.to_dict()
        assert ModelConfig.from_dict(values) == config
        assert ModelConfig.from_dict(values | {"of_a_later_version": 1}) == config


def test_packed_skips_belong_to_packed_data():
    with pytest.raises(ValueError, match="--packed-skips stream needs --data-mode packed"):
        parse([*RUN, "--packed-skips", "stream"])
    assert parse([*RUN, "--packed-skips", "stream", "--data-mode", "packed"])


def test_flags_of_a_fresh_mixture_of_experts():
    words = [*RUN, *SHAPE, *VOCAB, "--num-experts", "4", "--ffn-hidden-size", "96"]

    def model(*more):
        return resolve_model(parse([*words, *more]).model, 64, None, None)

    plain = model()
    assert (plain.family, plain.num_experts, plain.moe_router_topk) == ("mixtral", 4, 2)
    assert (plain.moe_ffn_hidden_size, plain.ffn_hidden_size) == (96, 96)
    own = model("--qk-layernorm", "--moe-router-pre-softmax", "--moe-ffn-hidden-size", "32")
    assert (own.family, own.moe_ffn_hidden_size) == ("qwen3_moe", 32)
    assert own.moe_router_pre_softmax
    for more, message in [
        (["--moe-router-topk", "5"], "--moe-router-topk 5 is more than --num-experts 4"),
        (["--moe-router-topk", "1"], "--moe-router-topk 1 needs --moe-router-pre-softmax"),
        (["--add-qkv-bias"], "--add-qkv-bias: no supported mixture of experts has these biases"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*more)
    with pytest.raises(ValueError, match="--moe-router-topk 2 needs --num-experts"):
        resolve_model(parse([*RUN, *SHAPE, *VOCAB, "--moe-router-topk", "2"]).model, 64, None, None)
    with pytest.raises(ValueError, match="--num-experts 8 contradicts the checkpoint, .* has 4"):
        resolve_model(parse([*RUN, "--num-experts", "8"]).model, 64, plain, None)


def extended_again(before, window, **flags):
    """The scaling of a model with `before` and `window`, extended once more."""
    model = dataclasses.replace(LOADED, rope_scaling=before, max_position_embeddings=window)
    return resolve_model(ModelFlags(**flags), 4096, model, None).rope_scaling


@pytest.mark.parametrize(
    "method, window, target, factor",
    [  # T over the window before any extension
        ("yarn", 32768, 131072, 4.0),  # Qwen2.5's card leaves the window as it was
        ("yarn", 131072, 262144, 8.0),
        ("linear", 131072, 262144, 8.0),
        ("llama3", 32768, 262144, 8.0),
    ],
)
def test_the_factor_is_over_the_window_before_any_extension(method, window, target, factor):
    scaling = extended_again(
        RopeScaling(method, 4.0, 32768), window, rope_scaling=method, max_position_embeddings=target
    )
    assert (scaling.factor, scaling.original_max_position_embeddings) == (factor, 32768)


def test_a_window_that_was_left_as_it_was_is_multiplied_before_another_method():
    before, asked = RopeScaling("yarn", 4.0, 32768), {"rope_scaling": "linear"}
    scaling = extended_again(before, 32768, max_position_embeddings=262144, **asked)
    assert (scaling.factor, scaling.over) == (2.0, before)
    with pytest.raises(ValueError, match="reaches 131072 positions already"):
        extended_again(before, 32768, max_position_embeddings=65536, **asked)


def test_an_ambiguous_window_is_asked_for():
    asked = {"rope_scaling": "linear", "max_position_embeddings": 32768}
    before = RopeScaling("linear", 4.0)  # as config.json says it
    with pytest.raises(ValueError, match="give --original-max-position-embeddings"):
        extended_again(before, 4096, **asked)
    told = extended_again(before, 4096, original_max_position_embeddings=4096, **asked)
    assert told.factor == 8.0
    with pytest.raises(ValueError, match="say with --rope-scaling-factor"):
        extended_again(RopeScaling("yarn", 4.0, 4096), 8192, **asked | {"rope_scaling": "yarn"})


def test_kernels_of_transformer_engine_need_it():
    with pytest.raises(ValueError, match="--attention-backend fused is Transformer Engine's"):
        parse([*RUN, "--attention-backend", "fused"])
    engine = ["--transformer-impl", "transformer_engine"]
    args = parse([*RUN, *engine, "--attention-backend", "fused"])
    assert args.model.attention_backend == "fused"
    assert parse([*RUN, "--attention-backend", "flash"]).model.transformer_impl == "torch"
    norms = ["--recompute-granularity", "selective", "--recompute-modules", "mlp", "layernorm"]
    with pytest.raises(ValueError, match="--recompute-modules layernorm: .* Transformer Engine"):
        parse([*RUN, *norms])
    assert parse([*RUN, *engine, *norms]).training.recompute_modules == ["mlp", "layernorm"]
