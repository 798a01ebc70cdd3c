"""Conversion against its floor: reading and writing the same bytes with safetensors.

    python benchmarks/convert.py                     about 1 GB, in a temporary folder of this disk

For each direction, the median of several runs of tools/checkpoint/convert.py, each in its own
process: seconds from start to end, and peak resident memory. The floor is a process that imports
torch, calls safetensors' load_file and save_file, and puts the file on disk as the tool does
(fsync). All take turns, and read from the page cache. Each runs twice in a row, and the second time
counts: it writes into pages that the first has just freed, whereas a virtual machine may have to
ask its host for other ones, which takes a second and more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# torch is not imported here: a child process starts with its parent's peak memory.
TOOL = Path(__file__).resolve().parents[1] / "tools" / "checkpoint" / "convert.py"
FLOOR = """
import os, sys, torch
from safetensors.torch import load_file, save_file
save_file(load_file(sys.argv[1]), sys.argv[2])
os.fsync(os.open(sys.argv[2], os.O_RDONLY))
"""
ROPE = """
import sys
from pathlib import Path
from pose_megatron.checkpoints.huggingface import config_json, rope_check
folder = Path(sys.argv[1])
rope_check.rope_errors(folder, config_json.read_config(folder))
"""
MAKE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from pose_megatron.checkpoints.mapping import param_mappings
folder, shape = Path(sys.argv[1]), json.loads(sys.argv[2])
parts = {n: s for row in param_mappings(**shape) for n, s in row.parts.items()}
save_file({n: torch.randn(s, dtype=torch.bfloat16).mul_(0.02) for n, s in parts.items()},
          folder / "model.safetensors", metadata={"format": "pt"})
(folder / "config.json").write_text(json.dumps({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": shape["hidden_size"], "intermediate_size": shape["ffn_hidden_size"],
    "num_hidden_layers": shape["num_layers"], "num_attention_heads": shape["num_attention_heads"],
    "num_key_value_heads": shape["num_query_groups"], "vocab_size": shape["vocab_size"],
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 4096}))
"""
SHAPE = {  # 1.07 GB in bfloat16
    "num_layers": 8,
    "hidden_size": 2048,
    "ffn_hidden_size": 5504,
    "num_attention_heads": 16,
    "num_query_groups": 16,
    "kv_channels": 128,
    "vocab_size": 32000,
    "padded_vocab_size": 32000,
    "tied": False,
}


def run(*words) -> tuple[float, float]:
    """Seconds and peak resident MB of a Python process."""
    root = str(TOOL.parents[2])
    env = os.environ | {"PYTHONPATH": root}
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *map(str, words)], env=env, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(log.read().decode())
    return seconds, usage.ru_maxrss * 1024 / 1e6


def remove(path: Path) -> None:
    subprocess.run(["rm", "-rf", str(path)], check=True)
    os.sync()


def measure(folder: Path, repeats: int) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """({name: (seconds, MB) of each run}, bytes of the weights)."""
    hf, megatron, out = folder / "hf", folder / "megatron", folder / "out"
    hf.mkdir()
    run("-c", MAKE, hf, json.dumps(SHAPE))
    there = (TOOL, "--loader", "hf", "--saver", "megatron", "--load-dir", hf)
    back = (TOOL, "--loader", "megatron", "--saver", "hf", "--load-dir", megatron)
    run(*there, "--save-dir", megatron)
    jobs = {
        "torch": ("-c", "import torch"),
        "floor": ("-c", FLOOR, hf / "model.safetensors", out),
        "transformers asked for its rope": ("-c", ROPE, hf),
        "hf to megatron, --no-verify": (*there, "--save-dir", out, "--no-verify"),
        "megatron to hf, --no-verify": (*back, "--save-dir", out, "--no-verify"),
        "hf to megatron": (*there, "--save-dir", out),
        "megatron to hf": (*back, "--save-dir", out),
    }
    results = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, words in jobs.items():
            for _ in range(2):
                measured = run(*words)
                remove(out)
            results[name].append(measured)
    return results, (hf / "model.safetensors").stat().st_size


def table(results: dict[str, list[tuple[float, float]]]) -> str:
    """Medians as a Markdown table."""
    seconds = {name: statistics.median(s for s, _ in runs) for name, runs in results.items()}
    memory = {name: max(m for _, m in runs) for name, runs in results.items()}
    lines = ["| | seconds | of the floor | peak MB | above torch alone |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {seconds[name]:.1f} | {seconds[name] / seconds['floor']:.2f} | "
        f"{memory[name]:.0f} | {memory[name] - memory['torch']:.0f} |"
        for name in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="where to write [the system's temporary folder]")
    parser.add_argument("--repeats", type=int, default=3, help="[3]")
    parser.add_argument("--output", type=Path, help="write every run there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results, size = measure(Path(folder), args.repeats)
    print(f"{size / 1e9:.2f} GB of weights, {os.cpu_count()} cores, medians of {args.repeats}")
    print(table(results))
    if args.output:
        args.output.write_text(json.dumps({"bytes": size, "runs": results}) + "\n")


if __name__ == "__main__":
    main()
