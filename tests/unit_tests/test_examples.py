"""The multi-node examples say what pretrain_pose.py understands, and lm_eval.sh what lm_eval does.
Slurm, Kubernetes and lm_eval are not here: their own commands are replaced by ones that print what
they were told."""

import ast
import importlib
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
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


# As much of lm_eval as the script calls: four questions, "right" as a folder's file of weights says.
LM_EVAL = """
import json, pathlib, sys
words = sys.argv[1:]
with open("told.txt", "a") as told:
    print(json.dumps(words), file=told)
after = dict(zip(words, words[1:]))
if words[0] == "run":
    task, folder = after["--tasks"], json.loads(after["--model_args"])["pretrained"]
    right = json.loads(pathlib.Path(folder, "weights").read_text())
    if task not in right:
        sys.exit("lm_eval: killed")
    out = pathlib.Path(after["--output_path"]).parent
    shots, mean = int(after.get("--num_fewshot", 3)), sum(right[task]) / len(right[task])
    said = {"acc,none": mean, "f1,none": 0.1, "best,none": float(mean < 0.4)}
    results = {"results": {task: said}, "n-shot": {task: shots}}
    (out / "out_2026.json").write_text(json.dumps(results))
    with open(out / f"samples_{task}_2026.jsonl", "w") as samples:
        for i, value in reversed([*enumerate(right[task])]):
            row = {"doc_id": i, "filter": "none", "metrics": ["acc", "f1", "best"]}
            row |= {"acc": value, "f1": [0, 1], "best": 0 if task == "arc" else "no number"}
            print(json.dumps(row), file=samples)
"""


@pytest.fixture
def short_tasks(tmp_path):
    """Runs lm_eval.sh on folders in tmp_path; returns it, and what lm_eval was told."""
    (tmp_path / "lm_eval-1.dist-info").mkdir()
    (tmp_path / "lm_eval-1.dist-info/METADATA").write_text("Name: lm_eval\nVersion: 1\n")
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval/__main__.py").write_text(LM_EVAL)

    def run(*folders, path=str(Path(sys.executable).parent), **variables):
        done = subprocess.run(
            ["bash", EXAMPLES / "lm_eval.sh", *folders],
            cwd=tmp_path,
            env=os.environ
            | {"PATH": f"{path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
            | {"OUT": str(tmp_path / "out")}
            | variables,
            capture_output=True,
            text=True,
        )
        told = tmp_path / "told.txt"
        words = (
            [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
        )
        told.unlink(missing_ok=True)
        return done, words

    return run


def export(folder, **right):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_text(json.dumps(right))


def test_short_context_tasks_are_compared_question_by_question(short_tasks, tmp_path):
    export(tmp_path / "my base", arc=[1, 1, 0, 0], piqa=[1, 1, 1, 1])
    export(tmp_path / "long", arc=[1, 0, 0, 0], piqa=[1, 1, 0, 1])
    done, told = short_tasks("my base", "long/", TASKS="arc:25 piqa", DEVICE="cpu", BATCH="2")
    assert done.returncode == 0, done.stderr
    assert told[0] == ["validate", "--tasks", "arc,piqa"] and len(told) == 5
    model = json.dumps({"pretrained": str((tmp_path / "my base").resolve())})
    assert told[1][:5] == ["run", "--model", "hf", "--model_args", model]
    assert "--device cpu --batch_size 2 --tasks arc --num_fewshot 25" in " ".join(told[1])
    assert "--num_fewshot" not in told[2] and not any("--trust_remote_code" in t for t in told)
    # "best" is no mean, though by chance it looks like one for the base model.
    # Of 1 1 0 0 the variance is 1/3, of 1 0 0 0 and of the differences 0 -1 0 0 it is 1/4.
    assert done.stdout.splitlines()[-2:] == [
        "| arc | 25 | acc | 4 | 50.00 ± 28.87 | 25.00 ± 25.00 | -25.00 ± 25.00 |",
        "| piqa | 3 | acc | 4 | 100.00 ± 0.00 | 75.00 ± 25.00 | -25.00 ± 25.00 |",
    ]


def test_short_context_tasks_that_are_done_are_not_done_again(short_tasks, tmp_path):
    for name in ("base", "long"):
        export(tmp_path / name, arc=[0, 1])
    done, told = short_tasks("base", "long", TASKS="arc piqa")
    assert done.returncode == 1 and done.stderr.strip() == "lm_eval: killed" and len(told) == 3
    done, told = short_tasks("base", "long", TASKS="arc")
    assert done.returncode == 0 and [words[0] for words in told] == ["validate", "run"]
    done, told = short_tasks("base", "long", TASKS="arc")
    assert done.returncode == 0 and not told and done.stdout.count(" is done: ") == 2
    os.utime(tmp_path / "long/weights", (1, 1))  # older than its results, and yet another
    done, told = short_tasks("base", "long", TASKS="arc")
    assert [words[0] for words in told] == ["validate", "run"] and "long" in told[1][4]
    assert len(short_tasks("base", "long", TASKS="arc:0")[1]) == 3


@pytest.mark.parametrize(
    "names, variables, sentence",
    [
        (["base"], {}, "usage: bash examples/lm_eval.sh BASE EXTENDED"),
        (["base", "nowhere"], {}, "nowhere: no such folder"),
        (["base", "empty"], {}, "empty has no config.json, so it is not a Hugging Face folder"),
        (["base", "run/"], {}, "--saver hf --load-dir run/ --save-dir run-hf"),
        (["base", "a run"], {}, r"--load-dir a\ run --save-dir a\ run-hf"),
        (["base", "run/iter_0000001"], {}, "run/iter_0000001 is a Megatron checkpoint; export it"),
        (["base", "base"], {"INCLUDE": "nowhere"}, "nowhere: no such folder"),
        (["base", "base"], {"path": "bin"}, "lm_eval is not installed; install it with: pip inst"),
    ],
)
def test_folders_that_lm_eval_cannot_read_are_named(
    short_tasks, tmp_path, names, variables, sentence
):
    export(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/iter_0000001").mkdir(parents=True)
    (tmp_path / "run/iter_0000001/.metadata").write_text("")
    shutil.copytree(tmp_path / "run", tmp_path / "a run")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 1\n")  # a Python without lm_eval
    (tmp_path / "bin/python").chmod(0o755)
    done, told = short_tasks(*names, **variables)
    assert done.returncode == 1 and sentence in done.stderr and not told
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
