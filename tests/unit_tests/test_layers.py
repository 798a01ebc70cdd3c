"""Who may import whom: maths <- words <- machine <- loop <- doors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = [
    {"draws", "shuffle", "samplers", "positions", "coverage", "rope", "convert", "evaluation",
     "passkey"},
    {"arguments", "flags", "layout", "model_config", "sampler_flags", "rope_config",
     "megatron_args"},
    {"cpu", "distributed", "corpus", "index_cache", "blend", "materialized", "dataset", "batch",
     "attention", "gptj", "head", "model", "optimizer", "checkpoint", "tokenizer", "fast_tokenizer",
     "jsonl", "text_corpus", "token_files", "encoding", "unfinished", "preprocessing", "durable",
     "lifetime", "program", "directory", "huggingface", "shards", "weights", "tensor_files", "meta",
     "formats", "parity", "subject", "legacy", "origin", "index", "inspection", "rope_check"},
    {"log", "training"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(p for p in (ROOT / "pose_megatron").rglob("*.py") if p.name != "__init__.py")
DOORS = [ROOT / "pretrain_pose.py", *sorted((ROOT / "tools").rglob("*.py"))]
FOREIGN = [{"numpy", "torch"}, {"yaml"}]  # for maths and words, beside the standard library


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
    names = {name.split(".")[1] for name in imports(path) if name.startswith("pose_megatron.")}
    return {name for name in names if (ROOT / "pose_megatron" / f"{name}.py").is_file()}


def test_this_file_reads_imports():
    assert {"samplers", "model_config"} <= ours(ROOT / "pose_megatron/flags.py")
    assert "checkpoint" in ours(ROOT / "pose_megatron/training.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_module_imports_its_own_layer_and_below(path):
    assert path.stem in LEVEL, f"{path.name}: say in LAYERS where it lives"
    level = LEVEL[path.stem]
    used = ours(path)
    too_high = {name for name in used if LEVEL[name] > level}
    assert not too_high, f"{path.name} imports {too_high} from above"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if LEVEL.get(p.stem, 9) < len(FOREIGN)], ids=lambda p: p.stem)
def test_maths_imports_numpy_and_torch_only_and_words_no_engine(path):
    packages = {name.split(".")[0] for name in imports(path)}
    strangers = packages - set(sys.stdlib_module_names) - {"pose_megatron"}
    assert not strangers - FOREIGN[LEVEL[path.stem]], f"{path.name} imports {strangers}"


@pytest.mark.parametrize("path", DOORS, ids=lambda p: p.name)
def test_doors_never_import_each_other(path):
    doors = {door.stem for door in DOORS} | {"tools"}
    opened = {name.split(".")[0] for name in imports(path)} & doors
    assert not opened, f"{path.name} imports {opened}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_the_package_never_imports_a_door(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"pretrain_pose", "tools"}


def test_no_module_imports_itself_round_a_corner():
    graph = {path.stem: ours(path) for path in MODULES}

    def visit(name, trail):
        assert name not in trail, f"cycle: {' -> '.join([*trail, name])}"
        for child in graph[name]:
            visit(child, [*trail, name])

    for name in graph:
        visit(name, [])


def test_no_drawer_for_left_overs():
    assert not {path.stem for path in MODULES} & {"utils", "common", "helpers", "misc"}


@pytest.mark.parametrize("module, absent", [
    ("positions", {"torch", "megatron"}),
    ("rope", {"megatron", "transformers"}),
    ("convert", {"megatron", "transformers"}),
    ("arguments", {"megatron", "transformers"}),
    ("preprocessing", {"torch", "megatron", "transformers", "tokenizers", "sentencepiece",
                       "gigatoken", "pyarrow", "zstandard"}),
    ("token_files", {"torch", "megatron"}),
    ("program", {"numpy", "torch", "megatron"}),
])
def test_light_modules_stay_light(module, absent):
    code = f"import sys, pose_megatron.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout.split()
    assert f"pose_megatron.{module}" in loaded and not absent & set(loaded)
