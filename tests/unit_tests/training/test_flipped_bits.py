"""Single flipped bits in every file of a checkpoint: seen, or without any effect."""

import dataclasses
import random
import shutil
import zipfile
import zlib

import pytest
import torch

from pose_megatron.checkpoints.checksums import checksums
from pose_megatron.checkpoints.convert import convert
from pose_megatron.checkpoints.megatron import directory
from pose_megatron.checkpoints.megatron.torch_dist import open_weights
from pose_megatron.rope.scaling import RopeScaling
from pose_megatron.training.optimizer import parts
from pose_megatron.training.trainer import save
from tests.unit_tests.training.test_checkpointing import MODEL, stepped, trainer_of
from tests.unit_tests.training.test_hostile_checkpoints import start

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(scope="module")
def run(tmp_path_factory, world):
    root = tmp_path_factory.mktemp("run")
    save(stepped(trainer_of(MODEL, "--save", str(root))))
    return root


def state(root):
    """Everything that a resume gives, as bytes."""
    trainer = trainer_of(MODEL, "--checksums", loaded=directory.find(root))
    tensors = [*trainer.stages[0].parameters()]
    for part in parts(trainer.optimizer):
        for values in part.optimizer.state.values():
            tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    tensors.append(torch.get_rng_state())
    return [tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


FILES = [".metadata", "common.pt", "__0_0.distcp", "__0_1.distcp"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_seen_or_changes_nothing(run, tmp_path, name):
    if not (run / "iter_0000001" / name).is_file():
        pytest.skip("megatron-core from 0.19 on writes one file per rank")
    before, draw, seen, harmless = state(run), random.Random(0), 0, 0
    for _ in range(25):
        root = shutil.copytree(run, tmp_path / "run")
        file = root / "iter_0000001" / name
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        try:
            assert state(root) == before, f"bit {bit} of {name}"
            harmless += 1
        except ValueError as error:
            assert str(root) in str(error)
            seen += 1
        shutil.rmtree(root)
    print(f"{name}: {seen} seen, {harmless} without effect")


def test_a_weight_is_named_where_checksums_are_asked_for(run, tmp_path):
    root = shutil.copytree(run, tmp_path / "run")
    key = "decoder.final_layernorm.weight"
    weights = open_weights(root)
    (place,) = weights._chunks[key]
    flip(root / "iter_0000001" / place.file, 8 * weights._locate(key, place).offset)
    with pytest.raises(ValueError, match=rf"iter_0000001.*{key} in {place.file} is damaged"):
        start("--load", root, "--checksums")
    start("--load", root)
    with pytest.raises(ValueError, match=rf"{place.file} is damaged at {key}"):
        convert(root, tmp_path / "hf", loader="megatron", saver="hf", quiet=True)
    with checksums(False):
        convert(root, tmp_path / "hf", loader="megatron", saver="hf", quiet=True)


def test_a_common_state_of_another_iteration(run, tmp_path, capsys):
    root = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(root / "iter_0000001", root / "iter_0000002")
    (root / directory.TRACKER).write_text("2")
    with pytest.raises(ValueError, match="its common state is of iteration 1, not of 2"):
        start("--load", root)
    start("--load", root, "--load-fallback")
    (root / "iter_0000002" / "common.pt").write_bytes(b"PK\3\4 torn")
    with pytest.raises(ValueError, match=r"iter_0000002: common.pt cannot be read"):
        start("--load", root)
    start("--load", root, "--load-fallback")
    assert capsys.readouterr().out.count("falling back to") == 2


def test_meta_files_have_checksums_that_zlib_agrees_on(run, tmp_path):
    plain = dataclasses.replace(MODEL, rope_scaling=RopeScaling(), rotary_base=10000.0)
    trainer = stepped(trainer_of(plain, "--save", str(tmp_path / "run")))
    save(trainer)
    words = {"loader": "megatron", "saver": "meta", "quiet": True}
    convert(tmp_path / "run", tmp_path / "meta", **words)
    file = tmp_path / "meta" / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None  # Python's own reading of the CRC-32
        assert all(info.CRC == zlib.crc32(archive.read(info)) for info in archive.infolist())
    content = torch.load(file, map_location="meta", weights_only=True)
    flip(file, 8 * content["norm.weight"].untyped_storage()._checkpoint_offset)
    with pytest.raises(ValueError, match=r"consolidated.00.pth is damaged at norm.weight"):
        convert(tmp_path / "meta", tmp_path / "hf", loader="meta", saver="hf", quiet=True)
