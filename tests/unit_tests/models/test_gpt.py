"""gpt.py and build.py against stock megatron-core at plain positions and transformers at any positions."""

import dataclasses
import math
import statistics

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import CudaGraphScope
from megatron.core.transformer.module import Float16Module
from transformers import LlamaConfig, LlamaForCausalLM

from pose_megatron.config.arguments import parse
from pose_megatron.models import build
from pose_megatron.models.build import build_model, initialize, transformer_config
from pose_megatron.models.gpt import PoseGPTModel, install_pose, softmax_scale
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import RopeScaling
from tests.whole_models import megatron_to_hf

pytestmark = pytest.mark.usefixtures("world")

TARGET, WINDOW, ORIGINAL, FACTOR = 131072, 48, 4096, 32.0
METHODS = ("none", "linear", "ntk", "yarn")
PLAIN = torch.arange(WINDOW).repeat(2, 1)
# Two samples, two different sets of jumps, up to the last position there is.
SKIPPED = torch.stack(
    [
        torch.cat(
            [torch.arange(20), torch.arange(70000, 70015), torch.arange(TARGET - 13, TARGET)]
        ),
        torch.cat([torch.arange(7), torch.arange(300, 330), torch.arange(100001, 100012)]),
    ]
)
TOKENS = torch.randint(301, (2, WINDOW), generator=torch.Generator().manual_seed(0))


def shape(method="none", groups=4, **options):
    scaling = RopeScaling() if method == "none" else RopeScaling(method, FACTOR, ORIGINAL)
    return ModelConfig(
        **{
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "num_query_groups": groups,
            "kv_channels": 16,
            "vocab_size": 301,
            "max_position_embeddings": TARGET,
            "rope_scaling": scaling,
            "untie_embeddings_and_output_weights": True,
        }
        | options
    )


def arguments(*words):
    return parse(["--train-iters", "1", *words])


@torch.no_grad()
def vivid(model):
    """Weights large enough that a wrong angle shows; norms that are not one."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


def ours(model: ModelConfig, *words) -> PoseGPTModel:
    return vivid(build_model(transformer_config(model, bf16="--bf16" in words), model))


def stock(model: ModelConfig, like: PoseGPTModel | None = None, **options) -> GPTModel:
    """megatron-core's own model: its layers, norms, attention and rotary embedding."""
    config = transformer_config(model)
    built = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        **{
            "vocab_size": model.padded_vocab_size,
            "max_sequence_length": TARGET,
            "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
            "position_embedding_type": "rope",
            "rotary_percent": model.rotary_percent,
            "rotary_base": model.rotary_base,
        }
        | options,
    )
    if like is not None:
        built.load_state_dict(like.state_dict())
    return built.eval()


@torch.no_grad()
def logits(model, positions, tokens=TOKENS):
    """[b, s, 301]"""
    return model(tokens, positions, None)[..., :301].float()


def far(one, other) -> float:
    return (one - other).abs().max().item()


# transformers' side.


def paper_frequencies(method: str, base: float = 10000.0) -> torch.Tensor:
    """float64 [8]: Chen et al. 2023 (linear), bloc97's NTK, Peng et al. 2023 (YaRN), by hand."""
    d, s = 16, FACTOR
    if method == "ntk":
        base *= s ** (d / (d - 2))
    theta = [base ** (-2 * i / d) for i in range(d // 2)]
    if method == "linear":
        theta = [t / s for t in theta]
    if method == "yarn":

        def dimension(turns):
            return d * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = math.floor(dimension(32)), math.ceil(dimension(1))
        ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(d // 2)]
        theta = [t * (1 - r) + t / s * r for t, r in zip(theta, ramp, strict=True)]
    return torch.tensor(theta, dtype=torch.float64)


class ExactRotary(torch.nn.Module):
    """transformers' rotary module, with its angles in float64."""

    def __init__(self, method):
        super().__init__()
        self.inv_freq = paper_frequencies(method)
        self.temperature = 0.1 * math.log(FACTOR) + 1 if method == "yarn" else 1.0

    def forward(self, x, position_ids, **_):
        angles = position_ids.double()[..., None] * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return [(f(angles) * self.temperature).to(x.dtype) for f in (torch.cos, torch.sin)]


def llama(model: ModelConfig, method: str, weights: PoseGPTModel) -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if method == "linear":
        rope |= {"rope_type": "linear", "factor": FACTOR}
    if method == "ntk":
        rope |= {"rope_theta": 10000.0 * FACTOR ** (16 / 14)}
    if method == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": FACTOR,
            "original_max_position_embeddings": ORIGINAL,
        }
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=301,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=model.num_query_groups,
            head_dim=16,
            max_position_embeddings=TARGET,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
            tie_word_embeddings=not model.untie_embeddings_and_output_weights,
            attn_implementation="eager",
        )
    )
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "padded_vocab_size",
    )
    tied = not model.untie_embeddings_and_output_weights
    tensors = megatron_to_hf(
        release_names(weights), tied=tied, **{name: getattr(model, name) for name in names}
    )
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    theirs.load_state_dict(tensors)
    return theirs.eval()


