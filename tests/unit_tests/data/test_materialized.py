"""materialized.py: what is written is what was drawn, for us and for stock megatron-core."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from pose_megatron.commands.inspect_checkpoint import inspect_token_files, token_files
from pose_megatron.config.flags import DataFlags
from pose_megatron.data import materialized
from pose_megatron.data.dataset import build_datasets
from pose_megatron.errors import ConfigError
from pose_megatron.positions.sampler import PoseSampler

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")
SAMPLES = 40


def drawn(corpus, samples=SAMPLES, **options):
    sampler = PoseSampler(64, 2048, num_chunks=3)
    return build_datasets(
        DataFlags(data_path=[corpus], split="1,0,0", seq_length=64),
        sampler,
        257,
        samples,
        0,
        **options,
    ).train


def description(**other):
    return {"window": 64, "target": 2048, "samples": SAMPLES, "law": "", "positions": {}} | other


@pytest.fixture
def written(world, stdlib_corpus, tmp_path):
    """A prefix, and the dataset that was written there."""
    data = drawn(stdlib_corpus)
    prefix = str(tmp_path / "out" / "pose")
    materialized.write(
        prefix,
        (data[i] for i in range(SAMPLES)),
        257,
        description(positions={"pose_num_chunks": 3}),
    )
    return prefix, data


def read(prefix, samples=SAMPLES, window=64, target=2048, vocab=257, asked=None, **options):
    flags = DataFlags(materialized=prefix, seq_length=window)
    return build_datasets(
        flags, PoseSampler(window, target), vocab, samples, 0, materialized_as=asked, **options
    ).train


def test_what_is_read_is_what_was_drawn(written):
    prefix, data = written
    stored = read(prefix, asked={"pose_num_chunks": 3})
    assert len(stored) == SAMPLES and stored.name(3) == f"sample 3 of {prefix}"
    for i in range(SAMPLES):
        for name in FIELDS:
            assert stored[i][name].dtype == data[i][name].dtype
            assert stored[i][name].tolist() == data[i][name].tolist()
    positions = read(prefix, samples=5, positions_only=True)
    assert list(positions[4]) == ["position_ids"] and len(positions) == 5
    assert positions[4]["position_ids"].tolist() == data[4]["position_ids"].tolist()


@pytest.mark.parametrize(
    "gone", [["tokens.idx"], ["labels.bin"], ["positions.bin", "positions.idx"]]
)
def test_inspect_misses_a_file(written, gone):
    prefix, _ = written
    every = [f"{prefix}_{part}" for part in ("labels", "positions", "tokens")]
    assert token_files(Path(prefix)) == every
    for name in gone:
        Path(f"{prefix}_{name}").unlink()
    with pytest.raises(ConfigError, match=f"{prefix}_{gone[0].partition('.')[0]}.*no such file"):
        inspect_token_files(token_files(Path(prefix)), as_json=True)


def test_any_trainer_can_read_the_files(written):
    prefix, data = written
    for part, name, dtype in (
        ("tokens", "tokens", np.uint16),
        ("labels", "labels", np.uint16),
        ("positions", "position_ids", np.int32),
    ):
        stock = IndexedDataset(f"{prefix}_{part}")
        flat = np.memmap(f"{prefix}_{part}.bin", dtype=dtype, mode="r", shape=(SAMPLES, 64))
        assert len(stock) == SAMPLES and len(stock.document_indices) == SAMPLES + 1
        for i in range(SAMPLES):
            assert stock[i].dtype == dtype
            assert stock[i].tolist() == flat[i].tolist() == data[i][name].tolist()


def test_the_bytes_are_those_of_megatron_cores_builder(written, tmp_path):
    prefix, data = written
    for part, name, dtype in (
        ("tokens", "tokens", np.uint16),
        ("labels", "labels", np.uint16),
        ("positions", "position_ids", np.int32),
    ):
        builder = IndexedDatasetBuilder(f"{tmp_path}/stock.bin", dtype=dtype)
        for i in range(SAMPLES):
            builder.add_document(data[i][name].tolist(), [64])
        builder.finalize(f"{tmp_path}/stock.idx")
        for ending in ("bin", "idx"):
            ours = Path(f"{prefix}_{part}.{ending}").read_bytes()
            assert ours == (tmp_path / f"stock.{ending}").read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 32}, "--seq-length 32: --materialized .* was written with 64"),
        ({"target": 1024}, "--max-position-embeddings 1024: the positions .* reach up to 2048"),
        ({"samples": 41}, "holds 40 samples, the run needs 41"),
        ({"asked": {"pose_num_chunks": 2}}, "--pose-num-chunks 2: .* was written with 3"),
        (
            {"asked": {"position_sampler": "cream"}},
            "--position-sampler cream: .* written with None",
        ),
    ],
)
def test_a_run_that_asks_for_something_else_is_told(written, options, message):
    with pytest.raises(ValueError, match=message):
        read(written[0], **options)


def test_a_token_beyond_the_vocabulary_names_the_sample(written):
    data = read(written[0], vocab=100)
    with pytest.raises(
        ValueError,
        match=r"token id 1\d\d in sample 3 is outside the vocabulary of "
        "100",
    ):
        data[3]


def test_damaged_and_foreign_files_are_named(written, make_corpus):
    prefix, _ = written
    path = Path(f"{prefix}_labels.bin")
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=f"--materialized {prefix}_labels: .*truncated or from"):
        read(prefix)
    path.write_bytes(content)
    other = make_corpus([[1] * 64] * (SAMPLES - 1))
    for ending in ("bin", "idx"):
        Path(f"{other}.{ending}").replace(f"{prefix}_labels.{ending}")
    with pytest.raises(ValueError, match="_labels.idx does not hold the samples"):
        read(prefix)
    Path(f"{prefix}.json").write_text('{"window": 64}')
    with pytest.raises(ValueError, match=f"{prefix}.json is not what tools/materialize_positions"):
        read(prefix)
    Path(f"{prefix}.json").unlink()
    with pytest.raises(ValueError, match=r"\.json is missing, so the files were never finished"):
        read(prefix)


@pytest.mark.parametrize("value", [-1, 2048, 1 << 30])
@pytest.mark.parametrize("positions_only", [True, False])
def test_a_position_out_of_range_names_the_sample(written, value, positions_only):
    path = Path(f"{written[0]}_positions.bin")
    positions = np.fromfile(path, np.int32)
    positions[3 * 64 + 5] = value
    positions.tofile(path)
    stored = read(written[0], positions_only=positions_only)
    assert stored[2]["position_ids"].max() < 2048
    with pytest.raises(ValueError, match=f"position {value} in sample 3 is outside .* of 2048"):
        stored[3]


@pytest.mark.parametrize("name", ["window", "target", "samples", "positions", "law"])
@pytest.mark.parametrize("value", ["64", -1, True, [1], None, float("nan")])
def test_a_header_of_wrong_types_is_named(written, name, value):
    path = Path(f"{written[0]}.json")
    if (name, value) != ("law", "64"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        with pytest.raises(ValueError, match="is not what tools/materialize_positions"):
            read(written[0])


def test_killed_while_writing_the_old_ones_stay_and_a_rerun_completes(written):
    prefix, data = written

    def dying():
        for i in range(SAMPLES):
            if i == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            yield data[39 - i]

    child = os.fork()
    if not child:
        try:
            materialized.write(prefix, dying(), 257, description(), overwrite=True)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert read(prefix)[39]["tokens"].tolist() == data[39]["tokens"].tolist()
    samples = [data[39 - i] for i in range(SAMPLES)]
    with pytest.raises(ValueError, match=rf"--output {prefix}: .*_tokens.bin exists; .*overwrite"):
        materialized.write(prefix, samples, 257, description())
    materialized.write(prefix, samples, 257, description(), overwrite=True)
    assert read(prefix)[39]["tokens"].tolist() == data[0]["tokens"].tolist()
    assert not list(Path(prefix).parent.glob(".*"))


def test_a_full_disk_leaves_the_old_ones(written):
    prefix, data = written
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        samples = (data[39 - i] for i in range(SAMPLES))
        try:
            materialized.write(prefix, samples, 257, description(), overwrite=True)
        except OSError:
            os._exit(7)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not list(Path(prefix).parent.glob(".*"))
    assert read(prefix)[39]["tokens"].tolist() == data[39]["tokens"].tolist()


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--output", "x", "--vocab-size", "9"],
            "--samples is missing: give it, or --train-samples",
        ),
        (["--output", "x", "--materialized", "y"], "--materialized names such files"),
        (["--output", "x", "--sampels", "1"], "unrecognized arguments: --sampels"),
    ],
)
def test_wrong_words_are_one_sentence(monkeypatch, capsys, words, message):
    from pose_megatron.commands import materialize

    monkeypatch.setattr(sys, "argv", ["materialize_positions.py", *words])
    # With a process group, which another test may have left, the program ends this process.
    monkeypatch.setattr("pose_megatron.runtime.cli._process_group", lambda: None)
    assert materialize.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("materialize_positions.py: error: ") and message in error
