"""A report of results: one HTML page that needs no other file, and the same in Markdown.

For each metric a picture, tables with their uncertainty, and how it was measured; before them the
verdicts on claims, where there are any; at the end the commands and versions that made them.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pose_megatron import __version__
from pose_megatron.evaluation import results, results_figure, results_table
from pose_megatron.evaluation.claims import Verdict
from pose_megatron.evaluation.results import Curve
from pose_megatron.evaluation.results_table import Table
from pose_megatron.evaluation.shares import effective_length
from pose_megatron.runtime.atomic_files import write_atomically

THRESHOLD = 0.85  # of an effective context length
TITLES = {
    "perplexity": "Perplexity",
    "passkey": "Passkeys",
    "ruler": "RULER's tasks",
    "seconds": "Seconds of a step",
    "memory": "Peak memory of a step, MiB",
}
_COST = "Of a training step with one sample, against the length that it is trained for."
_MEASURED = {
    "by position": "By position: each document goes through once, and its tokens are scored in "
    "bins of position that end at the context lengths. Each bin scores other tokens: compare "
    "models in a bin, not bins.",
    "in sliding windows": "In sliding windows: all context lengths score the same tokens, each "
    "with that many before it.",
}
_SHARES = (
    "Greedy decoding must give what was asked for. Intervals are at 95 %. The effective context "
    f"length is the longest one up to which all have at least {THRESHOLD:.0%}."
)


@dataclass(frozen=True)
class Section:
    """What a chapter has of one metric.

    Attributes:
        title: of the section; the chapter's, where that has one.
        anchor: its name in links.
        lead: how it is measured, in sentences.
        alt: the picture in words.
        picture: an SVG file.
        tables: by what they show.
        settings: what holds for all curves, by name.
        own: settings in which curves differ; None where they do not.
    """

    title: str
    anchor: str
    lead: str
    alt: str
    picture: Path
    tables: dict[str, Table]
    settings: dict[str, str]
    own: Table | None

    @property
    def address(self) -> str:
        """The picture as a data: address."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.picture.read_bytes()).decode()


@dataclass(frozen=True)
class Report:
    """
    Attributes:
        output: where the page goes.
        files: whose results these are.
        made: commands, as Table; None where no result says how it was made.
        unknown: how many results do not.
    """

    title: str
    output: Path
    files: Sequence[str]
    verdicts: Sequence[Verdict]
    sections: Sequence[Section]
    made: Table | None
    unknown: int
    version: str = __version__

    def write(self) -> None:
        """The page, and the same in Markdown beside it."""
        write_atomically(self.output.with_suffix(".md"), self.markdown())
        write_atomically(self.output, self.html())

    def html(self) -> str:
        from jinja2 import Environment

        template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
        page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        return page.from_string(template).render(report=self)

    def markdown(self) -> str:
        parts = [f"# {self.title}\n"]
        if self.verdicts:
            parts += ["## Verdicts\n", _verdict_table(self.verdicts).markdown()]
        for section in self.sections:
            parts += [f"## {section.title}\n", f"{section.lead}\n"]
            parts.append(f"![{section.alt}]({section.picture.name})\n")
            for what, table in section.tables.items():
                parts += [f"{what}:\n", table.markdown()]
            said = "; ".join(f"{name} {value}" for name, value in section.settings.items())
            parts.append(f"Settings: {said or 'none recorded'}.\n")
            if section.own:
                parts += ["Where they differ:\n", section.own.markdown()]
        parts.append("## How they were made\n")
        if self.made:
            parts.append(self.made.markdown())
        if self.unknown:
            parts.append(f"{self.unknown:,} results do not say how.\n")
        parts.append(f"Results: {', '.join(self.files)}; pose_megatron {self.version}.\n")
        return "\n".join(parts)


def build(
    chapters: Mapping[str, Sequence[str]],
    output: Path,
    title: str,
    window: int | None = None,
    verdicts: Sequence[Verdict] = (),
    apart: bool = False,
) -> Report:
    """Reads results and draws their pictures, as OUTPUT's stem with .METRIC.svg.

    Args:
        chapters: by title, files of results; one without a title is the whole report.
        window: in tokens, to be marked.
        apart: as of results.read.

    Raises:
        ConfigError: as results.read.
    """
    found = [
        (chapter, metric, curves)
        for chapter, files in chapters.items()
        for metric, curves in results.read_all(files, apart).items()
    ]
    sections = []
    for number, (chapter, metric, curves) in enumerate(found, 1):
        anchor = f"{number}.{metric}" if len(chapters) > 1 else metric
        picture = output.with_name(f"{output.stem}.{anchor}.svg")
        results_figure.plot(curves, metric, picture, window)
        several = len([one for one, *_ in found if one == chapter]) > 1
        what = f"{chapter}: {TITLES[metric]}" if several and chapter else chapter
        sections.append(_section(what or TITLES[metric], anchor, curves, metric, picture))
    files = [file for some in chapters.values() for file in some]
    rows = [row for *_, curves in found for curve in curves for row in curve.results]
    return Report(title, output, files, verdicts, sections, *_made(rows))


