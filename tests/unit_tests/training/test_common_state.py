"""The common state of a checkpoint where megatron-core keeps it: in common.pt up to 0.18, among the
tensors from 0.19 on. Checkpoints of each kind are written by stock megatron-core."""

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from pose_megatron.checkpoints.megatron import directory
from pose_megatron.checkpoints.megatron.torch_dist import open_weights
from pose_megatron.runtime.megatron_core import common_state_is_an_object
from pose_megatron.training.checkpointing import load
from pose_megatron.training.trainer import save
from tests.unit_tests.training.test_checkpointing import MODEL, stage_of, stepped, trainer_of

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def among_the_tensors(tmp_path, monkeypatch):
    """A run's checkpoint whose common state is an object only, as megatron-core 0.19 writes it; and
    the trainer that saved it."""
    stock = dist_checkpointing.save

    def save_with_object(state, *args, **kwargs):
        plain = {name: state[name] for name in ("args", "iteration", "pose_megatron")}
        plain["opt_param_scheduler"] = state["opt_param_scheduler"]
        plain["optimizer"] = {"param_state_sharding_type": "fully_sharded_model_space"}
        state["common_state"] = ShardedObject("common_state", plain, (1,), (0,))
        return stock(state, *args, **kwargs)

    if not common_state_is_an_object():
        monkeypatch.setattr(dist_checkpointing, "save", save_with_object)
    trainer = stepped(trainer_of(MODEL, "--save", str(tmp_path)))
    path = save(trainer)
    (path / "common.pt").unlink()
    return path, trainer


def test_it_is_found_and_read_without_common_pt(among_the_tensors):
    path, trainer = among_the_tensors
    found = directory.find(path.parent)
    assert (found.model, found.iteration, found.consumed_samples) == (MODEL, 1, 0)
    weights = open_weights(path.parent)
    norm = dict(trainer.stages[0].named_parameters())["decoder.final_layernorm.weight"]
    assert torch.equal(weights["decoder.final_layernorm.weight"], norm)


@pytest.mark.skipif(common_state_is_an_object(), reason="megatron-core 0.19 loads it")
def test_older_megatron_core_does_not_load_it_and_says_so(among_the_tensors):
    path, _ = among_the_tensors
    with pytest.raises(ValueError, match=r"has no common.pt, which megatron-core 0.1\S+ needs"):
        load(directory.find(path.parent), [stage_of(MODEL)])


@pytest.mark.skipif(not common_state_is_an_object(), reason="needs megatron-core 0.19")
def test_training_goes_on_from_it(among_the_tensors):
    path, trainer = among_the_tensors
    again = trainer_of(MODEL, loaded=directory.find(path.parent))
    assert again.iteration == 1
    for one, two in zip(again.stages[0].parameters(), trainer.stages[0].parameters(), strict=True):
        assert torch.equal(one, two)


def test_both_places_say_the_same(tmp_path):
    path = save(stepped(trainer_of(MODEL, "--save", str(tmp_path))))
    stored = directory.find(tmp_path).common
    if common_state_is_an_object():
        (path / "common.pt").unlink()
        assert directory.find(tmp_path).common == stored
    assert vars(stored["args"])["layernorm_epsilon"] == MODEL.norm_epsilon


def test_a_damaged_object_is_named(among_the_tensors):
    path, _ = among_the_tensors
    (file,) = (f for f in path.glob("*.distcp") if b"pose_megatron" in f.read_bytes())
    content = file.read_bytes()
    where = content.index(b"pose_megatron")  # a key of the common state
    file.write_bytes(content[: where - 200] + bytes(400) + content[where + 200 :])
    with pytest.raises(ValueError, match=r"common_state/shard_0_1 in __0_\d.distcp cannot be read"):
        directory.find(path.parent)
