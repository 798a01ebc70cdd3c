"""Results that someone else's program, or an editor, wrote: each line is a result or is named."""

import json
import os
import resource
import signal
from itertools import pairwise

import pytest

from pose_megatron.errors import ConfigError
from pose_megatron.evaluation import results, results_figure, results_table

GOOD = {"metric": "perplexity", "name": "base", "context_length": 64, "perplexity": 9.5}


def read(tmp_path, rows, metric="perplexity", apart=False):
    file = tmp_path / "results.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return results.read([str(file)], metric, apart)


def told(curves, metric="perplexity"):
    """{label: {context length: value}}"""
    assert len({curve.label for curve in curves}) == len(curves)
    return {c.label: {n: row[metric] for n, row in c.points.items()} for c in curves}


def test_the_last_of_equals_counts(tmp_path):
    rows = [GOOD, GOOD | {"perplexity": 8}, GOOD | {"metric": "passkey"}, GOOD | {"name": "é"}]
    assert told(read(tmp_path, rows)) == {"base": {64: 8.0}, "é": {64: 9.5}}


def at(lengths, value=9.0, **conditions):
    return [GOOD | {"context_length": n, "perplexity": value} | conditions for n in lengths]


@pytest.mark.parametrize(
    "name, one, other, said",
    [
        ("iteration", 100, 200, ("iteration 100", "iteration 200")),
        ("data_path", "a/x", "b/x", ("data_path a/x", "data_path b/x")),
        ("stride", 32, 64, ("stride 32", "stride 64")),
        ("tokens", 4096, 2048, ("tokens 4096", "tokens 2048")),
        ("rope_scaling_factor", 8.0, 16.5, ("rope_scaling_factor 8", "rope_scaling_factor 16.5")),
        ("prepend_bos", False, True, ("prepend_bos no", "prepend_bos yes")),
        ("tokenizer_model", None, "tok", ("tokenizer_model none", "tokenizer_model tok")),
        ("of_another_program", [1], {"a": 2}, ("of_another_program [1]", 'of_another_program {"a": 2}')),
    ],
)  # fmt: skip
def test_what_differs_is_a_curve_of_its_own_and_in_its_label(tmp_path, name, one, other, said):
    rows = at([64, 128], 9.0, **{name: one}) + at([64, 128, 256], 7.0, **{name: other})
    assert told(read(tmp_path, rows)) == {
        f"base, {said[0]}": {64: 9.0, 128: 9.0},
        f"base, {said[1]}": {64: 7.0, 128: 7.0, 256: 7.0},
    }
    # One that is silent about it is none of the others.
    assert len(read(tmp_path, [*rows, *at([64])])) == 3


def test_points_that_look_like_one_curve_and_are_none_are_refused(tmp_path):
    rows = at([64, 128], stride=32, tokens=400) + at([256], stride=128, tokens=256)
    message = (
        r"^base: its results at 64, 128 and at 256 tokens are no curve, they differ in "
        r"stride 32 and 128; tokens 400 and 256\. .*--apart$"
    )
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, rows)
    assert told(read(tmp_path, rows, apart=True)) == {
        "base, stride 32, tokens 400": {64: 9.0, 128: 9.0},
        "base, stride 128, tokens 256": {256: 9.0},
    }
    alike = at([64, 128], stride=32) + at([256], stride=32)
    assert told(read(tmp_path, alike)) == {"base": {64: 9.0, 128: 9.0, 256: 9.0}}


def test_names_differ_in_how_they_were_measured_only_where_they_do(tmp_path):
    """A name stands for its model; data, stride and the like are no part of it."""
    rows = at([64, 128], load="a", iteration=1, stride=32)
    pose = {"name": "pose", "load": "b", "iteration": 9, "rope_scaling": "yarn"}
    assert list(told(read(tmp_path, rows + at([64], stride=32, **pose)))) == ["base", "pose"]
    unlike = read(tmp_path, rows + at([64], stride=64, **pose))
    assert list(told(unlike)) == ["base, stride 32", "pose, stride 64"]


def test_passkeys_are_kept_apart_by_needles_and_drawn_by_label(tmp_path):
    row = {"metric": "passkey", "name": "base", "low": 0.1, "high": 0.9, "loss": 1.0}
    row |= {"passkey": 0.5, "answers": [[0.0, True, 0.1], [1.0, False, 2.0]], "trials": 2}
    rows = [row | {"needles": k, "context_length": n} for k in (1, 8) for n in (64, 128)]
    curves = read(tmp_path, rows, "passkey")
    assert list(told(curves, "passkey")) == ["base, needles 1", "base, needles 8"]
    results_figure.plot(curves, "passkey", tmp_path / "passkey.png")
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")
    assert results_table.values(curves, "passkey").markdown().splitlines()[2:] == [
        "| base, needles 1 | 50% | 50% |",
        "| base, needles 8 | 50% | 50% |",
    ]