def release_names(model: GPTModel) -> dict[str, torch.Tensor]:
    """Norms under the names that checkpoints use."""
    return {
        name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
            "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
        ): tensor
        for name, tensor in model.state_dict().items()
        if "_extra_state" not in name
    }


@torch.no_grad()
def llama_logits(theirs, positions):
    mask = torch.full((WINDOW, WINDOW), -torch.inf).triu(1).expand(2, 1, -1, -1)
    return theirs(input_ids=TOKENS, position_ids=positions, attention_mask=mask).logits


# Against stock megatron-core.


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("untied", [True, False])
def test_plain_positions_give_the_stock_logits(groups, untied):
    model = shape(groups=groups, untie_embeddings_and_output_weights=untied)
    mine = ours(model)
    theirs = logits(stock(model, like=mine), None)
    assert theirs.abs().max() > 1
    assert far(logits(mine, PLAIN), theirs) < 1e-5
    assert far(logits(mine, SKIPPED), theirs) > 0.01  # and others do not


def test_a_shifted_window_gives_the_plain_logits():
    # RoPE is relative: far away, the same distances are the same numbers.
    mine = ours(shape())
    assert far(logits(mine, PLAIN + 100_000), logits(mine, PLAIN)) < 1e-5


@pytest.mark.parametrize("percent, base", [(0.5, 10000), (1.0, 500000)])
def test_partial_rotation_and_other_bases_give_the_stock_logits(percent, base):
    model = shape(rotary_percent=percent, rotary_base=base)
    mine = ours(model)
    assert far(logits(mine, PLAIN), logits(stock(model, like=mine), None)) < 1e-5


def test_training_losses_and_gradients_are_the_stock_ones():
    model = shape()
    mine = ours(model)
    theirs = stock(model, like=mine)
    labels = TOKENS.roll(-1, 1)
    for m, positions in ((mine, PLAIN), (theirs, None)):
        m(TOKENS, positions, None, labels=labels).mean().backward()
    for (name, p), (_, q) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


# Against transformers.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups, untied", [(4, True), (2, True), (2, False)])
def test_logits_are_those_of_transformers(method, groups, untied):
    model = shape(method, groups, untie_embeddings_and_output_weights=untied)
    mine = ours(model)
    theirs = llama(model, method, mine)
    plain, skipped = logits(mine, PLAIN), logits(mine, SKIPPED)
    assert far(plain, skipped) > 0.05 and skipped.abs().max() > 1
    assert far(plain, llama_logits(theirs, PLAIN)) < 1e-4
    assert far(skipped, llama_logits(theirs, SKIPPED)) < 5e-3  # their float32 angles
    theirs.model.rotary_emb = ExactRotary(method)
    assert far(plain, llama_logits(theirs, PLAIN)) < 1e-4
    assert far(skipped, llama_logits(theirs, SKIPPED)) < 1e-4


def test_each_row_of_a_batch_has_its_own_positions():
    mine = ours(shape("yarn"))
    both = logits(mine, SKIPPED)
    for row in range(2):
        alone = logits(mine, SKIPPED[row : row + 1], TOKENS[row : row + 1])
        assert far(both[row : row + 1], alone) < 1e-5
    assert far(logits(mine, SKIPPED.flip(0)), both) > 0.05


# Models built by others.


@pytest.mark.parametrize("method", METHODS)
def test_install_pose_makes_of_a_stock_model_the_same(method):
    model = shape(method)
    mine = ours(model)
    theirs = install_pose(stock(model, like=mine), model.rope_scaling)
    assert isinstance(theirs, GPTModel)
    assert far(logits(theirs, SKIPPED), logits(mine, SKIPPED)) < 1e-5
    assert list(theirs.state_dict()) == list(mine.state_dict())
    again = install_pose(theirs, model.rope_scaling)
    assert again is theirs and far(logits(again, SKIPPED), logits(mine, SKIPPED)) < 1e-5


# What a GPU fuses.


