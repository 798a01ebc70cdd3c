"""checkpoint.py: bit by bit there and back, by stock megatron-core's names; damage is noticed."""

import shutil

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from pose_megatron.checkpoints.mapping import param_mappings
from pose_megatron.checkpoints.megatron import directory
from pose_megatron.config.arguments import parse
from pose_megatron.config.layout import lay_out
from pose_megatron.config.sampler import build_sampler
from pose_megatron.errors import ConfigError
from pose_megatron.models.build import build_model, transformer_config
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import RopeScaling
from pose_megatron.training import checkpointing
from pose_megatron.training.run import Run
from pose_megatron.training.trainer import core_transformer_config_from_args, save, setup
from tests import whole_models

pytestmark = pytest.mark.usefixtures("world")

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=257,
    max_position_embeddings=256,
    untie_embeddings_and_output_weights=True,
    norm_epsilon=1e-6,
    rotary_base=50000.0,
    rope_scaling=RopeScaling("yarn", 8.0, 32),
)


def tied(model=MODEL, **more):
    values = {**model.to_dict(), "untie_embeddings_and_output_weights": False} | more
    return ModelConfig.from_dict(values)


def random_weights(model, dtype=torch.float32, seed=0):
    """Whole tensors by the names of the conversion table."""
    generator = torch.Generator().manual_seed(seed)
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
    rows = param_mappings(
        tied=not model.untie_embeddings_and_output_weights,
        **{name: getattr(model, name) for name in names},
    )
    return {row.name: torch.randn(row.shape, generator=generator).to(dtype) for row in rows}


def arguments(*words):
    return parse(["--train-iters", "4", "--seq-length", "32", *words])


def stage_of(model, *words):
    args = arguments(*words)
    return build_model(core_transformer_config_from_args(args, model), model)


def trainer_of(model, *words, loaded=None):
    args = arguments(*words)
    run = Run(
        args,
        model,
        build_sampler(args, model.max_position_embeddings),
        loaded=loaded,
        resume=loaded is not None and not args.checkpoint.finetune,
    )
    return setup(run, lay_out(args, model, 1))


def stepped(trainer, iteration=1):
    """After a step without gradients: the optimizer has its state, the weights only decay."""
    trainer.models[0].zero_grad_buffer()
    trainer.optimizer.step()
    trainer.iteration = iteration
    return trainer


def stock_keys(model) -> dict[str, tuple]:
    """Stored names and whole shapes, as stock megatron-core's GPTModel asks for them."""
    built = GPTModel(
        transformer_config(model),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=256,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
    )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = {}
    for name, entry in built.sharded_state_dict(metadata={"dp_cp_group": group}).items():
        if not name.endswith("_extra_state"):
            parts = entry.build() if hasattr(entry, "build_fn") else [entry]
            for part in parts if isinstance(parts, list) else parts.values():
                found[part.key] = tuple(part.global_shape)
    return found


def stored_keys(path) -> dict[str, tuple]:
    stored = dist_checkpointing.load_tensors_metadata(str(path))
    return {key: tuple(t.global_shape) for key, t in stored.items()}