@pytest.mark.parametrize(
    "lengths",
    [
        [2048, 4096, 8192, 10240, 12288, 14336, 16384],
        [64, 128, 256, 512],
        [65536, 131072],
        list(range(4096, 65537, 4096)),
    ],
)
def test_labels_of_lengths_do_not_touch_each_other(tmp_path, monkeypatch, lengths):
    from matplotlib import pyplot

    curves = read(tmp_path, [GOOD | {"context_length": n} for n in lengths])
    with monkeypatch.context() as patched:
        drawn = []
        patched.setattr(pyplot, "close", drawn.append)
        results_figure.plot(curves, "perplexity", tmp_path / "curves.png", 8192)
    labels = [label for label in drawn[0].axes[0].get_xticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    pyplot.close(drawn[0])
    assert labels[-1].get_text() == f"{lengths[-1]:,}"
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


def ruler(task, length, share, **more):
    row = {"metric": "ruler", "name": "base", "task": task, "needles": 4, "answers": [[None, 0.5]]}
    return row | {"context_length": length, "ruler": share, "low": 0.0, "high": 1.0} | more


def test_rulers_tasks_are_one_curve_of_their_mean(tmp_path):
    rows = [ruler("single", n, share) for n, share in ((64, 0.5), (64, 1.0), (128, 0.5))]
    rows += [ruler("variables", 64, 0.5), ruler("variables", 256, 0.25)]
    curves = read(tmp_path, rows, "ruler")
    assert told(curves, "ruler") == {"base": {64: 0.75}}  # the other lengths lack a task
    results_figure.plot(curves, "ruler", tmp_path / "ruler.png", 64)
    assert (tmp_path / "ruler.png").read_bytes().startswith(b"\x89PNG")
    assert results_table.values(curves, "ruler").markdown().splitlines() == [
        "| | 64 | 128 | 256 |",
        "|---|---:|---:|---:|",
        "| base, mean of 2 | 75.0% |  |  |",
        "| base, single | 100.0% | 50.0% |  |",
        "| base, variables | 50.0% |  | 25.0% |",
    ]


def test_means_over_other_tasks_and_settings_are_told_apart(tmp_path):
    rows = [ruler("single", 64, 0.5), ruler("variables", 64, 1.0)]
    other = [ruler("single", 64, 1.0, name="pose")]
    assert told(read(tmp_path, rows + other, "ruler"), "ruler") == {
        'base, tasks ["single", "variables"]': {64: 0.75},
        'pose, tasks ["single"]': {64: 1.0},
    }
    hard = [ruler(task, n, 0.0, needles=9) for task in ("single", "variables") for n in (64, 128)]
    assert told(read(tmp_path, rows + hard, "ruler"), "ruler") == {
        "base, needles 4": {64: 0.75},
        "base, needles 9": {64: 0.0, 128: 0.0},
    }
    with pytest.raises(ValueError, match=r"results\.jsonl:1: not a result \(KeyError\('task'\)\)"):
        read(tmp_path, [{k: v for k, v in rows[0].items() if k != "task"}], "ruler")


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b"[1]",
        b"3",
        json.dumps(GOOD | {"context_length": "64"}).encode(),
        json.dumps(GOOD | {"context_length": [64]}).encode(),
        json.dumps(GOOD | {"context_length": 64.5}).encode(),
        json.dumps(GOOD | {"perplexity": None}).encode(),
        json.dumps(GOOD | {"perplexity": 10**400}).encode(),
        json.dumps(GOOD | {"loss": "low"}).encode(),
        json.dumps(GOOD | {"standard_error": [1]}).encode(),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, line):
    file = tmp_path / "results.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:2: not a result"):
        results.read([str(file)], "perplexity")


def test_evaluators_side_by_side_never_tear_a_line(tmp_path):
    """Rows far longer than a buffer, from four processes at a time."""
    path, text = tmp_path / "results.jsonl", "x" * 40_000
    children = []
    for writer in range(4):
        if not (child := os.fork()):
            for number in range(50):
                results.append(str(path), [{"writer": writer, "number": number, "text": text}])
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(row["writer"], row["number"]) for row in rows} == {
        (writer, number) for writer in range(4) for number in range(50)
    }
    assert len(rows) == 200 and {row["text"] for row in rows} == {text}


def test_what_a_killed_evaluator_left_spoils_no_other_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"metric": "perpl')
    results.append(str(path), [{"a": 1}])
    assert path.read_text() == '{"metric": "perpl\n{"a": 1}\n'
    with pytest.raises(ValueError, match=r"results.jsonl:1: not a result"):
        results.read([str(path)], "perplexity")


def test_a_full_disk_takes_back_what_was_begun(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n')
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            results.append(str(path), [{"b": "x" * 2000}])
        except OSError:
            os._exit(7)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_text() == '{"a": 1}\n'


def test_bins_of_unlike_width_are_one_curve(tmp_path):
    conditions = {"measured": "by position", "edges": [64, 256], "documents": 3}
    rows = [*at([64], tokens=192, **conditions), *at([256], tokens=576, **conditions)]
    assert told(read(tmp_path, rows)) == {"base": {64: 9.0, 256: 9.0}}
