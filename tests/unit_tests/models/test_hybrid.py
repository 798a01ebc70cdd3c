"""HybridModel driven by position ids, against transformers and stock megatron-core."""

import dataclasses
import logging

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from packaging.version import Version

from pose_megatron.config.arguments import parse
from pose_megatron.errors import ConfigError
from pose_megatron.models.build import build_model, initialize, transformer_config
from pose_megatron.models.gpt import PoseGPTModel, install_pose
from pose_megatron.rope.scaling import RopeScaling
from pose_megatron.runtime import megatron_core
from tests.hybrid_models import hybrid_name, needs_hybrid, stock_hybrid
from tests.unit_tests.models.test_gpt import (
    PLAIN,
    SKIPPED,
    ExactRotary,
    far,
    llama,
    llama_logits,
    logits,
    ours,
    shape,
    stock,
)

pytestmark = pytest.mark.usefixtures("world")
PATTERN = "*-*-"


def hybrid(model, pattern=PATTERN, like: PoseGPTModel | None = None, **options):
    built = stock_hybrid(model, transformer_config(model), pattern, **options)
    if like is not None:
        built.load_state_dict({hybrid_name(k): v for k, v in like.state_dict().items()})
    return built.eval()


def installed(model, pattern=PATTERN, like=None):
    return install_pose(
        hybrid(model, pattern, like), model.rope_scaling, model.rotary_base, model.rotary_percent
    )


# What it computes.


@needs_hybrid
@pytest.mark.parametrize("method", ["none", "linear", "yarn"])
def test_a_hybrid_model_has_the_logits_of_transformers(method):
    model = shape(method, groups=2)
    weights = ours(model)
    theirs = llama(model, method, weights)
    theirs.model.rotary_emb = ExactRotary(method)
    mine = installed(model, like=weights)
    assert mine.rotating_layers == (1, 3)
    for positions in (PLAIN, SKIPPED):
        assert far(logits(mine, positions), llama_logits(theirs, positions)) < 1e-4
    assert far(logits(mine, PLAIN), logits(mine, SKIPPED)) > 0.05


@needs_hybrid
def test_plain_positions_give_the_logits_of_the_stock_hybrid_model():
    model = shape(rotary_percent=0.5, rotary_base=50000.0)
    theirs = hybrid(model, "M*-*")
    before = logits(theirs, PLAIN)
    assert far(logits(theirs, SKIPPED), before) == 0  # what PoSE is for
    mine = install_pose(theirs, RopeScaling(), 50000.0, 0.5)
    assert far(logits(mine, PLAIN), before) < 1e-5
    assert far(logits(mine, SKIPPED), before) > 1e-3


@needs_hybrid
def test_attention_layers_rotate_and_the_log_says_which(caplog):
    with caplog.at_level(logging.INFO):
        mine = installed(shape(), "M*-M*|-")
    assert mine.rotating_layers == (2, 5)
    assert "of 6 layers, these rotate by their position ids: 2, 5" in caplog.text


@needs_hybrid
@pytest.mark.parametrize("options", [{}, {"untie_embeddings_and_output_weights": False}])
def test_fresh_weights_are_those_of_a_gpt_model(options):
    model = shape(num_layers=3, **options)
    built = {}
    for kind in ("gpt", "hybrid"):
        config = transformer_config(model, model_class=kind)
        built[kind] = build_model(config, model, model_class=kind)
        initialize(built[kind], 1, 0.02, 3)
    weights = dict(built["hybrid"].named_parameters())
    expected = {hybrid_name(k): v for k, v in built["gpt"].named_parameters()}
    assert set(weights) == set(expected) and built["hybrid"].rotating_layers == (1, 3, 5)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


# Bad input.


@needs_hybrid
def test_a_hybrid_model_needs_the_rope_that_it_was_built_with():
    model = shape(rotary_base=50000.0)
    with pytest.raises(ConfigError, match="HybridModel does not keep its rotary_base: hand "):
        install_pose(hybrid(model))
    with pytest.raises(ConfigError, match="does not keep its rotary_percent"):
        install_pose(hybrid(model), rotary_base=50000.0)
    with pytest.raises(ConfigError, match="rotary_base 50010 does not give the frequencies"):
        install_pose(hybrid(model), rotary_base=50010, rotary_percent=1.0)
    with pytest.raises(ConfigError, match="gives 8 rotary dimensions, .* was built with 16"):
        install_pose(hybrid(model), rotary_base=50000, rotary_percent=0.5)


@needs_hybrid
@pytest.mark.parametrize(
    "pattern, message",
    [
        ("MMM-", r"pattern 'MMM-' has no attention layer \('\*'\)"),
        ("*-/*-", r"'\*-/\*-': multi-token prediction"),
    ],
)
def test_patterns_without_positions_of_their_own_are_refused(pattern, message):
    theirs = hybrid(shape(), pattern.split("/")[0])
    theirs.hybrid_layer_pattern = pattern  # multi-token layers need more settings to be built
    with pytest.raises(ConfigError, match=message):
        install_pose(theirs, rotary_base=10000, rotary_percent=1.0)


