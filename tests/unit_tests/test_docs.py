"""The documents keep their promises: links lead somewhere, commands exist and know the flags shown,
and whatever a user chooses by name has its place on a page."""

import ast
import contextlib
import doctest
import functools
import io
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import pose_megatron
from pose_megatron.checkpoints.formats import FORMATS
from pose_megatron.commands.__main__ import MODULES
from pose_megatron.config import arguments
from pose_megatron.errors import flag_name
from pose_megatron.evaluation.tasks import TASKS
from pose_megatron.megatron.flags import _REFUSED
from pose_megatron.models.families import FAMILIES
from pose_megatron.positions import laws
from pose_megatron.positions.sampler import PoseSampler
from pose_megatron.rope.methods import METHODS
from pose_megatron.runtime.megatron_core import common_state_is_an_object

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
HISTORY = ROOT / "CHANGELOG.md"
# What speaks of the project as it is; the history also names what is gone.
PRESENT = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    ROOT / "benchmarks/results/README.md",
    *DOCS,
]
PAGES = [*PRESENT, HISTORY]
PROGRAMS = ["pretrain_pose.py", *(str(p.relative_to(ROOT)) for p in (ROOT / "tools").rglob("*.py"))]
PROGRAM = re.compile(r"\b(?:tools/(?:\w+/)*\w+\.py|pretrain_pose\.py)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Flags on our pages that other programs have.
FOREIGN = {
    "torchrun": {"--nproc-per-node", "--rdzv-endpoint", "--max-restarts", "--signals-to-handle"},
    "vLLM": {"--max-model-len"},
    "pip": {"--index-url", "--no-build-isolation", "--no-deps"},
    "zstd": {"--long"},
    "Megatron-LM, refused here": {"--reset-position-ids"},
    "Megatron's pretrain(), refused by the plugin": set(map(flag_name, _REFUSED)),
    "Megatron's pretrain()": {
        "--use-checkpoint-args",
        "--calculate-per-token-loss",
        "--cross-entropy-loss-fusion",
        "--no-load-optim",
        "--hybrid-layer-pattern",
        "--distributed-backend",
        "--moe-token-dispatcher-type",
    },
    "benchmarks": {
        "--dry",
        "--output",
        "--steps",
        "--damages",
        "--large",
        "--only",
        "--pairs",
        "--seed",
        "--step",
        "--trials",
    },
}

# Megatron's own --help fails in 0.19.2: a % in one of its texts.
PRINT_MEGATRONS_FLAGS = """
import argparse
from pose_megatron.megatron import add_pose_args, prepare
prepare()
from megatron.training.arguments import add_megatron_arguments
parser = add_pose_args(add_megatron_arguments(argparse.ArgumentParser()))
print(*(name for action in parser._actions for name in action.option_strings))
"""


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def blocks(text: str, language: str = r"\w*") -> list[str]:
    """What stands between fences, those inside of lists too."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.M | re.S)
    return [re.sub(f"^{indent}", "", block, flags=re.M) for indent, block in found]


def prose(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)


def slugs(page: Path) -> set[str]:
    """GitHub's anchors: lower case, signs left out, hyphens for spaces, repeated ones numbered."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page.read_text()), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def table_rows(page: str) -> list[str]:
    return [line for line in (ROOT / page).read_text().splitlines() if line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page):
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page.read_text()))
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in [*DOCS, HISTORY, ROOT / "CONTRIBUTING.md"]:
        assert f"]({page.relative_to(ROOT)})" in readme


@pytest.mark.parametrize("page", PRESENT, ids=ids(PRESENT))
def test_files_that_a_page_names_exist(page):
    folders = "tools|tests|examples|benchmarks|docs|pose_megatron"
    for name in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]+\.\w+\b", page.read_text()):
        assert (ROOT / name).is_file() or "NAME" in name, name


