"""The front door: `pose-megatron` finds its commands, and every program ends and speaks alike."""

import subprocess
import sys
import tomllib

import pytest

import pose_megatron
from pose_megatron.commands.__main__ import COMMANDS, MODULES

# Under Megatron-LM's names in tools/.
TOOLS = {
    "train-tokenizer": "train_tokenizer.py",
    "preprocess": "preprocess_data.py",
    "merge": "merge_datasets.py",
    "materialize": "materialize_positions.py",
    "plot-coverage": "plot_coverage.py",
    "convert": "checkpoint/convert.py",
    "verify": "checkpoint/verify.py",
    "inspect": "checkpoint/checkpoint_inspector.py",
    "plan": "plan.py",
    "evaluate-perplexity": "evaluate_perplexity.py",
    "evaluate-passkey": "evaluate_passkey.py",
    "evaluate-ruler": "evaluate_ruler.py",
    "plot": "plot_results.py",
    "report": "report.py",
}


@pytest.fixture
def call(root, tmp_path, monkeypatch):
    """call(*argv) -> the finished process of `python -m pose_megatron.commands`, elsewhere."""
    monkeypatch.setenv("PYTHONPATH", str(root))

    def run(*argv, program=("-m", "pose_megatron.commands")):
        return subprocess.run(
            [sys.executable, *program, *argv], cwd=tmp_path, capture_output=True, text=True
        )

    return run


def test_help_lists_every_command_in_the_order_of_the_job(call):
    done = call("--help")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("usage: pose-megatron COMMAND")
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [name for name in listed if name in TOOLS] == list(TOOLS) == list(MODULES)
    for group in COMMANDS.values():
        for _, summary in group.values():
            assert summary in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_help_loads_no_command(call):
    code = (
        "import sys; from pose_megatron.commands.__main__ import main\n"
        "sys.argv = ['pose-megatron', '--help']; main(); print('loaded', *sys.modules)"
    )
    loaded = set(call(program=("-c", code)).stdout.rpartition("loaded")[2].split())
    assert "pose_megatron.commands.__main__" in loaded
    assert not loaded & {"numpy", "torch", "megatron", "transformers"}
    assert not loaded & {f"pose_megatron.commands.{module}" for module in MODULES.values()}


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (["preproces"], 2, "there is no command 'preproces'; did you mean preprocess?"),
        (["perplexity"], 2, "did you mean evaluate-perplexity?"),
        (["zzz"], 2, "there is no command 'zzz'; see pose-megatron --help"),
    ],
)
def test_an_unknown_command_is_one_sentence(call, argv, code, message):
    done = call(*argv)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("pose-megatron: error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_asked_for_is_answered_with_the_usage(call):
    done = call()
    assert done.returncode == 2 and done.stderr.startswith("usage: pose-megatron")


def test_the_version_is_the_packages(call):
    assert call("--version").stdout == f"pose-megatron {pose_megatron.__version__}\n"


def test_exit_codes_and_names_pass_through(call, tmp_path):
    wrong = call("merge", "--input", "nowhere", "--output-prefix", "x")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("pose-megatron merge: error: ") and "nowhere" in wrong.stderr
    usage = call("merge", "--inptu", "a")
    assert usage.returncode == 2
    assert usage.stderr.startswith("usage: pose-megatron merge [-h]")
    assert "pose-megatron merge: error: the following arguments are required" in usage.stderr


@pytest.mark.parametrize("name", MODULES)
def test_every_command_says_how_it_is_used_without_what_it_needs(call, root, name):
    """The same words under both names, and no heavy package before there is work to do."""
    done = call(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: pose-megatron {name} [-h]")
    assert f"python tools/{TOOLS[name]}" in done.stdout.partition("example")[2]
    tool = call("--help", program=("-X", "importtime", str(root / "tools" / TOOLS[name])))
    assert tool.returncode == 0
    file = TOOLS[name].rpartition("/")[2]
    assert tool.stdout.startswith(f"usage: {file} [-h]")
    theirs, ours = (text.split("\n\n", 1)[1].split() for text in (tool.stdout, done.stdout))
    assert theirs == ours
    imported = {line.rpartition("|")[2].strip() for line in tool.stderr.splitlines()}
    assert not imported & {"torch", "megatron.core", "matplotlib", "transformers", "tokenizers"}


def test_pip_installs_one_command_the_types_and_one_home_of_metadata(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())
    scripts = project["project"]["scripts"]
    assert scripts == {"pose-megatron": "pose_megatron.commands.__main__:main"}
    assert project["tool"]["setuptools"]["package-data"] == {
        "pose_megatron": ["py.typed", "evaluation/*.j2"]
    }
    assert (root / "pose_megatron/py.typed").is_file()
    assert project["project"]["dynamic"] == ["version"]
    assert "install_requires" not in (root / "setup.py").read_text()