def damage(path, left):
    """Cuts the file to `left` of its bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * left)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [MODEL, tied()], ids=["untied", "tied"])
def test_weights_come_back_bit_by_bit(tmp_path, model, dtype):
    tensors = random_weights(model, dtype)
    path = whole_models.write_weights(tmp_path / "out", tensors, model)
    assert path == tmp_path / "out" / "release"
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
    back, shape = whole_models.read_weights(tmp_path / "out")
    assert shape == model and set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor), name
    found = directory.find(tmp_path / "out")
    assert found.is_release and found.iteration == 0 and found.model == model


@pytest.mark.parametrize("model", [MODEL, tied()], ids=["untied", "tied"])
def test_a_release_has_the_names_that_stock_megatron_core_loads(tmp_path, model):
    path = whole_models.write_weights(tmp_path, random_weights(model), model)
    assert stored_keys(path) == stock_keys(model)


@pytest.mark.parametrize("model", [MODEL, tied()], ids=["untied", "tied"])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_training_checkpoint_has_the_names_of_stock_megatron_core(tmp_path, model, distributed):
    words = ["--use-distributed-optimizer"] if distributed else []
    trainer = stepped(trainer_of(model, "--save", str(tmp_path), *words))
    path = save(trainer)
    assert path == tmp_path / "iter_0000001"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
    stored = stored_keys(path)
    parameters = {k: v for k, v in stored.items() if not k.startswith("optimizer.")}
    assert parameters == stock_keys(model)
    # Each weight has its two moments and its main copy under megatron-core's names.
    for key, shape in stored.items():
        if key.startswith("optimizer."):
            weight = key.split(".", 3)[3]
            assert key.startswith("optimizer.state.") and parameters[weight] == shape, key
    moments = {k.split(".", 3)[3] for k in stored if k.startswith("optimizer.state.exp_avg_sq.")}
    assert moments == set(parameters)
    names = {
        "args",
        "checkpoint_version",
        "iteration",
        "opt_param_scheduler",
        "pose_megatron",
        "num_floating_point_operations_so_far",
    }
    found = directory.find(tmp_path)
    assert names <= set(found.common)
    assert found.common["args"].num_layers == 3 and found.common["args"].swiglu
    assert found.common["args"].position_embedding_type == "rope"


def test_a_stock_model_loads_a_release(tmp_path):
    tensors = random_weights(MODEL)
    path = whole_models.write_weights(tmp_path, tensors, MODEL)
    config = transformer_config(MODEL)
    stock = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=384,
        max_sequence_length=256,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = {
        k: v
        for k, v in stock.sharded_state_dict(metadata={"dp_cp_group": group}).items()
        if not k.endswith("_extra_state")
    }
    state = dist_checkpointing.load({"model": wanted}, str(path))["model"]
    for name, tensor in state.items():
        source = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
            "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
        )
        assert torch.equal(tensor, tensors[source]), name


def test_a_model_takes_the_weights_of_a_release(tmp_path):
    tensors = random_weights(MODEL)
    whole_models.write_weights(tmp_path, tensors, MODEL)
    stage = stage_of(MODEL)
    checkpointing.load(directory.find(tmp_path), [stage])
    parameters = dict(stage.named_parameters())
    assert torch.equal(parameters["output_layer.weight"], tensors["output_layer.weight"])
    for layer in range(3):
        ours, theirs = f"decoder.layers.{layer}.", f"decoder.layers.{layer}."
        assert torch.equal(
            parameters[ours + "input_layernorm.weight"],
            tensors[theirs + "self_attention.linear_qkv.layer_norm_weight"],
        )
        assert torch.equal(
            parameters[ours + "mlp.linear_fc1.weight"], tensors[theirs + "mlp.linear_fc1.weight"]
        )


def test_float32_weights_load_into_a_bf16_model(tmp_path):
    tensors = random_weights(MODEL)
    whole_models.write_weights(tmp_path, tensors, MODEL)
    stage = stage_of(MODEL, "--bf16")
    checkpointing.load(directory.find(tmp_path), [stage])
    weight = dict(stage.named_parameters())["output_layer.weight"]
    assert torch.equal(weight, tensors["output_layer.weight"].bfloat16())


def test_training_weights_can_be_read_for_export(tmp_path):
    trainer = trainer_of(MODEL, "--save", str(tmp_path))
    save(trainer)
    tensors, model = whole_models.read_weights(tmp_path)
    assert model == MODEL and set(tensors) == set(random_weights(MODEL))
    parameters = dict(trainer.stages[0].named_parameters())
    for layer in range(3):
        name = f"decoder.layers.{layer}.mlp.linear_fc2.weight"
        assert torch.equal(tensors[name], parameters[name])


def test_extra_state_of_several_experts_is_not_asked_for_either():
    """By megatron-core's names in its grouped experts of Transformer Engine."""
    experts = "decoder.layers.0.mlp.experts.linear_fc1."
    asked = dict.fromkeys([f"{experts}weight{i}" for i in range(3)])
    extra = dict.fromkeys([f"{experts}_extra_state{i}" for i in ("", 1, 2)])
    assert checkpointing._without_extra_state(asked | extra) == asked


