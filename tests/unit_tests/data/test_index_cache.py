"""index_cache.py: made once, whole or not there, shared by jobs that start together."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from pose_megatron.data.index_cache import cached
from tests.processes import PATIENCE


def table(seed: int) -> dict[str, np.ndarray]:
    return {
        "numbers": np.arange(seed, seed + 200_000),
        "few": np.array([seed], np.int32),
        "none": np.zeros(0, np.int16),
    }


def refuse():
    raise AssertionError("built again")


def test_what_was_built_once_is_mapped_from_then_on(tmp_path):
    folder = str(tmp_path / "deep" / "cache")
    built = cached(folder, {"name": "table", "seed": 7}, lambda: table(7))
    read = cached(folder, {"seed": 7, "name": "table"}, refuse)
    for arrays in (built, read):
        assert {k: (v.dtype, v.tolist()) for k, v in arrays.items()} == {
            k: (v.dtype, v.tolist()) for k, v in table(7).items()
        }
    assert isinstance(read["numbers"], np.memmap) and not read["numbers"].flags.writeable
    other = cached(folder, {"name": "table", "seed": 8}, lambda: table(8))
    assert other["few"].tolist() == [8]
    assert len(list(Path(folder).iterdir())) == 2


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cached(None, {}, lambda: table(1))["few"].tolist() == [1]
    assert not list(tmp_path.iterdir())


def _job(folder, barrier, results):
    wrong = 0
    for seed in range(20):
        barrier.wait()
        arrays = cached(folder, {"seed": seed}, lambda seed=seed: table(seed))
        wrong += arrays["numbers"].tolist() != list(range(seed, seed + 200_000))
        wrong += len(arrays["none"])
    results.put(wrong)


def test_jobs_that_start_together_share_whole_entries(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(3), fork.Queue()
    jobs = [fork.Process(target=_job, args=(str(tmp_path), barrier, results)) for _ in range(3)]
    for job in jobs:
        job.start()
    assert [results.get(timeout=PATIENCE) for _ in jobs] == [0, 0, 0]
    for job in jobs:
        job.join()
    assert len(list(tmp_path.iterdir())) == 20  # and no drafts


def test_a_failure_while_building_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError):
        cached(str(tmp_path), {"seed": 1}, refuse)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "gone", "foreign", "type"])
def test_a_damaged_entry_is_named(tmp_path, damage):
    cached(str(tmp_path), {"seed": 1}, lambda: table(1))
    (entry,) = tmp_path.iterdir()
    file = entry / "numbers.npy"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "gone":
        file.unlink()
    else:
        said = "not json" if damage == "foreign" else '{"arrays": 5}'
        (entry / "entry.json").write_text(said)
    with pytest.raises(ValueError, match=f"--data-cache-path .*{entry.name} is damaged .*delete"):
        cached(str(tmp_path), {"seed": 1}, refuse)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--data-cache-path .*file: cannot write there"):
        cached(str(tmp_path / "file"), {"seed": 1}, lambda: table(1))