@functools.cache
def known_flags(program: str) -> set[str]:
    """The flags of a program, from its --help."""
    if program == "pretrain_pose.py":  # which imports megatron-core first
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            arguments.parse(["--help"])
        return set(FLAG.findall(out.getvalue()))
    help = subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    own = set(FLAG.findall(help.stdout))
    takes_a_runs = program in ("tools/materialize_positions.py", "tools/plan.py")
    return own | known_flags("pretrain_pose.py") if takes_a_runs else own


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(program, its flags) of each command of ours that the page shows."""
    text = page.read_text()
    shown = "\n".join([*blocks(text), *re.findall(r"`([^`]+)`", prose(text))])
    found = []
    for line in shown.replace("\\\n", " ").splitlines():
        if program := PROGRAM.search(line.partition("#")[0]):
            words = shlex.split(line[program.end() :], comments=True)
            found.append((program[0], [word for word in words if word.startswith("--")]))
    return found


@pytest.mark.parametrize("page", PRESENT, ids=ids(PRESENT))
def test_programs_know_the_flags_that_are_shown(page):
    for program, flags in commands(page):
        assert (ROOT / program).is_file(), program
        assert set(flags) <= known_flags(program), program


def test_the_readme_shows_the_whole_job():
    shown = Counter(program for program, flags in commands(ROOT / "README.md") if flags)
    assert shown == {
        "tools/preprocess_data.py": 1,
        "tools/checkpoint/convert.py": 2,
        "pretrain_pose.py": 1,
        "tools/evaluate_perplexity.py": 1,
        "tools/evaluate_passkey.py": 1,
    }


@pytest.mark.parametrize("page", PRESENT, ids=ids(PRESENT))
def test_every_flag_that_a_page_names_is_some_programs(page):
    programs = [*PROGRAMS, "examples/reproduce/run.py"]
    known = set().union(*map(known_flags, programs), *FOREIGN.values())
    assert set(FLAG.findall(page.read_text())) <= known


def test_every_flag_that_the_plugin_refuses_has_a_row():
    rows = " ".join(table_rows("docs/megatron.md"))
    assert set(map(flag_name, _REFUSED)) <= set(FLAG.findall(rows))


@pytest.mark.skipif(
    not common_state_is_an_object(), reason="the plugin needs megatron.training of 0.19"
)
def test_megatron_knows_its_flags_that_are_shown():
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_MEGATRONS_FLAGS], stdout=subprocess.PIPE, text=True, check=True
    )
    known = set(FLAG.findall(printed.stdout))
    job = (ROOT / "examples/megatron/llama_pose_slurm.sh").read_text()
    flags = job.partition("CHECKPOINT_ARGS=")[2].partition("# --kill-on-bad-exit")[0]
    assert set(FLAG.findall(flags)) <= known
    page = set(FLAG.findall((ROOT / "docs/megatron.md").read_text()))
    page -= FOREIGN["torchrun"] | known_flags("tools/checkpoint/convert.py")
    page -= {"--dynamic-context-parallel"}  # its name after 0.19
    assert page <= known


def test_flags_that_are_said_to_be_accepted_are_and_others_refused():
    page = (ROOT / "docs/long-runs.md").read_text()
    accepted = page.partition("are\naccepted: ")[2].partition("and the like")[0]
    words = [word for text in re.findall(r"`([^`]+)`", accepted) for word in text.split()]
    assert "--swiglu" in words and "--attention-dropout" in words
    arguments.parse(["--train-iters", "1", *words])
    with pytest.raises(pose_megatron.ConfigError, match="--reset-position-ids cannot be used"):
        arguments.parse(["--train-iters", "1", "--reset-position-ids"])


def test_the_readme_is_short_and_its_map_complete():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 230
    (drawn,) = blocks(readme.partition("\n## Map\n")[2].partition("\n## ")[0])
    folders = [path.parent.name for path in (ROOT / "pose_megatron").glob("*/__init__.py")]
    assert len(folders) >= 10
    for folder in [*folders, "tools", "examples", "benchmarks", "tests", "docs"]:
        assert re.search(rf"^ *{folder}/  +\w", drawn, re.M), folder


def test_the_readme_pairs_every_tool_with_its_command():
    pairs = {}
    for row in table_rows("README.md"):
        if cells := re.match(r"\| `(tools/\S+)` \| `pose-megatron (\S+)` \|", row):
            pairs[cells[2]] = cells[1]
    assert pairs.keys() == MODULES.keys()
    assert {*pairs.values(), "pretrain_pose.py"} == set(PROGRAMS)
    for name, tool in pairs.items():
        assert f'sys.exit(run("{name}"))' in (ROOT / tool).read_text()


@pytest.mark.parametrize(
    "page, names",
    [
        ("docs/positions.md", laws.SAMPLERS),
        ("docs/interpolation.md", METHODS),
        ("docs/checkpoints.md", FORMATS),
        ("docs/evaluation.md", TASKS),
        ("docs/library.md", pose_megatron.__all__),
    ],
)
def test_whatever_is_chosen_by_name_has_a_row(page, names):
    said = {name for row in table_rows(page) for name in re.findall(r"`(\S+?)`", row.split("|")[1])}
    assert set(names) <= said


def test_every_family_is_named():
    page = (ROOT / "docs/checkpoints.md").read_text()
    assert [family.title for family in FAMILIES.values() if family.title not in page] == []


@pytest.mark.parametrize("page", DOCS, ids=ids(DOCS))
def test_python_on_a_page_runs_or_at_least_imports(page):
    names = {*pose_megatron.__all__, "megatron"}
    for block in blocks(page.read_text(), "python"):
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, {}, page.name, str(page), 0)
            assert doctest.DocTestRunner().run(test).failed == 0
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "pose_megatron":
                assert {alias.name for alias in node.names} <= names


def test_the_recipe_for_a_sampler_is_all_it_takes(monkeypatch):
    recipe = (ROOT / "CONTRIBUTING.md").read_text().partition("\n### A sampler\n")[2]
    code, line = blocks(recipe, "python")[0], re.search(r'`("\w+": Sampler\(.*?\)),`', recipe)
    names = dict(vars(laws))
    exec(code, names)
    for name, sampler in eval(f"{{{line[1]}}}", names).items():
        monkeypatch.setitem(laws.SAMPLERS, name, sampler)
        plans = PoseSampler(8, 11, name).plans(range(300), 8)
        assert (plans.lengths == 8).all() and (plans.text_starts == 0).all()
        assert np.unique(plans.position_starts).tolist() == [0, 1, 2, 3]
