"""log.py: what is counted and judged, against numbers that others count or that follow by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig

from pose_megatron.models.shape import ModelConfig
from pose_megatron.training.log import PEAKS, AnomalyDetector, JsonLines, _clock

LLAMA = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    vocab_size=128,
    attn_implementation="eager",
)
GPTJ = GPTJConfig(
    n_layer=2,
    n_embd=64,
    n_inner=96,
    n_head=4,
    rotary_dim=8,
    n_positions=64,
    vocab_size=128,
    attn_implementation="eager",
)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (LLAMA, {"num_query_groups": 2, "kv_channels": 24}),
        (GPTJ, {"num_query_groups": 4, "kv_channels": 16, "family": "gptj", "rotary_percent": 0.5}),
    ],
    ids=["llama", "gptj"],
)
def test_model_flops_are_those_that_torch_counts(theirs, ours):
    model = AutoModelForCausalLM.from_config(theirs)

    def counted(window):
        tokens = torch.arange(window)[None]
        with FlopCounterMode(display=False) as counter:
            model(tokens, labels=tokens).loss.backward()
        return counter.get_total_flops()

    window = 32
    ours = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=window,
        **ours,
    )
    # torch counts a w + b w^2, where b w^2 is attention to all keys; the mask leaves half of it.
    once, twice = counted(window), counted(2 * window)
    attention = (twice - 2 * once) / 2
    assert attention > 0.05 * once
    assert ours.flops_per_token(window) * window == pytest.approx(once - attention / 2)


def step(loss=2.0, updated=True, grad_norm=1.0):
    return SimpleNamespace(loss=loss, updated=updated, grad_norm=grad_norm)


def test_a_loss_far_above_the_last_ones_is_a_spike():
    watch = AnomalyDetector(1.5, 5)
    assert watch.judge(step(9.0)) is None  # nothing to compare with yet
    for _ in range(20):
        assert watch.judge(step(2.0)) is None
    assert watch.judge(step(2.99)) is None
    # 19 losses of 2.0 and one of 2.99.
    assert watch.judge(step(3.2)) == "loss spike, 3.2000 after a mean of 2.0495"
    assert AnomalyDetector.WINDOW == 20


def test_no_spikes_are_named_when_not_asked():
    watch = AnomalyDetector(0, 5)
    for _ in range(20):
        watch.judge(step(2.0))
    assert watch.judge(step(1e9)) is None


def test_skipped_steps_count_in_a_row():
    watch = AnomalyDetector(1.5, 3)
    bad = step(math.nan, False, math.inf)
    assert watch.judge(bad) == "skipped, loss nan and gradient norm inf (1 in a row)"
    assert watch.judge(bad).endswith("(2 in a row)") and not watch.gives_up
    assert watch.judge(step()) is None
    for _ in range(3):
        assert not watch.gives_up
        watch.judge(bad)
    assert watch.gives_up


def test_the_json_is_json_also_where_a_number_is_not(tmp_path):
    sink = JsonLines(str(tmp_path / "new" / "log.jsonl"))
    sink.write(3, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "samples": []})
    sink.close()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "new" / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "iteration": 3,
        "loss": "nan",
        "grad_norm": "inf",
        "lr": 0.5,
        "samples": [],
    }


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_clock(seconds, shown):
    assert _clock(seconds) == shown


def test_a_device_has_one_peak():
    for name in (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H200",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA H100 PCIe",
        "NVIDIA B200",
        "NVIDIA GH200 480GB",
    ):
        assert sum(part in name for part in PEAKS) == 1, name