def test_tokenizer_files_travel_with_the_weights(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    whole_models.write_weights(tmp_path / "out", random_weights(MODEL), MODEL, [tokenizer])
    found = directory.find(tmp_path / "out")
    assert [f.name for f in found.tokenizer_files] == ["tokenizer.json"]
    # Saving again into the same folder, from its own copies.
    whole_models.write_weights(
        tmp_path / "out", random_weights(MODEL), MODEL, found.tokenizer_files
    )
    assert found.tokenizer_files[0].read_text() == "{}"


def test_chat_templates_travel_through_a_run(tmp_path):
    """As transformers keeps them: in a folder of their own."""
    template = tmp_path / "additional_chat_templates" / "rag.jinja"
    template.parent.mkdir()
    template.write_text("{{ 'é' }}", encoding="utf-8")
    whole_models.write_weights(tmp_path / "in", random_weights(MODEL), MODEL, [template])
    words = "--finetune", "--load", str(tmp_path / "in"), "--save", str(tmp_path / "out")
    save(stepped(trainer_of(MODEL, *words, loaded=directory.find(tmp_path / "in"))))
    (kept,) = directory.find(tmp_path / "out").tokenizer_files
    assert kept == tmp_path / "out" / "tokenizer" / "additional_chat_templates" / "rag.jinja"
    assert kept.read_bytes() == template.read_bytes()


# What a killed run leaves, and damage.


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    whole_models.write_weights(folder, random_weights(MODEL), MODEL)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A good release checkpoint to break."""
    return shutil.copytree(written, tmp_path / "copy")


def test_a_folder_without_a_tracker_has_its_newest_whole_checkpoint(folder):
    (folder / directory.TRACKER).unlink()
    assert directory.exists(folder) and directory.find(folder).is_release
    for iteration in (2, 10, 9):
        (folder / f"iter_{iteration:07d}").mkdir()
        (folder / f"iter_{iteration:07d}" / "metadata.json").touch()
    (folder / "iter_0000011").mkdir()  # not whole
    with pytest.raises(ValueError, match="iter_0000010 is incomplete: .metadata is missing"):
        directory.find(folder)


def test_a_folder_without_anything_is_no_checkpoint(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is not a checkpoint folder: it has no latest_"):
        directory.find(tmp_path / "empty")
    assert not directory.exists(tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere is not a checkpoint folder"):
        directory.find(folder / "nowhere")


@pytest.mark.parametrize("word", ["", "iter_5", "-3", "1.5", "released"])
def test_a_tracker_that_says_neither_is_named(folder, word):
    (folder / directory.TRACKER).write_text(word)
    with pytest.raises(ValueError, match=f"says '{word}': neither an iteration nor 'release'"):
        directory.find(folder)


def test_a_tracker_that_is_binary_is_named(folder):
    (folder / directory.TRACKER).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=directory.TRACKER):
        directory.find(folder)


@pytest.mark.parametrize("word, name", [("7", "iter_0000007"), ("12345678", "iter_12345678")])
def test_an_iteration_that_is_not_there_is_named(folder, word, name):
    (folder / directory.TRACKER).write_text(word)
    with pytest.raises(ValueError, match=f"{name} is incomplete: metadata.json is missing"):
        directory.find(folder)
    with pytest.raises(ValueError, match="iter_0000009 is incomplete"):
        directory.find(folder, 9)


@pytest.mark.parametrize("name", ["metadata.json", "common.pt", ".metadata"])
def test_a_missing_file_is_named(folder, name):
    (folder / "release" / name).unlink()
    with pytest.raises(ValueError, match=f"release is incomplete: {name} is missing"):
        directory.find(folder)


@pytest.mark.parametrize("left", [0, 0.3, 0.9])
def test_a_truncated_common_file_is_named(folder, left):
    damage(folder / "release" / "common.pt", left)
    with pytest.raises(ValueError, match="release: common.pt cannot be read"):
        directory.find(folder)


@pytest.mark.parametrize(
    "name, left",
    [
        (".metadata", 0),
        (".metadata", 0.5),
        ("metadata.json", 0),
        ("*.distcp", 0),
        ("*.distcp", 0.5),
        ("*.distcp", 0.98),
    ],
)
def test_damage_is_an_error_of_one_sentence(folder, name, left):
    damage(max((folder / "release").glob(name), key=lambda f: f.stat().st_size), left)

    def loads(read):
        with pytest.raises(ValueError, match=f"checkpoint {folder / 'release'}.* ") as error:
            read()
        assert "\n" not in str(error.value)

    loads(lambda: whole_models.read_weights(folder))
    loads(lambda: checkpointing.load(directory.find(folder), [stage_of(MODEL)]))


def test_a_missing_shard_is_an_error(folder):
    for file in (folder / "release").glob("*.distcp"):
        file.unlink()
    with pytest.raises(ValueError, match="release cannot be loaded"):
        whole_models.read_weights(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"num_layers": 4},
        {"num_layers": 2},
        {"ffn_hidden_size": 128},
    ],
)
def test_a_model_of_another_shape_is_an_error(folder, change):
    other = ModelConfig.from_dict(MODEL.to_dict() | change)
    with pytest.raises(ValueError, match="release cannot be loaded"):
        checkpointing.load(directory.find(folder), [stage_of(other)])


def test_a_vocabulary_padded_otherwise_is_an_error(folder):
    other = ModelConfig.from_dict(MODEL.to_dict() | {"make_vocab_size_divisible_by": 1024})
    with pytest.raises(ValueError, match="vocabulary padded to .* the model one padded to 1024"):
        checkpointing.load(directory.find(folder), [stage_of(other)])


def test_training_does_not_resume_from_weights_alone(folder):
    with pytest.raises(ValueError, match="holds weights only: add --finetune"):
        trainer_of(MODEL, "--load", str(folder), loaded=directory.find(folder))


@pytest.mark.parametrize(
    "change, flags, message",
    [
        ({"make_vocab_size_divisible_by": 1024}, [], "the model one padded to 1024"),
        ({}, ["--use-distributed-optimizer"], "without --use-distributed-optimizer"),
    ],
)
def test_fallback_is_for_damage_alone(tmp_path, change, flags, message):
    """A checkpoint that is whole and does not fit the run is refused, with an older one beside it."""
    trainer = stepped(trainer_of(MODEL, "--save", str(tmp_path)))
    save(trainer)
    trainer.iteration = 2
    save(trainer)
    flags = ["--load", str(tmp_path), "--load-fallback", *flags]
    other = ModelConfig.from_dict(MODEL.to_dict() | change)
    with pytest.raises(ConfigError, match=message):
        trainer_of(other, *flags, loaded=directory.find(tmp_path))
    # The same run takes the older one where the latest is damaged.
    damage(tmp_path / "iter_0000002" / "__0_0.distcp", 0)
    resumed = trainer_of(
        MODEL, "--load", str(tmp_path), "--load-fallback", loaded=directory.find(tmp_path)
    )
    assert resumed.iteration == 1


def test_another_batch_size_goes_on_after_the_same_samples(tmp_path):
    trainer = stepped(trainer_of(MODEL, "--save", str(tmp_path), "--global-batch-size", "2"), 3)
    trainer.consumed_samples = 6
    save(trainer)
    resumed = trainer_of(
        MODEL, "--load", str(tmp_path), "--global-batch-size", "3", loaded=directory.find(tmp_path)
    )
    assert (resumed.iteration, resumed.consumed_samples, resumed.iterations) == (3, 6, 4)


def test_what_a_killed_save_left_is_never_picked_up(tmp_path):
    trainer = trainer_of(MODEL, "--save", str(tmp_path))
    save(trainer)
    trainer.iteration = 1
    left_over = save(trainer)
    # As if the second save had been killed before its end.
    (left_over / "metadata.json").unlink()
    (tmp_path / directory.TRACKER).write_text("0")
    assert directory.find(tmp_path).iteration == 0
    with pytest.raises(ValueError, match="iter_0000001 is incomplete"):
        directory.find(tmp_path, 1)
    save(trainer)  # and it can be written over
    assert directory.find(tmp_path).iteration == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_an_older_iteration_can_be_asked_for(tmp_path):
    trainer = trainer_of(MODEL, "--save", str(tmp_path))
    save(trainer)
    with torch.no_grad():
        trainer.stages[0].output_layer.weight.add_(1)
    trainer.iteration = 2
    save(trainer)
    new, old = (whole_models.read_weights(tmp_path, i)[0]["output_layer.weight"] for i in (None, 0))
    torch.testing.assert_close(new, old + 1)


def test_random_generators_of_another_device_are_left_and_said(world, capsys):
    def state():
        return [checkpointing._random_state().data[0]]

    (saved,) = state()
    torch.rand(1)
    before = torch.rand(3)
    checkpointing._restore_random_state([saved])
    torch.rand(1)
    assert torch.equal(torch.rand(3), before) and not capsys.readouterr().out

    saved["cuda_rng_state"] = torch.zeros(16, dtype=torch.uint8)  # as a GPU's is: seed and offset
    now = torch.cuda.get_rng_state()
    saved["torch_rng_state"] = torch.get_rng_state()
    checkpointing._restore_random_state([saved])
    assert torch.equal(torch.cuda.get_rng_state(), now)
    assert "saved on another kind of device" in capsys.readouterr().out
