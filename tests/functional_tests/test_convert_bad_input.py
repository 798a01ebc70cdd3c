"""tools/checkpoint/convert.py on damaged weights, full disks, and when it is stopped half-way."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.functional_tests.families import CASES, convert_tool, make, stored
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "checkpoint" / "convert.py"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def run():
    return convert_tool()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    make(CASES["LLaMA 2"], folder)
    return folder


@pytest.fixture
def hf(llama, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(llama, tmp_path / "hf")


def words(load, save, *more, loader="hf", saver="megatron"):
    return ("--loader", loader, "--saver", saver, "--load-dir", load, "--save-dir", save, *more)


def change(folder, **tensors):
    save_file(stored(folder) | tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shards(folder):
    """Its weights in two files with an index, as the index."""
    tensors = stored(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
    total = sum(t.nbytes for t in tensors.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {n: file for file, part in files.items() for n in part},
    }


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
def test_legacy_bin_files(run, llama, hf, tmp_path, sharded):
    tensors = stored(hf)
    (hf / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        for file, part in (("x.bin", names[::2]), ("y.bin", names[1::2])):
            torch.save({n: tensors[n] for n in part}, hf / file)
        weight_map = {n: "x.bin" if i % 2 == 0 else "y.bin" for i, n in enumerate(names)}
        (hf / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, hf / "pytorch_model.bin")
    run(*words(hf, tmp_path / "out", saver="hf"))  # which is a way to safetensors
    back = stored(tmp_path / "out")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_an_index_that_does_not_fit_its_shards(run, hf, tmp_path, capsys):
    index = shards(hf)
    write_index(hf, index)
    run(*words(hf, tmp_path / "fine"))

    write_index(hf, index | {"metadata": {"total_size": 5}})
    run(*words(hf, tmp_path / "warned"))
    assert "warning: " in (err := capsys.readouterr().err) and "says 5 bytes of tensors" in err
    with pytest.raises(ValueError, match=r"says 5 bytes of tensors.*\(--strict\)"):
        run(*words(hf, tmp_path / "out", "--strict"))

    write_index(hf, index | {"weight_map": index["weight_map"] | {NORM: "b.safetensors"}})
    (name,) = {index["weight_map"][NORM]}
    wrong = "b.safetensors" if name == "a.safetensors" else "a.safetensors"
    write_index(hf, index | {"weight_map": index["weight_map"] | {NORM: wrong}})
    with pytest.raises(ValueError, match=f"shard {wrong} lacks {NORM}"):
        run(*words(hf, tmp_path / "out"))

    for wrong in (3, None, ["a.safetensors"], {"a": 1}):
        write_index(hf, index | {"weight_map": index["weight_map"] | {NORM: wrong}})
        with pytest.raises(ValueError, match=r"index\.json: weight_map names no file but"):
            run(*words(hf, tmp_path / "out"))

    write_index(hf, index)
    save_file(stored(hf), hf / "b.safetensors")
    with pytest.raises(ValueError, match="which another shard has too"):
        run(*words(hf, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_wrong_hashes_of_a_download(run, hf, tmp_path):
    note = hf / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    digest = hashlib.sha256((hf / "model.safetensors").read_bytes()).hexdigest()
    note.write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")
    run(*words(hf, tmp_path / "fine"))
    change(hf, **{NORM: torch.ones(64)})  # whole, and not what was downloaded
    with pytest.raises(ValueError, match=f"damaged: its sha256 is .*, should be {digest}"):
        run(*words(hf, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    run(*words(hf, tmp_path / "out", "--no-verify"))

    make(CASES["Meta LLaMA 2, 1 file"], tmp_path / "meta")
    (tmp_path / "meta" / "checklist.chk").write_text(f"{'0' * 32}  consolidated.00.pth\n")
    with pytest.raises(ValueError, match=f"consolidated.00.pth is damaged: its md5 .* {'0' * 32}"):
        run(*words(tmp_path / "meta", tmp_path / "out2", loader="meta"))


@pytest.mark.parametrize("saver", ["hf", "meta", "megatron"])
def test_overwrite_replaces_any_format_and_nothing_else(run, llama, tmp_path, saver):
    out = tmp_path / "out"
    run(*words(llama, out, saver=saver))
    (out / "stale").touch()
    with pytest.raises(ValueError, match="is not empty"):
        run(*words(llama, out, saver=saver))
    run(*words(llama, out, "--overwrite", saver=saver))
    assert not (out / "stale").exists() and len(list(out.iterdir())) >= 2
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="holds no checkpoint that --overwrite could replace"):
        run(*words(llama, mine, "--overwrite", saver=saver))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "photos"]
    assert [p.name for p in mine.iterdir()] == ["holiday.jpg"]


def test_a_tokenizer_that_is_not_sentencepiece(run, hf, tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's, as of LLaMA 3
    more = "--tokenizer-model", tmp_path / "tokenizer.model"
    with pytest.raises(ValueError, match="tokenizer.model is no SentencePiece model"):
        run(*words(hf, tmp_path / "out", *more, saver="hf"))


def test_values_that_are_no_numbers(run, hf, tmp_path, capsys):
    norm = torch.ones(64)
    norm[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    up = stored(hf)["model.layers.0.mlp.up_proj.weight"]
    up[5, 5] = float("nan")
    change(hf, **{NORM: norm, "model.layers.0.mlp.up_proj.weight": up})
    run(*words(hf, tmp_path / "out", "--json", tmp_path / "j"), "--no-verify")
    assert (
        "warning: 4 values are NaN or infinite, in decoder.layers.0.mlp.linear_fc1.weight and "
        "1 more tensors"
    ) in capsys.readouterr().err
    assert json.loads((tmp_path / "j").read_text())["nonfinite"] == 4
    run(*words(tmp_path / "out", tmp_path / "back", "--no-verify", loader="megatron", saver="hf"))
    again = stored(tmp_path / "back")[NORM]
    assert torch.equal(again.view(torch.int32), norm.view(torch.int32))  # carried all the same
    with pytest.raises(ValueError, match=r"NaN or infinite, in decoder.* \(--strict\)"):
        run(*words(hf, tmp_path / "strict", "--strict"))
    assert not (tmp_path / "strict").exists()


def test_values_that_the_new_precision_cannot_hold(run, hf, tmp_path):
    change(hf, **{NORM: torch.full((64,), 1e5)})
    run(*words(hf, tmp_path / "fine", "--strict", "--dtype", "bfloat16"))
    with pytest.raises(ValueError, match="64 values are NaN or infinite"):
        run(*words(hf, tmp_path / "out", "--strict", "--dtype", "float16"))


def start(load, save, before: str = "", **options) -> subprocess.CompletedProcess:
    """The tool in a process of its own, after some lines of Python."""
    code = (
        f"import sys, runpy; {before}\nsys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(TOOL), *map(str, words(load, save, "--no-verify"))],
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        **options,
    )


def test_a_disk_that_is_full(run, hf, tmp_path, monkeypatch):
    # A file that may not grow: what a quota does.
    done = start(
        hf, tmp_path / "out", "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (50_000, 50_000))"
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "convert.py: error: [Errno 27] File too large"
    # Too little room to start with.
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    with pytest.raises(ValueError, match="the weights take 0.00 GB, the disk has 0.00 GB free"):
        run(*words(hf, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_fills_up(run, hf, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], stderr=subprocess.DEVNULL
    ).returncode:
        pytest.skip("this root may not mount")
    try:
        with pytest.raises(ValueError, match="the disk has 0.00 GB free"):
            run(*words(hf, disk / "out"))
        plenty = shutil.disk_usage(tmp_path)  # as when another program fills it meanwhile
        monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
        for saver in ("megatron", "hf"):
            with pytest.raises(OSError, match="No space left on device"):
                run(*words(hf, disk / "out", saver=saver))
        assert not any(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_conversion_that_is_stopped_leaves_nothing_that_looks_whole(run, hf, tmp_path, sign):
    stop = (
        "import os, pose_megatron.checkpoints.megatron.torch_dist as w; put = w.DistcpWriter.put; w.DistcpWriter.put = lambda s, n,"
        f" t: (put(s, n, t), 'layers.1' in n and os.kill(os.getpid(), {int(sign)}))"
    )
    done = start(hf, tmp_path / "out", stop)
    assert done.returncode == (-sign if sign == signal.SIGKILL else 130), done.stderr
    assert "wrote" not in done.stdout and not (tmp_path / "out").exists()
    left = [p for p in tmp_path.iterdir() if p != hf]
    if sign == signal.SIGKILL:  # cannot be cleaned up after, nor be mistaken for a checkpoint
        assert {p.name for p in left} == {".out.draft", ".out.owner"}
        assert not [*tmp_path.rglob("metadata.json"), *tmp_path.rglob("latest*")]
    else:
        assert not left
    run(*words(hf, tmp_path / "out"))  # and it can be done again
    assert (tmp_path / "out" / "release" / "metadata.json").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {hf.name, "out"}
