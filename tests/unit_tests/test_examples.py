"""The multi-node examples say what pretrain_pose.py understands. Slurm and Kubernetes are not here:
their own commands are replaced by ones that print what they were told."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from pose_megatron.config.arguments import parse

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def submitted(tmp_path):
    """Runs the batch script where a job would run; returns what srun and scontrol were told."""

    def stub(name, *lines):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(["#!/usr/bin/env bash", *lines]) + "\n")
        path.chmod(0o755)

    def run(iteration: int) -> tuple[list[str], str]:
        stub(
            "srun",
            'printf "%q " "$@" > srun.txt',
            'mkdir -p "$RUN"',
            f'echo {iteration} > "$RUN/latest_checkpointed_iteration.txt"',
        )
        stub("scontrol", 'echo "$@" >> scontrol.txt', "echo node-7", "echo node-8")
        (tmp_path / ".venv/bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / ".venv/bin/activate").write_text("")
        env = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_NODELIST": "node-[7-8]",
            "SLURM_JOB_NUM_NODES": "4",
            "SLURM_JOB_ID": "31",
            "RUN": "run",
        }
        subprocess.run(["bash", EXAMPLES / "llama_pose_slurm.sh"], env=env, check=True)
        return (
            shlex.split((tmp_path / "srun.txt").read_text()),
            (tmp_path / "scontrol.txt").read_text(),
        )

    return run


def test_the_slurm_script_starts_one_agent_a_node_and_goes_in_line_again(submitted):
    words, control = submitted(iteration=600)
    at = words.index("pretrain_pose.py")
    launch, flags = words[:at], words[at:]
    assert launch[:2] == ["--kill-on-bad-exit=1", "torchrun"]
    assert launch[launch.index("--rdzv-endpoint") + 1] == "node-7:29400"
    assert launch[launch.index("--nnodes") + 1] == "4"
    args = parse(flags[1:])
    assert args.checkpoint.load == args.checkpoint.save == "run"
    assert args.training.exit_duration_in_mins == 700
    assert "requeue 31" in control
    for line in (EXAMPLES / "llama_pose_slurm.sh").read_text().splitlines():
        if "--time=" in line:
            assert "12:00:00" in line  # what MINUTES is derived from


def test_the_slurm_script_ends_with_the_last_step(submitted):
    assert "requeue" not in submitted(iteration=1000)[1]


def test_the_kubernetes_job_starts_what_the_slurm_script_starts(submitted):
    job = yaml.safe_load((EXAMPLES / "llama_pose_kubernetes.yaml").read_text())
    spec = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert spec["replicas"] == job["spec"]["elasticPolicy"]["minReplicas"] == 4
    pod = spec["template"]["spec"]
    program, script, *flags = pod["containers"][0]["command"]
    assert (program, script) == ("torchrun", "pretrain_pose.py")
    words = submitted(iteration=1000)[0]
    theirs, ours = parse(words[words.index("pretrain_pose.py") + 1 :]), parse(flags)
    assert ours.parallel == theirs.parallel and ours.model == theirs.model
    env = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
