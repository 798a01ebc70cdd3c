"""The page of results: all figures are there, nothing else is needed, and names stay texts."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from pose_megatron.evaluation import report
from pose_megatron.evaluation.claims import Verdict
from pose_megatron.evaluation.record import Record

HOSTILE = '<script>alert("1|2")</script>'
MADE = {
    "command": "tools/evaluate_perplexity.py --load 'a b'",
    "date": "2026-11-29",
    "ranks": 2,
    "threads": 1,
    "device": "CPU",
    "versions": {"torch": "2.13.0"},
}


def perplexity(name, length, value, **more):
    row = {"metric": "perplexity", "name": name, "context_length": length, "perplexity": value}
    row |= {"measured": "by position", "edges": [64, 128], "loss": 1.25, "standard_error": 0.0625}
    return row | {"load": "checkpoints/x"} | more


def passkey(length, value):
    row = {"metric": "passkey", "name": "base", "context_length": length, "passkey": value}
    row |= {"low": 0.25, "high": 1.0, "digits": 0.875, "answers": [[0.5, True, 0.1]]}
    return row


def ruler(task, length, value):
    row = {"metric": "ruler", "name": "base", "task": task, "context_length": length}
    return row | {"ruler": value, "low": 0.0, "high": 1.0, "answers": [[None, 0.5]]}


ROWS = [
    perplexity("base", 64, 9.5, made=MADE),
    perplexity("base", 128, 70.25, made=MADE),
    perplexity(HOSTILE, 64, 8.75, load="b"),
    perplexity(HOSTILE, 128, 8.5, load="b"),
    passkey(64, 0.875),
    passkey(128, 0.5),
    ruler("single", 64, 1.0),
    ruler("variables", 64, 0.5),
]


@pytest.fixture
def files(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [str(file)]


class Page(HTMLParser):
    """Rows of cells, pictures, and all that a browser would load or run."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.pictures, self.tags, self.addresses = [], [], set(), []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        given = dict(attributes)
        self.addresses += [v for k, v in given.items() if k in ("src", "href")]
        if tag == "img":
            self.pictures.append(given["alt"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data


def test_every_figure_stands_in_both(files, tmp_path):
    verdicts = [Verdict("PoSE reads | on", "does not hold", "+0.5 nats")]
    made = report.build({"": files}, tmp_path / "page.html", "All", 64, verdicts)
    page = Page(made.html())
    for row in (
        ["PoSE reads | on", "does not hold", "+0.5 nats"],
        ["base", "9.50", "70.25"],
        [HOSTILE, "8.75", "8.50"],
        ["base", "1.250 ± 0.062", "1.250 ± 0.062"],
        ["base", "88% (25% to 100%)", "50% (25% to 100%)"],
        ["base", "88%", "88%"],
        ["base", "64"],  # the effective context length, of passkeys
        ["base, mean of 2", "75%"],
        ["base, variables", "50% (0% to 100%)"],
        ["base", "0"],  # of the tasks
        ["base", "checkpoints/x"],
        [MADE["command"], "2026-11-29", "2 × 1 on CPU", "torch 2.13.0"],
    ):
        assert row in page.rows, row
        line = "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        assert line in made.markdown().splitlines()
    assert page.rows.count([MADE["command"], "2026-11-29", "2 × 1 on CPU", "torch 2.13.0"]) == 1
    assert "6 results do not say how." in made.html() and "6 results do not say" in made.markdown()
    assert page.pictures[0].startswith(
        "Perplexity against context length in tokens: base 9.50 at 64 and 70.25 at 128; "
    )


def test_what_another_program_leaves_out_is_left_out(tmp_path):
    file = tmp_path / "results.jsonl"
    rows = [{"metric": "passkey", "name": "a\nb", "context_length": 64, "passkey": 0.5}]
    rows += [{"metric": "perplexity", "name": "c", "context_length": 64, "perplexity": 2.5}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = report.build({"": [str(file)]}, tmp_path / "page.html", "T")
    assert ["c", "2.50"] in Page(made.html()).rows and ["a\nb", "50%"] in Page(made.html()).rows
    assert "| a b | 50% |" in made.markdown().splitlines()


def test_the_page_needs_no_other_file_and_runs_nothing(files, tmp_path):
    made = report.build({"": files}, tmp_path / "page.html", HOSTILE)
    page = Page(made.html())
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert all(re.match(r"#|data:image/svg\+xml;base64,", address) for address in page.addresses)
    assert len(page.pictures) == 3


def test_the_same_results_make_the_same_bytes(files, tmp_path):
    one, other = (
        report.build({"": files}, tmp_path / name / "p.html", "T") for name in _folders(tmp_path)
    )
    assert one.html() == other.html()


def _folders(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        yield name


def test_the_tool_writes_page_text_and_pictures(root, files, tmp_path):
    verdicts = tmp_path / "v.json"
    verdicts.write_text(json.dumps([{"claim": "c", "verdict": "holds", "numbers": "n"}]))
    output = tmp_path / "new" / "report.html"
    done = run(root, *files, "--output", output, "--verdicts", verdicts, "--window", "64")
    assert done.returncode == 0, done.stderr
    names = ["md", "html", "perplexity.svg", "passkey.svg", "ruler.svg"]
    assert {p.name for p in output.parent.iterdir()} == {f"report.{name}" for name in names}
    linked = re.findall(r"!\[.*\]\((.*)\)", output.with_suffix(".md").read_text())
    assert [(output.parent / name).is_file() for name in linked] == [True] * 3


@pytest.mark.parametrize(
    "verdicts, message",
    [
        (None, "no such file"),
        ("{", "Expecting property name"),
        ("{}", "it holds dict"),
        ('[{"claim": "c"}]', "missing 2 required positional arguments"),
        (
            '[{"claim": "c", "verdict": "perhaps", "numbers": ""}]',
            "a verdict is one of holds, does",
        ),
    ],
)
def test_other_verdicts_are_refused_and_nothing_is_written(
    root, files, tmp_path, verdicts, message
):
    file, output = tmp_path / "v.json", tmp_path / "new" / "report.html"
    if verdicts:
        file.write_text(verdicts)
    done = run(root, *files, "--output", output, "--verdicts", file)
    assert done.returncode == 1 and not output.parent.exists()
    assert f"error: --verdicts {file}: not a list of claim" in done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "content, flags, message",
    [
        ("", [], "no results of perplexity, passkey, ruler"),
        ('{"metric": 3}\n', [], "no results of"),
        ("x\n", [], "results.jsonl:1: not a result"),
        ('{"metric": ["perplexity"]}\n', [], "results.jsonl:1: not a result"),
        (json.dumps(ROWS[0]), ["--output", "report.pdf"], "--output report.pdf: must end with .html"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_report_is_said(root, tmp_path, content, flags, message):
    file = tmp_path / "results.jsonl"
    file.write_text(content)
    done = run(root, file, "--output", tmp_path / "report.html", *flags)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def run(root, *argv):
    command = [sys.executable, root / "tools/report.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_a_result_says_how_it_was_made_and_is_written_once(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/evaluate_ruler.py", "--load", "a b"])
    path = tmp_path / "results.jsonl"
    Record(str(path), {"name": "base"}, []).finish({"ruler": 1.0})
    [row] = map(json.loads, path.read_text().splitlines())
    assert row["made"]["command"] == "tools/evaluate_ruler.py --load 'a b'"
    assert re.match(r"20\d\d-\d\d-\d\d$", row["made"]["date"])
    assert {"pose_megatron", "Python", "torch", "megatron-core"} <= row["made"]["versions"].keys()
    row["made"] |= {"date": "2020-01-01", "command": "another"}  # written on another day
    path.write_text(json.dumps(row) + "\n")
    Record(str(path), {"name": "base"}, []).finish({"ruler": 1.0})
    assert path.read_text() == json.dumps(row) + "\n"
