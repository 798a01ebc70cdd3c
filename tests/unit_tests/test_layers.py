"""Who may import whom: every folder knows its own files and the folders before it in ROOMS."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pose_megatron"
# From the ground up; a room is a folder, or a file that lies beside the folders.
ROOMS = [
    "errors",
    "positions",
    "rope",
    "runtime",
    "models",
    "config",
    "preprocessing",
    "data",
    "checkpoints",
    "training",
    "planning",
    "evaluation",
    "megatron",
    "commands",
    "pretrain",
]
FLOOR = {room: floor for floor, room in enumerate(ROOMS)}
# What the mathematics may import beside the standard library.
FOREIGN = {"errors": set(), "positions": {"numpy"}, "rope": {"torch"}}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
PROGRAMS = [ROOT / "pretrain_pose.py", *sorted((ROOT / "tools").rglob("*.py"))]


def dotted(path: Path) -> str:
    """pose_megatron.data.blend of .../pose_megatron/data/blend.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Dotted names of everything that the file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """Modules of pose_megatron that the file imports."""
    known = {dotted(module) for module in MODULES}
    names = {name for name in imports(path) if name.startswith("pose_megatron.")}
    return {end for name in names for end in (name, name.rpartition(".")[0]) if end in known}


def test_this_file_reads_imports():
    assert {"pose_megatron.positions.laws", "pose_megatron.rope.names"} <= ours(
        PACKAGE / "config/flags.py"
    )
    assert "pose_megatron.checkpoints.megatron.directory" in ours(
        PACKAGE / "training/checkpointing.py"
    )


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_file_imports_its_own_room_and_those_below(path):
    room = room_of(dotted(path))
    assert room in FLOOR, f"{path}: say in ROOMS where {room} stands"
    above = {name for name in ours(path) if FLOOR[room_of(name)] > FLOOR[room]}
    assert not above, f"{dotted(path)} imports {above} from above"


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(dotted(p)) in FOREIGN], ids=dotted)
def test_mathematics_imports_numpy_or_torch_only(path):
    packages = {name.split(".")[0] for name in imports(path)}
    strangers = packages - set(sys.stdlib_module_names) - {"pose_megatron"}
    assert not strangers - FOREIGN[room_of(dotted(path))], f"{dotted(path)} imports {strangers}"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.name)
def test_programs_never_import_each_other(path):
    programs = {program.stem for program in PROGRAMS} | {"tools"}
    opened = {name.split(".")[0] for name in imports(path)} & programs
    assert not opened, f"{path.name} imports {opened}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_the_package_never_imports_a_program(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"pretrain_pose", "tools"}


def test_no_file_imports_itself_round_a_corner():
    graph = {dotted(path): ours(path) for path in MODULES}

    def visit(name, trail):
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        for child in graph[name]:
            visit(child, [*trail, name])

    for name in graph:
        visit(name, [])


def test_no_drawer_for_left_overs():
    assert not {path.stem for path in MODULES} & {"utils", "common", "helpers", "misc"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_file_outgrows_its_noun(path):
    assert len(path.read_text().splitlines()) <= 450, f"{path}: split it along a noun"


@pytest.mark.parametrize(
    "module, absent",
    [
        ("positions.sampler", {"torch", "megatron"}),
        ("rope.scaling", {"megatron", "transformers"}),
        ("checkpoints.mapping", {"megatron", "transformers"}),
        ("config.arguments", {"torch", "megatron", "transformers", "yaml"}),
        ("pretrain", {"torch", "megatron", "transformers"}),
        (
            "preprocessing.preprocess",
            {
                "torch",
                "megatron",
                "transformers",
                "tokenizers",
                "sentencepiece",
                "gigatoken",
                "pyarrow",
                "zstandard",
            },
        ),
        ("preprocessing.indexed_writer", {"torch", "megatron"}),
        ("runtime.cli", {"numpy", "torch", "megatron"}),
        ("commands.__main__", {"numpy", "torch", "megatron"}),
        ("commands.convert", {"torch", "megatron", "transformers"}),
        ("commands.verify", {"torch", "megatron", "transformers"}),
        ("commands.inspect_checkpoint", {"torch", "megatron", "transformers"}),
        ("commands.plan", {"torch", "megatron", "transformers"}),
        ("checkpoints.convert", {"megatron", "transformers", "torch.distributed.checkpoint"}),
    ],
)
def test_light_modules_stay_light(module, absent):
    code = f"import sys, pose_megatron.{module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert f"pose_megatron.{module}" in loaded and not absent & set(loaded)


def test_importing_the_package_changes_nothing_around_it():
    code = (
        "import sys, warnings, torch, torch.distributed.checkpoint\n"
        "before = list(warnings.filters)\n"
        "import pose_megatron\n"
        "allowed = torch.serialization.get_safe_globals()\n"
        "pose_megatron.PoseSampler, pose_megatron.RopeScaling, pose_megatron.convert\n"
        "assert warnings.filters == before, warnings.filters\n"
        "assert torch.serialization.get_safe_globals() == allowed\n"
        "assert 'megatron' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path",
    [
        p
        for room in ("pose_megatron", "tools", "examples")
        for p in sorted((ROOT / room).rglob("*.py"))
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_transformers_runs_no_code_of_a_folder_and_asks_no_hub(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            line = f"{path}:{node.lineno}"
            assert given.get("trust_remote_code") == "False", line
            assert given.get("local_files_only") == "True", line