def test_swiglu_as_a_gpu_fuses_it_has_the_losses_and_gradients_of_its_pieces(monkeypatch):
    model = shape("yarn", groups=2)
    pieces = ours(model)
    with monkeypatch.context() as patch:
        patch.setattr(build, "device", lambda: torch.device("cuda"))
        config = transformer_config(model)
        assert not transformer_config(model, bias_swiglu_fusion=False).bias_activation_fusion
        other = shape(family="gptj", rotary_percent=0.5, kv_channels=16)
        assert not transformer_config(other).bias_activation_fusion  # no gate, no SiLU
    assert config.bias_activation_fusion and not transformer_config(model).bias_activation_fusion
    fused = vivid(build_model(config, model))
    losses = [one(TOKENS, SKIPPED, None, labels=TOKENS) for one in (fused, pieces)]
    assert far(*losses) < 1e-5
    for loss in losses:
        loss.mean().backward()
    wanted = dict(pieces.named_parameters())
    for name, parameter in fused.named_parameters():
        error = (parameter.grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        assert error < 1e-5, name


# Guards.


def test_a_stage_without_position_ids_says_so():
    mine = ours(shape())
    for _ in range(2):
        with pytest.raises(ValueError, match="no position ids reached this pipeline stage"):
            logits(mine, None)
        logits(mine, PLAIN)  # nothing stays bound for the next call


@pytest.mark.parametrize("ids", [PLAIN[0], PLAIN[:, :-1], PLAIN[..., None]])
def test_position_ids_of_another_shape_are_refused(ids):
    with pytest.raises(ValueError, match=rf"this rank needs \[b, {WINDOW}\]"):
        logits(ours(shape()), ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_position_ids_that_a_16_bit_model_has_cast_are_refused(dtype):
    with pytest.raises(ValueError, match="cannot hold most whole numbers above 256"):
        logits(ours(shape()), SKIPPED.to(dtype))


def test_packed_sequences_are_refused():
    mine, ends = ours(shape()), torch.tensor([0, 20, WINDOW], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=WINDOW,
        max_seqlen_kv=WINDOW,
    )
    with pytest.raises(ValueError, match=r"no packed \(THD\) sequences"):
        mine(TOKENS, PLAIN, None, packed_seq_params=packed)


def test_the_temperature_takes_exactly_one_route():
    extended, plain = shape("yarn"), shape()
    # Missing: stock model built without the scale.
    with pytest.raises(ValueError, match="needs config.softmax_scale = "):
        install_pose(stock(plain), extended.rope_scaling)
    # One too many: the scale is there, the scaling has none.
    with pytest.raises(ValueError, match="'none' needs config.softmax_scale = None"):
        install_pose(stock(extended), RopeScaling())
    # Twice: megatron-core's own yarn attributes multiply cos and sin as well.
    twice = stock(extended)
    twice.config.yarn_rotary_scaling_factor = FACTOR
    with pytest.raises(ValueError, match="no yarn_\\* attributes"):
        install_pose(twice, extended.rope_scaling)
    config = transformer_config(plain)
    with pytest.raises(ValueError, match="exactly one route"):
        PoseGPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=384,
            max_sequence_length=TARGET,
            rope_scaling=extended.rope_scaling,
        )


def test_the_scale_is_the_squared_temperature_over_root_d():
    scaling = RopeScaling("yarn", FACTOR, ORIGINAL)
    assert softmax_scale(16, 1.0, scaling) == pytest.approx((0.1 * math.log(32) + 1) ** 2 / 4)
    for method in ("linear", "ntk"):
        assert softmax_scale(16, 1.0, RopeScaling(method, FACTOR, ORIGINAL)) is None
    with pytest.raises(
        ValueError,
        match="--rope-scaling yarn has a temperature, which needs --rotary-percent 1.0, not 0.5",
    ):
        softmax_scale(16, 0.5, scaling)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"mtp_num_layers": 1}, "multi-token prediction"),
        ({"apply_rope_fusion": True}, "apply_rope_fusion"),
        ({"fused_single_qkv_rope": True}, "fused_single_qkv_rope expects one row of angles"),
        (
            {"cuda_graph_impl": "transformer_engine"},
            "cuda_graph_impl 'transformer_engine' over attention asks .* sample angles at capture",
        ),
        (
            {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": [CudaGraphScope.attn]},
            "cuda_graph_scope to 'mlp'",
        ),
        (  # its name from megatron-core 0.19 on
            {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [CudaGraphScope.attn]},
            r"cuda_graph_scope to 'mlp' \(cuda_graph_modules from 0.19 on\)",
        ),
    ],
)
def test_settings_that_would_rotate_wrongly_are_refused(setting, message):
    theirs = stock(shape())
    for name, value in setting.items():
        setattr(theirs.config, name, value)
    with pytest.raises(ValueError, match=message):
        install_pose(theirs)


