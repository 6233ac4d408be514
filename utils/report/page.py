"""A report as files: tables, figures and one self-contained HTML page, which needs no network and
no other file."""

from __future__ import annotations

import base64
import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import InputError
from utils.report.figures import Picture, report_pictures
from utils.report.runs import FinishedRun, Group
from utils.report.tables import (
    Comparison,
    Table,
    benchmark_tables,
    comparison_csv,
    comparison_table,
    evaluation_csv,
    evaluation_table,
    markdown,
    stale_evaluations,
    strong_evaluations,
)
from utils.storage.files import FIGURE_KINDS, drawn, write_atomically, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1e21; --faint: #5c636b; --line: #d6dade; --ours: #e8f1fb; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181b; --text: #e6e8ea; --faint: #a2a9b0; --line: #3a4046; --ours: #1d3247; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 96rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .5rem; }
p, li, figcaption { max-width: 50rem; }
.faint, .notes, figcaption { color: var(--faint); font-size: .9rem; }
.notes { padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; min-width: 5rem; }
th.words, td.words { text-align: left; min-width: 0; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); white-space: normal; min-width: 12rem; }
tr.ours td { background: var(--ours); font-weight: 600; }
tr.first td { border-top: 2px solid var(--line); }
figure { margin: 1.5rem 0; }
figcaption { margin-top: .4rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 6px; }
@media (max-width: 40rem) {
  figure.broad img { max-width: none; width: 46rem; }
  th:first-child, td:first-child { min-width: 8rem; max-width: 9rem; } }
details { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
details td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
"""
_BROAD = 8.5  # inches; a wider figure scrolls on a phone, so that its text can be read


def write_report(folder: Path, groups: Sequence[Group], paper_dataset: str | None) -> Path:
    """Write tables (``table.md``, ``.csv``, and ``evaluations`` if there are any), figures (PNG,
    PDF and SVG) and ``index.html``.

    Args:
        folder: exists (``checkpoint.writable_folder``).
        groups: at least one.
        paper_dataset: the paper's data set for runs whose own the paper has not.

    Returns:
        The page's path.

    Raises:
        InputError: files of a run that are missing or damaged, a folder that cannot be written.
    """
    compared, strong, stale = (
        Comparison.all_of(groups, paper_dataset),
        strong_evaluations(groups),
        stale_evaluations(groups),
    )
    tables, texts = [comparison_table(compared)], {"table.csv": comparison_csv(compared)}
    texts["table.md"] = markdown(tables[0])
    if strong or stale:
        stronger = [evaluation_table(strong, stale), *benchmark_tables(strong, paper_dataset)]
        texts |= {
            "evaluations.md": "\n".join(map(markdown, stronger)),
            "evaluations.csv": evaluation_csv(strong),
        }
        tables += stronger
    pictures = report_pictures(groups)
    texts["index.html"] = page(_title(groups), tables, pictures, groups)
    try:
        for picture in pictures:
            for suffix in FIGURE_KINDS:
                write_figure(folder / f"{picture.stem}{suffix}", picture.figure)
        for name, text in texts.items():  # the page last: what it stands for is there
            write_atomically(folder / name, text.encode())
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error.strerror or error})") from error
    return folder / "index.html"


def _title(groups: Sequence[Group]) -> str:
    datasets = ", ".join(dict.fromkeys(group.settings.dataset for group in groups))
    count = sum(len(group.runs) for group in groups)
    return f"Sparse adversarial training on {datasets}: {count} run{'s' if count > 1 else ''}"


# ---------------------------------------------------------------- the page


def page(
    title: str, tables: Sequence[Table], pictures: Sequence[Picture], groups: Sequence[Group]
) -> str:
    """The HTML text: tables, figures within it, and how each run was made. Everything that comes
    from outside is escaped."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(_contents(groups))}</p>',
        "<h2>Tables</h2>",
        *map(_table, tables),
        "<h2>Figures</h2>",
        *map(_figure, pictures),
        "<h2>Runs</h2>",
        *(_run(group, run) for group in groups for run in group.runs),
    ]
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width,'
        ' initial-scale=1">'
    )
    head += f"\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>"
    body = "\n".join(parts)
    return (
        "<!DOCTYPE html>\n<html"
        f' lang="en">\n<head>\n{head}\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )


def _contents(groups: Sequence[Group]) -> str:
    """The groups and their seeds, in a line."""
    return "; ".join(
        f"{group.label}: seed{'s' if len(group.runs) > 1 else ''}"
        f" {', '.join(map(str, group.seeds))}"
        for group in groups
    )


def _table(table: Table) -> str:
    head = "".join(_cell("th", name, i < table.words) for i, name in enumerate(table.columns))
    rows = []
    for number, row in enumerate(table.rows):
        begins = number > 0 and row[0] != table.rows[number - 1][0] and not table.marked
        kind = ' class="ours"' if number in table.marked else ' class="first"' if begins else ""
        rows.append(
            f"<tr{kind}>{''.join(_cell('td', cell, i < table.words) for i, cell in enumerate(row))}</tr>"
        )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    title = escape(table.title)
    body = "\n".join(rows)
    return (
        f'<h3>{title}</h3>\n<div class="wide" role="region" aria-label="{title}"'
        f' tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n<ul'
        f' class="notes">{notes}</ul>'
    )


def _cell(tag: str, text: str, is_words: bool) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    kind = ' class="words"' if is_words else ""
    return f"<{tag}{scope}{kind}>{escape(text)}</{tag}>"


def _figure(picture: Picture) -> str:
    broad = ' class="broad"' if picture.figure.get_figwidth() > _BROAD else ""
    image = f'<img src="{svg_uri(picture.figure)}" alt="{escape(picture.alternative)}">'
    return (
        f"<figure{broad}><div"
        f' class="wide">{image}</div><figcaption>{escape(picture.caption)}</figcaption></figure>'
    )


def svg_uri(figure: Figure) -> str:
    """A figure as a data URI, the same bytes each time."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawn(figure, "svg")).decode()


def _run(group: Group, run: FinishedRun) -> str:
    """How a run was made, folded."""
    config = run.config
    settings, last = config.get("settings", {}), (run.made_by or [{}])[-1]
    rows = {
        "machine": (
            f"{last.get('hardware', 'unknown')}, {run.processes} process(es), trained in"
            f" {run.precision}"
        ),
        "source revision": ", ".join(
            dict.fromkeys(str(entry.get("revision", "unknown")) for entry in run.made_by)
        ),
        "versions": ", ".join(
            f"{name} {version}" for name, version in last.get("versions", {}).items()
        ),
        "images": ", ".join(f"{count} {part}" for part, count in config.get("images", {}).items()),
        "time": f"{run.summary.get('seconds', 0) / 3600:.2f} h",
    }
    return (
        f"<details><summary>{escape(group.label)}, seed {run.settings.seed}:"
        f" {escape(run.name)}</summary>\n<pre>{escape(command_of(run))}</pre>\n{_pairs(rows)}\n<details><summary>all"
        f" settings</summary>{_pairs(settings)}</details>\n</details>"
    )


def _pairs(rows: Mapping[str, Any]) -> str:
    texts = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in rows.items()
    }
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in texts.items()
    )
    return f'<div class="wide"><table><tbody>{cells}</tbody></table></div>'


def command_of(run: FinishedRun) -> str:
    """The command that trains such a run: its settings that are not at their defaults, and where
    its data lay."""
    settings = run.settings
    script = (
        settings.script if settings.script == "main_adv.py" else f"Robust-Bird/{settings.script}"
    )
    words = ["python", script]
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if value == f.default or not (f.metadata["result"] or f.name == "data"):
            continue
        words += (
            [f"--{'' if value else 'no-'}{f.name}"]
            if isinstance(value, bool)
            else [f"--{f.name}", str(value)]
        )
    return shlex.join(words)