@needs_hybrid
def test_a_hybrid_model_without_rope_is_refused():
    with pytest.raises(ConfigError, match="position_embedding_type='rope', not HybridModel with"):
        install_pose(hybrid(shape(), position_embedding_type="none"))


@needs_hybrid
def test_a_hybrid_stage_without_position_ids_says_so():
    mine = installed(shape())
    for _ in range(2):
        with pytest.raises(ConfigError, match="no position ids reached this pipeline stage"):
            logits(mine, None)
        logits(mine, PLAIN)


def test_layers_that_rotate_by_themselves_are_refused():
    latent = stock(shape())
    latent.config.multi_latent_attention = True
    with pytest.raises(ConfigError, match="multi_latent_attention: MLA rotates by an embedding"):
        install_pose(latent)

    from megatron.core.transformer.attention import CrossAttention

    other = stock(shape())
    other.decoder.layers[1].self_attention.__class__ = CrossAttention
    with pytest.raises(ConfigError, match="layer 2 has CrossAttention, which does not take its"):
        install_pose(other)


def test_a_second_call_changes_nothing_or_is_refused():
    mine = install_pose(stock(shape()), RopeScaling("linear", 4.0, 64))
    rotary, kind = mine.rotary_pos_emb, type(mine)
    assert install_pose(mine, RopeScaling("linear", 4.0, 64)) is mine
    with pytest.raises(
        ConfigError, match="already, with rope scaling 'linear x4.* to install 'linear x8"
    ):
        install_pose(mine, RopeScaling("linear", 8.0, 64))
    assert mine.rotary_pos_emb is rotary and type(mine) is kind


def test_a_base_that_is_not_the_models_is_refused():
    with pytest.raises(ConfigError, match="rotary_base 500000 is not the model's, .* 10000"):
        install_pose(stock(shape()), rotary_base=500000)


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "Float16Module"])
def test_a_wrapped_model_is_refused(wrapper):
    model, config = stock(shape()), transformer_config(shape(), bf16=True)
    wrapped = Float16Module(config, model)
    if wrapper == "DistributedDataParallel":
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), wrapped)
    with pytest.raises(ConfigError, match=f"that {wrapper} wraps already: .* before DDP or Float"):
        install_pose(wrapped)


@needs_hybrid
def test_what_has_no_hybrid_layers_is_refused():
    from pose_megatron.models.hybrid import PoseHybridModel, hybrid_stack_spec

    gptj = dataclasses.replace(shape(rotary_percent=0.5), family="gptj")
    with pytest.raises(ConfigError, match="ParallelLayer cannot be split into; use --model-class"):
        build_model(transformer_config(gptj, model_class="hybrid"), gptj, model_class="hybrid")
    config = transformer_config(shape(), model_class="hybrid")
    with pytest.raises(ConfigError, match="hybrid layer 'M' has no implementation without Trans"):
        PoseHybridModel(
            config,
            hybrid_stack_spec(config),
            vocab_size=384,
            max_sequence_length=256,
            hybrid_layer_pattern="M*--",
        )
    with pytest.raises(ConfigError, match="--transformer-impl transformer_engine: .* install"):
        hybrid_stack_spec(config, "transformer_engine")
    config.num_moe_experts = 4
    with pytest.raises(ConfigError, match="no experts .--num-experts 4. .* use --model-class gpt"):
        hybrid_stack_spec(config)


@needs_hybrid
@pytest.mark.parametrize("experts, pattern", [(None, "*-*-|*-*-"), (4, "*E*E|*E*E")])
def test_layers_of_experts_have_a_letter_of_their_own(experts, pattern):
    """megatron-core's hybrid stack takes `-` for a dense MLP, whatever the config says of experts."""
    from pose_megatron.models.hybrid import layer_pattern

    config = transformer_config(shape(num_layers=4), model_class="hybrid")
    config.pipeline_model_parallel_size, config.num_moe_experts = 2, experts
    assert layer_pattern(config) == pattern


def test_an_older_megatron_core_is_refused(monkeypatch):
    monkeypatch.setattr(megatron_core, "megatron_core_version", lambda: Version("0.18.0"))
    message = "--model-class hybrid needs megatron-core 0.19, not 0.18.0: pip install 'megatron-co"
    with pytest.raises(ConfigError, match=message):
        parse(["--train-iters", "1", "--model-class", "hybrid"])
    config = transformer_config(shape(), model_class="hybrid")
    with pytest.raises(ConfigError, match=message):
        build_model(config, shape(), model_class="hybrid")
