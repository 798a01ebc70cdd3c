"""JSON and YAML from anywhere: one sentence, within seconds and little memory."""

import resource
import time

import pytest
import yaml

from pose_megatron.errors import ConfigError, DamagedCheckpoint
from pose_megatron.runtime import json_files
from pose_megatron.runtime.json_files import read_json, read_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}], k{i}: 1}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text, said",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"\xff\xfe{\x00", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"", "is not JSON"),
    ],
)
def test_json_that_cannot_be_read_is_one_sentence(tmp_path, text, said):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    for error in (ConfigError, DamagedCheckpoint):
        with pytest.raises(error, match=rf"config\.json {said}|config\.json .*{said}") as caught:
            read_json(path, error)
        assert len(str(caught.value)) < 500


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that takes no disk
    for read in (read_json, read_yaml):
        with pytest.raises(ConfigError, match=r"config\.json has more than the [\d,]+ bytes"):
            read(path)


@pytest.mark.parametrize(
    "text, said",
    [
        (LAUGHS, "with its aliases written out"),
        (MERGES, "with its aliases written out"),
        ("a: &a [*a]\n", "with its aliases written out"),
        ("a: " + "[" * 1500, "nested too deeply"),
        ("{" * 1500, "nested too deeply"),
        ("a: 2001-99-99\n", "month must be in"),
        ("a: !!int ''\n", "is not YAML"),
        ("a: !!python/object/apply:os.system [true]\n", "is not YAML"),
        ("? [a]\n: b\n", "is not YAML"),
        ("a: \x00\n", "is not YAML"),
        ("- a\n", "must be a mapping"),
    ],
)
def test_yaml_that_cannot_be_read_is_one_sentence(tmp_path, text, said):
    path, before = tmp_path / "run.yaml", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError, match=rf"run\.yaml .*{said}") as caught:
        read_yaml(path)
    assert len(str(caught.value)) < 500 and time.process_time() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_ordinary_yaml_is_what_safe_load_reads(tmp_path):
    path = tmp_path / "run.yaml"
    text = (
        "base: &b {x: 1, y: [1.5, null, yes]}\nmore: {<<: *b, x: 2}\nagain: *b\nwhen: 2001-01-01\n"
    )
    path.write_text(text)
    assert read_yaml(path) == yaml.safe_load(text)
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}
    path.write_text("a: ü\n", encoding="utf-8")
    assert read_yaml(path) == {"a": "ü"}


def test_as_many_values_as_a_blend_of_thousands_has_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"- 0.1\n- c{i}\n" for i in range(1000)).join(["data-path:\n", ""]))
    assert len(read_yaml(path)["data-path"]) == 2000
    assert 2000 < json_files.MOST_YAML_NODES