def _verdict_table(verdicts: Sequence[Verdict]) -> Table:
    return Table(["claim", "", "numbers"], [[v.claim, v.verdict, v.numbers] for v in verdicts])


def _section(
    title: str, anchor: str, curves: Sequence[Curve], metric: str, picture: Path
) -> Section:
    measured = dict.fromkeys(curve.conditions.get("measured") for curve in curves)
    lead = _COST if metric in results.COSTS else _SHARES
    if metric == "perplexity":
        lead = " ".join(_MEASURED[how] for how in measured if how in _MEASURED)
        lead += " Standard errors are over documents"
        if any("by_seed" in row for curve in curves for row in curve.results):
            lead += ", and over seeds where a model has several"
        lead = f"{lead.lstrip()}."
    own = results.differing(curves)
    shared = {
        name: results.shown(curves[0], name) for name in curves[0].conditions if name not in own
    }
    return Section(
        title,
        anchor,
        lead,
        _in_words(curves, metric),
        picture,
        _tables(curves, metric),
        shared,
        Table(
            ["", *own],
            [[curve.label, *(results.shown(curve, name) for name in own)] for curve in curves],
        )
        if own
        else None,
    )


def _tables(curves: Sequence[Curve], metric: str) -> dict[str, Table]:
    if metric == "perplexity":
        tables = {"Perplexity": results_table.values(curves, metric)}
        if any("loss" in row for curve in curves for row in curve.results):
            tables["Loss in nats ± standard error"] = results_table.by_length(curves, _loss)
        return tables
    if metric in results.COSTS:
        return {TITLES[metric]: results_table.values(curves, metric)}
    what = {"passkey": "Passkeys found", "ruler": "Wanted strings found"}[metric]
    table = results_table.by_length(curves, lambda row: _share(row, metric))
    effective = {
        curve.label: effective_length(
            {length: row[metric] for length, row in curve.points.items()}, THRESHOLD
        )
        for curve in curves
    }
    tables = {
        what: table,
        "Effective context length": Table(
            ["", "tokens"], [[k, f"{n:,}"] for k, n in effective.items()]
        ),
    }
    if any("digits" in row for curve in curves for row in curve.results):
        tables["Digits right"] = results_table.by_length(curves, _digits)
    return tables


def _loss(row: dict) -> str:
    if "loss" not in row:
        return ""
    error = row.get("standard_error")
    return f"{row['loss']:.3f}" + (f" ± {error:.3f}" if error == error and error else "")


def _share(row: dict, metric: str) -> str:
    text = f"{row[metric]:.0%}"
    return (
        f"{text} ({row['low']:.0%} to {row['high']:.0%})" if {"low", "high"} <= row.keys() else text
    )


def _digits(row: dict) -> str:
    return f"{row['digits']:.0%}" if "digits" in row else ""


def _in_words(curves: Sequence[Curve], metric: str) -> str:
    """What a picture shows, for those who do not see it."""
    form = "{:.0%}" if metric in results.SHARES else "{:.2f}"
    said = []
    for curve in curves:
        if curve.points:
            ends = [min(curve.points), max(curve.points)]
            values = (form.format(curve.points[n][metric]) for n in ends)
            said.append(
                f"{curve.label} "
                + " and ".join(f"{value} at {n:,}" for value, n in zip(values, ends, strict=True))
            )
    return f"{TITLES[metric]} against context length in tokens: " + "; ".join(said)


def _made(rows: Sequence[dict]) -> tuple[Table | None, int]:
    """How results were made, each way once; and how many do not say it."""
    ways: dict[str, dict[str, Any]] = {}
    unknown = 0
    for row in rows:
        made = row.get("made")
        if isinstance(made, dict):
            ways[json.dumps(made, sort_keys=True)] = made
        else:
            unknown += 1
    if not ways:
        return None, unknown
    lines = []
    for made in ways.values():
        versions = made.get("versions")
        told = (
            ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""
        )
        where = (
            f"{made.get('ranks', '?')} × {made.get('threads', '?')} on {made.get('device', '?')}"
        )
        lines.append([str(made.get("command", "?")), str(made.get("date", "?")), where, told])
    return Table(["command", "date", "processes × threads", "versions"], lines), unknown
