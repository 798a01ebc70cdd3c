"""What a class of rope.methods promises: it is all that a method needs; float32_error holds."""

import json
import runpy
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pose_megatron.config import arguments
from pose_megatron.errors import ConfigError
from pose_megatron.rope import scaling as scaling_module
from pose_megatron.rope.huggingface import from_hf, notes, options, to_hf
from pose_megatron.rope.interpolation import Interpolation, Pairs
from pose_megatron.rope.methods import METHODS
from pose_megatron.rope.names import METHOD_NAMES
from pose_megatron.rope.scaling import RopeScaling, attention_factor, inverse_frequencies


@dataclass(frozen=True)
class Halved(Interpolation):
    """theta_i / s for the slower half of the pairs; the faster half is unchanged."""

    beta_slow: float = 1.0

    name = "halved"
    needs_window = False
    hf_type = "halved"
    hf_required = frozenset({"factor", "beta_slow"})

    def __post_init__(self):
        super().__post_init__()
        if self.beta_slow > 9:
            raise ConfigError(f"rope scaling 'halved' with beta_slow {self.beta_slow} above 9")

    def stretch(self, pairs, length=None):
        stretch = torch.ones(len(pairs.frequencies), dtype=torch.float64)
        stretch[len(stretch) // 2 :] = self.factor
        return stretch

    def temperature(self):
        return 1.5

    def to_hf(self, pairs, window):
        return {"factor": float(self.factor), "beta_slow": float(self.beta_slow)}

    def notes(self, window):
        return [f"nobody else reads halved, up to {window}"]


@dataclass(frozen=True)
class Unspoken(Halved):
    """The same without a form of its own."""

    name = "unspoken"
    hf_type: ClassVar = "longrope"
    hf_required: ClassVar = None
    to_hf = Interpolation.to_hf


@pytest.fixture(autouse=True)
def two_more(monkeypatch):
    monkeypatch.setitem(METHODS, "halved", Halved)
    monkeypatch.setitem(METHODS, "unspoken", Unspoken)


def test_a_class_is_all_that_a_method_needs():
    """Base 16 and d = 4: theta is 1 and 1/4."""
    scaling = RopeScaling("halved", 8.0, beta_slow=2.0)
    assert str(scaling) == "halved x8"
    assert scaling == RopeScaling(**asdict(scaling)) != RopeScaling("halved", 8.0)
    assert inverse_frequencies(4, 16.0, scaling).tolist() == [1.0, 1 / 32]
    assert attention_factor(scaling) == 1.5
    over = RopeScaling("halved", 2.0, over=RopeScaling("linear", 4.0))
    assert inverse_frequencies(4, 16.0, over).tolist() == [1 / 4, 1 / 32]
    for wrong, said in [
        ({"beta_slow": 10.0}, "'halved' with beta_slow 10.0 above 9"),
        ({"beta_fast": 4.0}, "'halved' has no beta_fast; .* choose yarn or yarn_revised"),
        ({"factor": 0.5}, "factor 0.5 must be at least 1"),
        ({"beta_slow": "2"}, "beta_slow '2' must be a finite number"),
    ]:
        with pytest.raises(ConfigError, match=said):
            RopeScaling(**{"method": "halved", "factor": 2.0} | wrong)
    with pytest.raises(ConfigError, match="'su' is not one of none, linear, .*, halved"):
        RopeScaling("su")


def test_an_option_of_its_own_is_a_field(monkeypatch):
    @dataclass(frozen=True)
    class Shared(Halved):
        share: float = 0.5  # no other method has it

        name = "shared"

    monkeypatch.setitem(METHODS, "shared", Shared)
    with_it = runpy.run_path(scaling_module.__file__)["RopeScaling"]  # as if at import
    assert asdict(with_it("shared", 2.0, share=0.25))["share"] == 0.25
    with pytest.raises(ConfigError, match="'linear' has no share; remove 0.25 or choose shared"):
        with_it("linear", 2.0, share=0.25)


def test_its_name_is_a_choice_of_the_flags():
    assert (*METHOD_NAMES, "halved", "unspoken") == tuple(METHODS)  # a line in names.py as well
    flags = ["--train-iters", "1", "--rope-scaling"]
    for name in METHOD_NAMES:
        assert arguments.parse([*flags, name]).model.rope_scaling == name
    with pytest.raises(ConfigError, match="'quartered' .*choose from .*'dynamic'"):
        arguments.parse([*flags, "quartered"])
    assert options('{"rope_type": "halved", "beta_slow": 2}') == {
        "method": "halved",
        "beta_slow": 2,
    }


def test_its_form_goes_out_and_in():
    scaling = RopeScaling("halved", 8.0, beta_slow=2.0)
    config = to_hf(scaling, base=16.0, rotary_dim=4, max_position_embeddings=64)
    keys = {"rope_type": "halved", "factor": 8.0, "beta_slow": 2.0}
    assert config["rope_parameters"] == {**keys, "rope_theta": 16.0}
    assert config["rope_scaling"] == {**keys, "type": "halved"}
    assert from_hf(json.loads(json.dumps(config))) == (16.0, scaling)
    assert notes(scaling, 64) == ["nobody else reads halved, up to 64"]
    with pytest.raises(ConfigError, match="'halved' needs beta_slow"):
        from_hf({"rope_scaling": {"type": "halved", "factor": 8.0}})


def test_without_a_form_it_is_a_longrope():
    scaling = RopeScaling("unspoken", 8.0)
    config = to_hf(scaling, base=16.0, rotary_dim=4, max_position_embeddings=64)
    assert config["rope_scaling"]["rope_type"] == "longrope"
    assert config["rope_scaling"]["long_factor"] == [1.0, 8.0]
    assert config["original_max_position_embeddings"] == 8
    _, back = from_hf(config)
    assert back == RopeScaling("longrope", 8.0, 8, long_factor=(1.0, 8.0), attention_factor=1.5)


def test_an_option_that_methods_share_has_one_default():
    defaults = {(field.name, field.default) for m in METHODS.values() for field in fields(m)}
    assert len(defaults) == len({name for name, _ in defaults})


def error_in_transformers(scaling, dim, base, **options):
    keys = {
        "rope_theta": base,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
    config = SimpleNamespace(
        rope_parameters=keys | options,
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        standardize_rope_params=lambda: None,
    )
    theirs, _ = ROPE_INIT_FUNCTIONS[scaling.method](config, "cpu")
    ours = inverse_frequencies(dim, base, scaling)
    return (theirs.double() - ours).abs() / ours


def explained(scaling, dim, base):
    """What rope_check allows of each frequency."""
    pairs = Pairs.unscaled(dim, base)
    return 1e-6 + scaling.interpolation.float32_error(pairs)


any_rope = (
    st.integers(2, 128).map(lambda pairs: 2 * pairs),
    st.floats(300, 1e7),
    st.integers(64, 200_000),
    st.floats(1, 128),
    st.floats(0.3, 4.0),
    st.one_of(st.floats(1.001, 1.1), st.floats(1.05, 64)),
)


@settings(deadline=None)
@given(*any_rope, st.booleans())
def test_float32_explains_what_yarn_is_off(dim, base, window, factor, slow, ratio, truncate):
    options = {"beta_fast": slow * ratio, "beta_slow": slow, "truncate": truncate}
    scaling = RopeScaling("yarn", factor, window, **options)
    off = error_in_transformers(scaling, dim, base, **options)
    assert (off <= explained(scaling, dim, base)).all()


@settings(deadline=None)
@given(*any_rope)
def test_float32_explains_what_llama3_is_off(dim, base, window, factor, low, ratio):
    options = {"low_freq_factor": low, "high_freq_factor": low * ratio}
    scaling = RopeScaling("llama3", factor, window, **options)
    off = error_in_transformers(scaling, dim, base, **options)
    assert (off <= explained(scaling, dim, base)).all()


def test_a_narrow_ramp_of_yarn_is_off_by_more_than_any_other_rounding():
    options = {"beta_fast": 8.0, "beta_slow": 2.5, "truncate": False}
    scaling = RopeScaling("yarn", 9.0, 2317, **options)
    off, most = error_in_transformers(scaling, 64, 1e3, **options), explained(scaling, 64, 1e3)
    assert 1e-6 < off.max() < 1e-5 and (off <= most).all() and most.max() < 1e-5
    slower = RopeScaling("yarn", 9.0, 2317, **{**options, "beta_slow": 2.49})  # another rope
    assert error_in_transformers(slower, 64, 1e3, **options).max() > 1e-4
