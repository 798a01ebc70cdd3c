"""Checkpoints that would run code: every program that loads one refuses it, or passes it over.

Each payload is first shown to run under torch's own loading, so that no test passes for nothing.
"""

import os
import pickle
import shutil

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader

from pose_megatron.checkpoints.convert import convert
from pose_megatron.checkpoints.megatron import directory
from pose_megatron.checkpoints.megatron.safe_loading import safe_loading
from pose_megatron.checkpoints.summary import compare, summarise
from pose_megatron.config.layout import lay_out
from pose_megatron.config.sampler import build_sampler
from pose_megatron.evaluation.parity import check
from pose_megatron.evaluation.target import find_target
from pose_megatron.training.run import Run, starting_point
from pose_megatron.training.trainer import save, setup
from tests.unit_tests.training.test_checkpointing import MODEL, arguments, stepped, trainer_of

pytestmark = pytest.mark.usefixtures("world")


class Payload:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def ran(marker, action) -> bool:
    """Whether `action` runs the payload; takes its trace away."""
    try:
        action()
    except Exception:
        pass
    try:
        marker.rmdir()
    except FileNotFoundError:
        return False
    return True


def in_metadata(path, payload):
    metadata = FileSystemReader(path).read_metadata()
    metadata.planner_data = payload
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return FileSystemReader(path).read_metadata


def in_object(path, payload, key="rng_state/shard_0.0_1.1"):
    """Among the tensors, where the index is told that `key` lies."""
    metadata = FileSystemReader(path).read_metadata()
    (info,) = (info for where, info in metadata.storage_data.items() if where.fqn == key)
    file = path / info.relative_path
    with open(file, "ab") as out:
        info.offset = out.tell()
        torch.save([payload], out)
        info.length = out.tell() - info.offset
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with open(file, "rb") as stored:
        stored.seek(info.offset)
        (path / "object").write_bytes(stored.read(info.length))
    return lambda: torch.load(path / "object", weights_only=False)


def in_common(path, payload):
    common = torch.load(path / "common.pt", weights_only=False)
    torch.save(common | {"more": payload}, path / "common.pt")
    return lambda: torch.load(path / "common.pt", weights_only=False)


def in_common_object(path, payload):
    """Where megatron-core from 0.19 on keeps it, and a checkpoint of its own has nothing else."""
    if COMMON_OBJECT not in FileSystemReader(path).read_metadata().state_dict_metadata:
        pytest.skip("megatron-core before 0.19 keeps it in common.pt alone")
    (path / "common.pt").unlink()
    return in_object(path, payload, COMMON_OBJECT)


COMMON_OBJECT = "common_state/shard_0_1"
PLACES = {
    "metadata": in_metadata,
    "object": in_object,
    "common": in_common,
    "common object": in_common_object,
}


def start(*words):
    args = arguments(*map(str, words))
    loaded, resume = starting_point(args.checkpoint)
    sampler = build_sampler(args, MODEL.max_position_embeddings)
    setup(Run(args, MODEL, sampler, loaded=loaded, resume=resume), lay_out(args, MODEL, 1))


PROGRAMS = {
    "resume": lambda root, hf: start("--load", root),
    "finetune": lambda root, hf: start("--load", root, "--finetune"),
    "pretrained": lambda root, hf: start("--pretrained-checkpoint", root),
    "evaluate": lambda root, hf: find_target(str(root), [32]).open_reader(64),
    "verify": lambda root, hf: check(directory.find(root), hf),
    "convert": lambda root, hf: convert(
        root, root.parent / "out", loader="megatron", saver="hf", quiet=True
    ),
    "inspect": lambda root, hf: compare(summarise(root), summarise(root), True),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory, world):
    """Two iterations of a run, and its export."""
    folder = tmp_path_factory.mktemp("clean")
    trainer = stepped(trainer_of(MODEL, "--save", str(folder / "run")))
    save(trainer)
    trainer.iteration = 2
    save(trainer)
    convert(folder / "run", folder / "hf", loader="megatron", saver="hf", quiet=True)
    return folder


@pytest.fixture(params=PLACES)
def hostile(request, clean, tmp_path):
    """A copy of the run whose latest checkpoint holds a payload; where; and the payload's marker."""
    root = shutil.copytree(clean / "run", tmp_path / "run")
    trust = PLACES[request.param](root / "iter_0000002", Payload(tmp_path / "marker"))
    assert ran(tmp_path / "marker", trust)
    return root, request.param, tmp_path / "marker"


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_program_runs_it(hostile, clean, program):
    root, place, marker = hostile
    if place == "object" and program != "resume":  # the state of random numbers, passed over
        PROGRAMS[program](root, clean / "hf")
    else:
        with pytest.raises(ValueError, match=r"cannot be|needs") as error:
            PROGRAMS[program](root, clean / "hf")
        assert str(root / "iter_0000002") in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_files_of_another_folder_are_not_read(clean, tmp_path, program):
    root = shutil.copytree(clean / "run", tmp_path / "run")
    path = root / "iter_0000002"
    metadata = FileSystemReader(path).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = str(clean / "run" / "iter_0000002" / info.relative_path)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    FileSystemReader(path).read_metadata()  # torch takes it
    with pytest.raises(ValueError, match=r"is no file of its folder"):
        PROGRAMS[program](root, clean / "hf")


def test_the_checkpoint_before_is_taken_with_load_fallback(hostile, capsys):
    root, _, marker = hostile
    start("--load", root, "--load-fallback")
    assert "falling back to" in capsys.readouterr().out
    assert not marker.exists()


def test_torch_is_itself_again_afterwards(clean):
    before = FileSystemReader.read_metadata
    path = str(clean / "run" / "iter_0000001")
    with safe_loading():
        assert FileSystemReader.read_metadata is not before
        safely = dist_checkpointing.load_tensors_metadata(path)
    assert FileSystemReader.read_metadata is before
    assert repr(dist_checkpointing.load_tensors_metadata(path)) == repr(safely)


def test_a_run_of_an_environment_that_trusts_is_safe(clean, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    root = shutil.copytree(clean / "run", tmp_path / "run")
    trust = in_common(root / "iter_0000002", Payload(tmp_path / "marker"))
    assert ran(tmp_path / "marker", trust)
    assert not ran(tmp_path / "marker", lambda: start("--load", root))


@pytest.mark.parametrize(
    ("loader", "name"),
    [("megatron", "iter_0000001/mp_rank_00/model_optim_rng.pt"), ("meta", "consolidated.00.pth")],
)
def test_other_files_of_torch(tmp_path, loader, name):
    file = tmp_path / "in" / name
    file.parent.mkdir(parents=True)
    torch.save({"args": Payload(tmp_path / "marker"), "model": {}}, file)
    assert ran(tmp_path / "marker", lambda: torch.load(file, weights_only=False))
    (tmp_path / "in" / directory.TRACKER).write_text("1")
    sizes = '{"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 257, "norm_eps": 1e-5}'
    (tmp_path / "in" / "params.json").write_text(sizes)
    with pytest.raises(ValueError, match=r"model_optim_rng\.pt|consolidated"):
        convert(tmp_path / "in", tmp_path / "out", loader=loader, saver="hf", quiet=True)
    assert not (tmp_path / "marker").exists()
