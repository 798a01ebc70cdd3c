"""Every numeric flag of every program has a range, and refuses what lies outside."""

import argparse
import dataclasses
import importlib
import math
import typing

import pytest

from pose_megatron.commands.__main__ import MODULES
from pose_megatron.config.arguments import options, parse
from pose_megatron.config.flags import Arguments
from pose_megatron.errors import flag_name
from pose_megatron.runtime.ranges import Range, real, whole

FIELDS = {
    field.name: field
    for group in typing.get_type_hints(Arguments).values()
    for field in dataclasses.fields(group)
}
NUMERIC = [
    name
    for name, field in FIELDS.items()
    if {int, float} & {field.type, *typing.get_args(field.type)}
]
RUN = ["--train-iters", "10"]


def tool_flags(module: str, monkeypatch) -> list[argparse.Action]:
    """The flags of a tool's parser, at the moment at which it would read the command line."""
    seen = []

    def stop(self, *_):
        seen.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    program = importlib.import_module(f"pose_megatron.commands.{module}")
    try:
        getattr(program, "parse", None) and program.parse()
        program.parser().parse_args()
    except KeyboardInterrupt:
        pass
    return seen[0]._actions


def test_the_walk_sees_the_flags():
    assert {"lr", "seq_length", "seed", "rampup_batch_size", "exit_duration_in_mins"} <= {*NUMERIC}
    assert not {"split", "bf16"} & {*NUMERIC}


@pytest.mark.parametrize("name", NUMERIC)
def test_each_numeric_flag_of_a_run_has_a_range_and_keeps_it(name):
    field = FIELDS[name]
    within = field.metadata["within"]
    assert isinstance(within, Range), f"flags.py: {name} is a number and has no within="
    is_float = float in {field.type, *typing.get_args(field.type)}
    assert within.kind is (float if is_float else int)
    default = None if field.default is dataclasses.MISSING else field.default
    assert default is None or default in within
    many = field.metadata["nargs"] or 1
    for text in ("-1", "nan", "inf", "1e999" if is_float else "9" * 30, "1_0", "٣"):
        first, *rest = [text] * many
        with pytest.raises(ValueError, match=flag_name(name)) as caught:
            parse([*RUN, f"{flag_name(name)}={first}", *rest])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--min-lr -1e-5",
            "--min-lr: expected one argument|--min-lr must be at least 0, not -1e-05",
        ),
        ("--min-lr=-1e-5", "--min-lr must be at least 0, not -1e-05"),
        ("--weight-decay -0.1", "--weight-decay must be at least 0, not -0.1"),
        ("--clip-grad nan", "--clip-grad must be finite and at least 0, not nan"),
        ("--clip-grad .nan", "--clip-grad must be finite and at least 0, not nan"),
        ("--adam-beta1 1", r"--adam-beta1 must be in \[0, 1\), not 1.0"),
        ("--adam-beta2 1.5", r"--adam-beta2 must be in \[0, 1\), not 1.5"),
        ("--adam-eps 0", "--adam-eps must be at least 1e-37, not 0.0"),
        ("--adam-eps 1e-50", "--adam-eps must be at least 1e-37, not 1e-50"),
        ("--lr inf", "--lr must be finite and at least 0, not inf"),
        ("--lr 1e39", "--lr must be at most 3.40282e.38, not 1e.39"),
        ("--exit-duration-in-mins 0", r"--exit-duration-in-mins must be in \(0, 525600\], not 0.0"),
        (
            "--exit-duration-in-mins=-3",
            r"--exit-duration-in-mins must be in \(0, 525600\], not -3.0",
        ),
        ("--distributed-timeout-minutes 0", "--distributed-timeout-minutes must be in"),
        ("--rope-scaling-factor 0.5", "--rope-scaling-factor must be at least 1, not 0.5"),
        ("--norm-epsilon 0", r"--norm-epsilon must be in \[1e-37, 1\), not 0.0"),
        ("--init-method-std 0", "--init-method-std must be above 0, not 0.0"),
        ("--rotary-base 1", "--rotary-base must be above 1, not 1.0"),
        ("--pose-plain-fraction 1.01", r"--pose-plain-fraction must be in \[0, 1\], not 1.01"),
        ("--seed -1", r"--seed must be in \[0, 4294967295\], not -1"),
        ("--seed 4294967296", r"--seed must be in \[0, 4294967295\]"),
        ("--seq-length 2147483648", "--seq-length must be at most 2147483647, not 2147483648"),
        ("--seq-length 1e3", "--seq-length: '1e3' is not a whole number"),
        ("--loss-spike-factor 1", "--loss-spike-factor must be 0 or above 1, not 1.0"),
        ("--rampup-batch-size 2 0 8", "--rampup-batch-size must be at least 1, not 0"),
    ],
)
def test_a_number_out_of_range_is_named_with_the_range(words, message):
    with pytest.raises(ValueError, match=message):
        parse([*RUN, *words.split()])


