"""The multi-node examples say what pretrain_pose.py understands. Slurm and Kubernetes are not here:
their own commands are replaced by ones that print what they were told."""

import ast
import importlib
import inspect
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

    def run(iteration: int, script: str = "llama_pose_slurm.sh") -> tuple[list[str], str]:
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
        subprocess.run(["bash", EXAMPLES / script], env=env, check=True)
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


def test_the_slurm_script_for_megatrons_own_trainer_goes_on_from_its_last_checkpoint(submitted):
    words, control = submitted(600, "megatron/llama_pose_slurm.sh")
    (script,) = [word for word in words if word.endswith(".py")]
    assert (EXAMPLES.parent / script).is_file()
    flags = words[words.index(script) + 1 :]
    given = {name: flags[flags.index(name) + 1] for name in ("--load", "--save")}
    assert given == {"--load": "run", "--save": "run"}
    assert "--finetune" not in flags  # which would begin again at every start
    assert "requeue 31" in control
    assert "requeue" not in submitted(1000, "megatron/llama_pose_slurm.sh")[1].splitlines()[-1]


def bridge_recipe() -> ast.Module:
    return ast.parse((EXAMPLES / "megatron/bridge_recipe.py").read_text())


def test_the_bridge_recipe_says_first_what_it_needs():
    said = ast.get_docstring(bridge_recipe()).splitlines()[0]
    for package in ("Transformer Engine", "modelopt", "nvidia_resiliency_ext"):
        assert package in said


def test_the_bridge_recipe_knows_our_names():
    """Megatron-Bridge is not here; what it imports and calls of ours is."""
    tree, ours = bridge_recipe(), {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("pose_megatron"):
            module = importlib.import_module(node.module)
            if node.module == "pose_megatron.megatron":  # needs megatron.training
                assert {alias.name for alias in node.names} <= set(module.__all__)
                continue
            ours |= {alias.name: getattr(module, alias.name) for alias in node.names}
    called = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ours
    ]
    assert {node.func.id for node in called} == set(ours)
    for node in called:
        names = {word.arg: None for word in node.keywords if word.arg}
        inspect.signature(ours[node.func.id]).bind_partial(*node.args, **names)


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
