"""run.yaml means what YAML 1.2 says (https://yaml.org/spec/1.2.2/#103-core-schema), or is refused."""

import json

import pytest

from pose_megatron.config.arguments import parse
from pose_megatron.errors import ConfigError


def of(tmp_path, text, *words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse(["--config", str(path), "--train-iters", "5", *words])


@pytest.mark.parametrize(
    "text, message",
    [
        ("seq-length: 16\nseq-length: 32\n", "line 2: seq-length is in line 1 already"),
        ("seq-length: 16\nseq-length: 16\n", "line 2: seq-length is in line 1 already"),
        ("seq-length: 16\n\nseq_length: 32\n", "line 3: seq_length is seq-length of line 1 again"),
        ("bf16: true\nno-bf16: true\n", "line 2: no-bf16 is bf16 of line 1 again"),
        ("no_bf16: true\nno-bf16: true\n", "line 2: no-bf16 is no_bf16 of line 1 again"),
        ("lr:\nlr: 1\n", "line 2: lr is in line 1 already"),
        ("swiglu: true\nno-swiglu: false\n", "no-swiglu is swiglu of line 1 again"),
        (
            "rope-scaling-config:\n  beta_fast: 16\n  beta_fast: 8\n",
            "line 3: beta_fast is in line 2 already",
        ),
        ("rope-scaling-config: {a: {b: 1, b: 2}}\n", "b is in line 1 already"),
    ],
)
def test_what_is_there_twice_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        of(tmp_path, text)
    assert str(caught.value).startswith(f"--config {tmp_path}/run.yaml, line ")


def test_one_file_is_enough(tmp_path):
    with pytest.raises(ConfigError, match=r"--config .*run.yaml and --config b.yaml: keep one"):
        of(tmp_path, "lr: 1\n", "--config", "b.yaml")


def test_a_key_twice_in_json_is_refused_too():
    from pose_megatron.rope.huggingface import options as rope_options

    with pytest.raises(ConfigError, match="--rope-scaling-config .*beta_fast twice"):
        rope_options('{"beta_fast": 16, "beta_fast": 8}')


def test_a_mapping_where_a_flag_takes_json(tmp_path):
    text = (
        "rope-scaling-config: {beta_fast: 16, attention_factor: 1e0, long_factor: [1, 2.5, 0x10],"
        " truncate: false, name: '8', other: yes, none: null, ten: 010, eight: 0o10}\n"
    )
    assert json.loads(of(tmp_path, text).model.rope_scaling_config) == {
        "beta_fast": 16,
        "attention_factor": 1.0,
        "long_factor": [1, 2.5, 16],
        "truncate": False,
        "name": "8",
        "other": "yes",
        "none": None,
        "ten": 10,
        "eight": 8,
    }
    block = "rope-scaling-config:\n  beta_fast: 16\n  long_factor:\n  - 1\n  - 2\n"
    assert json.loads(of(tmp_path, block).model.rope_scaling_config)["long_factor"] == [1, 2]
    as_text = "rope-scaling-config: '{\"beta_fast\": 16}'\n"
    assert of(tmp_path, as_text).model.rope_scaling_config == '{"beta_fast": 16}'


def test_a_list_where_a_flag_takes_one(tmp_path):
    assert of(tmp_path, "split: [969, 30, 1]\n").data.split == "969,30,1"
    assert of(tmp_path, "split: 969,30,1\n").data.split == "969,30,1"
    assert of(tmp_path, "data-path: [0.30, x, '0.7', y]\n").data.data_path == "0.30 x 0.7 y".split()
    assert of(tmp_path, "data-path: x\n").data.data_path == ["x"]
    words = "train-samples: 99\nglobal-batch-size: 8\nrampup-batch-size: [2, 2, 50]\n"
    (tmp_path / "run.yaml").write_text(words)
    args = parse(["--config", str(tmp_path / "run.yaml")])
    assert args.training.rampup_batch_size == [2, 2, 50]
    schedule = "pose-target-schedule: [0:8192, 64000:131072]\n"
    assert of(tmp_path, schedule).position.pose_target_schedule == ["0:8192", "64000:131072"]


def test_values_mean_what_yaml_1_2_says(tmp_path):
    """Where version 1.1, PyYAML's, has octal 8, base 60, a word and a date."""
    t = of(tmp_path, "seed: 010\nlr: 1e-4\nmin-lr: 1e-5\nadam-eps: 1E-8\nclip-grad: .5\n").training
    assert (t.seed, t.lr, t.min_lr, t.adam_eps, t.clip_grad) == (10, 1e-4, 1e-5, 1e-8, 0.5)
    run = of(
        tmp_path, "wandb-exp-name: yes\nwandb-project: 2026-01-01\nlog-file: 1_000\nload: on\n"
    )
    assert (run.logging.wandb_exp_name, run.logging.wandb_project) == ("yes", "2026-01-01")
    assert (run.logging.log_file, run.checkpoint.load) == ("1_000", "on")
    assert of(tmp_path, "tensorboard-dir: 007\n").logging.tensorboard_dir == "007"
    assert of(tmp_path, "tensorboard-dir: true\n").logging.tensorboard_dir == "true"
    for null in ("", "~", "null", "NULL"):
        assert of(tmp_path, f"tensorboard-dir: {null}\n").logging.tensorboard_dir is None
    assert of(tmp_path, "tensorboard-dir: 'null'\n").logging.tensorboard_dir == "null"
    assert of(tmp_path, "tensorboard-dir: --bf16\n").logging.tensorboard_dir == "--bf16"
    assert of(tmp_path, "bf16: True\nsequence-parallel: FALSE\n").training.bf16
    assert of(tmp_path, "no-bf16: false\n").training.bf16


@pytest.mark.parametrize(
    "text, message",
    [
        *((f"bf16: {said}\n", f"bf16 is a switch, true or false, not {said}")
          for said in ("1", "0", "yes", "no", "on", "off", "y", "'true'", "tRue")),
        ("bf16: [true]\n", "bf16 is a switch, true or false, not a list"),
        ("no-bf16: 1\n", "no-bf16 is a switch, true or false, not 1"),
        ("swiglu: 1\n", "swiglu is a switch"),
        ("seq-length: 1_000\n", "seq-length: '1_000' is not a whole number"),
        ("seq-length: 1:30\n", "seq-length: '1:30' is not a whole number"),
        ("seq-length: 0o20\n", "seq-length: '0o20' is not a whole number"),
        ("seq-length: 1e3\n", "seq-length: '1e3' is not a whole number"),
        ("seq-length: true\n", "seq-length: 'true' is not a whole number"),
        ("lr: fast\n", "lr: 'fast' is not a number"),
        ("lr: .nan\n", "--lr must be finite and at least 0, not nan"),
        ("lr: -.inf\n", "--lr must be finite and at least 0, not -inf"),
        ("lr: [1, 2]\n", "lr takes one value, not a list"),
        ("lr: {a: 1}\n", "lr takes no mapping"),
        ("data-path: {x: 0.3}\n", "data-path takes no mapping"),
        ("data-path: []\n", "data-path takes at least 1 values, not 0"),
        ("data-path: [a, [b]]\n", "data-path: a list holds values"),
        ("data-path: [a, {b: 1}]\n", "data-path: a list holds values"),
        ("data-path: [a, null]\n", "data-path: a list holds values"),
        ("rampup-batch-size: [1, 2]\n", "rampup-batch-size takes 3 values, not 2"),
        ("rope-scaling-config: [1]\n", "rope-scaling-config takes one value, not a list"),
        ("split: {train: 969}\n", "split takes no mapping"),
        ("rope-scaling: linaer\n", "rope-scaling: 'linaer' is none of none, linear"),
        ("seed: !!int '3'\n", "tags such as .*int are not read"),
        ("seed: !!python/object/apply:os.system [x]\n", "tags such as .* are not read"),
        ("? [a]\n: b\n", "a name must be a word"),
        ("no-lr: true\n", "unknown name 'no-lr'"),
        ("<<: {lr: 1}\n", "unknown name '<<'"),
        ("attention-dropout: none\n", "attention-dropout: 'none' is not a number"),
    ],
)  # fmt: skip
def test_what_a_flag_does_not_take_is_refused_by_name_and_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        of(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_flag_wins_over_the_file_whatever_it_says(tmp_path):
    assert of(tmp_path, "seed: 3\nbf16: true\n", "--seed", "4", "--no-bf16").training.seed == 4