@pytest.mark.parametrize("module", MODULES.values())
def test_each_numeric_flag_of_a_tool_has_a_range(module, monkeypatch):
    for action in tool_flags(module, monkeypatch):
        assert action.type not in (int, float), f"{action.option_strings}: give it a Range"
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert isinstance(action.type, Range) and action.default in action.type
        if isinstance(action.type, Range):
            for text in ("-1", "nan", "inf", "9" * 400, "1_0", "x", ""):
                with pytest.raises(argparse.ArgumentTypeError):
                    action.type(text)


def test_the_walk_over_tools_sees_their_flags(monkeypatch):
    counted = {
        flag
        for module in MODULES.values()
        for action in tool_flags(module, monkeypatch)
        if isinstance(action.type, Range)
        for flag in action.option_strings
    }
    assert {"--iteration", "--context-lengths", "--character-coverage", "--tokens"} <= counted
    assert {"--window", "--samples", "--needles", "--workers", "--seed"} <= counted


def test_needles_have_names():
    from pose_megatron.commands import evaluate_passkey
    from pose_megatron.evaluation.passkey import NAMES

    with pytest.MonkeyPatch.context() as patch:
        flags = tool_flags(evaluate_passkey.__name__.rpartition(".")[2], patch)
    (needles,) = [action for action in flags if "--needles" in action.option_strings]
    assert needles.type.most == len(NAMES)


def test_the_plugins_flags_have_ranges_too():
    from pose_megatron.megatron import flags

    numeric = [
        field.name
        for group, names in flags._OURS.items()
        for field in dataclasses.fields(group)
        if field.name in names and field.name in NUMERIC
    ]
    assert "pose_num_chunks" in numeric and "original_max_position_embeddings" in numeric
    for name in numeric:
        args = argparse.Namespace(
            position_embedding_type="rope",
            seq_length=32,
            max_position_embeddings=64,
            rope_scaling=None,
            rope_scaling_factor=None,
            rope_scaling_config=None,
            original_max_position_embeddings=None,
            fused_rotary=None,
            fused_cross_entropy=None,
            seed=1,
        )
        setattr(args, name, options(FIELDS[name])["type"]("-1"))
        with pytest.raises(ValueError, match=f"{flag_name(name)} must be .*, not -1"):
            flags.check_args(args)
    with pytest.raises(ValueError, match="--seed must be in"):
        flags.arguments_of(argparse.Namespace(seed=-1))
    with pytest.raises(ValueError, match="--rope-scaling-factor must be finite"):
        flags.model_flags_of(
            argparse.Namespace(
                rope_scaling="yarn",
                rope_scaling_factor=math.nan,
                rope_scaling_config=None,
                original_max_position_embeddings=None,
            )
        )


@pytest.mark.parametrize(
    "within, inside, outside",
    [
        (whole(1), [1, 2, 2**53], [0, -1, 2**53 + 1, math.nan, math.inf]),
        (real(above=0, at_most=1), [1e-300, 0.5, 1], [0, 1.0000001, math.nan, -math.inf]),
        (real(at_least=0, below=1), [0, 0.999], [1, -1e-9, math.inf]),
        (real(above=1, also=0), [0, 1.5], [1, 0.5, -1, math.nan]),
    ],
)
def test_ends_belong_to_a_range_or_do_not(within, inside, outside):
    assert all(value in within for value in inside)
    assert not any(value in within for value in outside)
