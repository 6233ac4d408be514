"""Writes a report: tables, figures and a self-contained HTML page, which needs neither a network
nor other files."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.report.figures import Picture, report_pictures
from utils.report.runs import FinishedRun, Group, command_of
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
from utils.storage.files import FIGURE_KINDS, drawn, write_atomically

_BROAD = 8.5  # inches; wider figures scroll on a phone, so that their text stays readable


def write_report(folder: Path, groups: Sequence[Group], paper_dataset: str | None) -> Path:
    """Write tables (``table.md`` and ``.csv``, and ``evaluations.*`` if there are any), figures
    (PNG, PDF and SVG) and ``index.html``.

    Args:
        folder: exists and is writable.
        groups: at least one.
        paper_dataset: the paper's data set to compare with runs on data that the paper lacks.

    Returns:
        The page's path.

    Raises:
        InputError: files of a run are missing or damaged, or the folder cannot be written.
    """
    compared = Comparison.all_of(groups, paper_dataset)
    strong, stale = strong_evaluations(groups), stale_evaluations(groups)
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
    images = {
        f"{picture.stem}{suffix}": drawn(picture.figure, suffix.removeprefix("."))
        for picture in pictures
        for suffix in FIGURE_KINDS
    }
    texts["index.html"] = page(_title(groups), tables, pictures, images, groups)
    # the page last: when it exists, so does all the rest
    files = images | {name: text.encode() for name, text in texts.items()}
    try:
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error.strerror or error})") from error
    return folder / "index.html"


def _title(groups: Sequence[Group]) -> str:
    datasets = ", ".join(dict.fromkeys(group.settings.dataset for group in groups))
    count = sum(len(group.runs) for group in groups)
    return f"Sparse adversarial training on {datasets}: {count} run{'s' if count > 1 else ''}"


# ---------------------------------------------------------------- the page


def page(
    title: str,
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    images: Mapping[str, bytes],
    groups: Sequence[Group],
) -> str:
    """The HTML page, rendered from ``page.html``: tables, embedded figures (the SVG ``images`` by
    file name) and how each run was made."""
    # imported here, so that --help does not wait for it
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    figures = [
        {
            "uri": "data:image/svg+xml;base64,"
            + base64.b64encode(images[f"{picture.stem}.svg"]).decode(),
            "alternative": picture.alternative,
            "caption": picture.caption,
            "is_broad": picture.figure.get_figwidth() > _BROAD,
        }
        for picture in pictures
    ]
    return template.render(
        title=title,
        contents=_contents(groups),
        tables=tables,
        figures=figures,
        runs=[_run(group, run) for group in groups for run in group.runs],
        json=json.dumps,
    )


def _contents(groups: Sequence[Group]) -> str:
    """The groups and their seeds, on one line."""
    return "; ".join(
        f"{group.label}: seed{'s' if len(group.runs) > 1 else ''}"
        f" {', '.join(map(str, group.seeds))}"
        for group in groups
    )


def _run(group: Group, run: FinishedRun) -> dict[str, Any]:
    """How a run was made, under the names that the template uses."""
    config, last = run.config, (run.made_by or [{}])[-1]
    revisions = dict.fromkeys(str(entry.get("revision", "unknown")) for entry in run.made_by)
    facts = {
        "machine": (
            f"{last.get('hardware', 'unknown')}, {run.processes} process(es), trained in"
            f" {run.precision}"
        ),
        "source revision": ", ".join(revisions),
        "versions": ", ".join(f"{name} {text}" for name, text in last.get("versions", {}).items()),
        "images": ", ".join(f"{count} {part}" for part, count in config.get("images", {}).items()),
        "time": f"{run.summary.get('seconds', 0) / 3600:.2f} h",
    }
    return {
        "title": f"{group.label}, seed {run.settings.seed}: {run.name}",
        "command": command_of(run),
        "facts": facts,
        "settings": config.get("settings", {}),
    }