@pytest.mark.parametrize("name", ["cuda_graph_scope", "cuda_graph_modules"])
@pytest.mark.parametrize(
    "implementation, scope",
    [("transformer_engine", [CudaGraphScope.mlp]), ("local", []), ("local", [CudaGraphScope.attn])],
)
def test_graphs_that_get_the_angles_of_each_micro_batch_are_fine(implementation, scope, name):
    theirs = stock(shape())
    theirs.config.cuda_graph_impl = implementation
    setattr(theirs.config, name, scope)
    install_pose(theirs)


@pytest.mark.parametrize("kind", ["learned_absolute", "none"])
def test_a_model_without_rotary_positions_is_refused(kind):
    with pytest.raises(ValueError, match=f"position_embedding_type='rope', not GPTModel .*{kind}"):
        install_pose(
            stock(
                shape(max_position_embeddings=64),
                position_embedding_type=kind,
                max_sequence_length=64,
            )
        )


def test_attention_masks_by_token_not_by_position():
    mine = ours(shape())
    backwards = PLAIN.flip(1) + 5  # every later token claims a smaller position
    before = logits(mine, backwards)
    changed = TOKENS.clone()
    changed[:, 30] = (changed[:, 30] + 1) % 301
    after = logits(mine, backwards, changed)
    assert far(before[:, :30], after[:, :30]) == 0
    assert (before[:, 30:] - after[:, 30:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_casting_to_bf16_leaves_the_angles_exact():
    model = shape("linear")
    exact = paper_frequencies("linear")
    for cast in (ours(model).bfloat16(), ours(model, "--bf16")):
        assert cast.rotary_pos_emb.inv_freq.dtype == torch.float64
        torch.testing.assert_close(cast.rotary_pos_emb.inv_freq, exact, rtol=1e-12, atol=0)
        assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    wrapped = Float16Module(transformer_config(model, bf16=True), ours(model, "--bf16"))
    rotary = wrapped.module.rotary_pos_emb
    assert rotary.inv_freq.dtype == torch.float64
    with rotary.bound(SKIPPED):
        angles = rotary(WINDOW)
    assert angles.shape == (WINDOW, 2, 1, 16) and angles.dtype == torch.float32
    expected = SKIPPED.t()[..., None].double() * exact
    for function in (torch.cos, torch.sin):
        torch.testing.assert_close(
            function(angles[:, :, 0, :8].double()), function(expected), rtol=0, atol=1e-6
        )


def test_the_model_adds_nothing_to_a_state_dict():
    model = shape("yarn")
    assert list(ours(model).state_dict()) == list(stock(model).state_dict())


# Fresh weights.


def fresh(seed=1, std=0.02, layers=6):
    model = shape(num_layers=layers)
    stage = build_model(transformer_config(model), model)
    initialize(stage, seed, std, layers)
    return dict(stage.named_parameters())


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_fresh_weights_have_the_spread_of_megatron_lm(std):
    layers = 6
    for name, weight in fresh(std=std, layers=layers).items():
        values = weight.detach().flatten().tolist()
        if "norm" in name:
            assert set(values) == {1.0}, name
            continue
        residual = "linear_proj" in name or "linear_fc2" in name
        expected = std / math.sqrt(2 * layers) if residual else std
        # Mean, spread and the share within one deviation of a normal law, to 5 standard errors.
        error = 5 / math.sqrt(len(values))
        assert abs(statistics.fmean(values)) < error * expected, name
        assert statistics.pstdev(values) == pytest.approx(expected, rel=error / 1.4), name
        within = sum(abs(v) < expected for v in values) / len(values)
        assert within == pytest.approx(0.6827, abs=error * 0.47), name


def test_fresh_weights_depend_on_seed_name_and_layer_alone():
    one, again, other, deeper = fresh(1), fresh(1), fresh(2), fresh(1, layers=7)
    seen = set()
    for name, weight in one.items():
        assert torch.equal(weight, again[name])
        if "norm" in name:
            continue
        assert not torch.equal(weight, other[name])
        if not ("linear_proj" in name or "linear_fc2" in name):  # their spread knows the depth
            assert torch.equal(weight, deeper[name])
        seen.add(tuple(weight.detach().flatten()[:4].tolist()))
    assert len(seen) == sum("norm" not in name for name in one)


def test_a_config_of_megatron_core_says_what_the_model_is():
    model = dataclasses.replace(shape("yarn", 2), norm_epsilon=1e-6)
    config = transformer_config(model, bf16=True)
    assert (config.num_query_groups, config.kv_channels, config.ffn_hidden_size) == (2, 16, 96)
    assert config.layernorm_epsilon == 1e-6 and config.params_dtype == torch.bfloat16
    assert config.softmax_scale == softmax_scale(16, 1.0, model.rope_scaling)
    assert config.calculate_per_token_loss and not config.apply_rope_fusion
