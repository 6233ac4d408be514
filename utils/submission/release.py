"""A folder to give away: the packed network, at most a few megabytes, and its card."""

from __future__ import annotations

from pathlib import Path

from utils.export import export
from utils.submission.card import card
from utils.submission.entries import Entry


def write(entry: Entry, out: Path, name: str | None) -> str:
    """Write the network's files into the folder ``out``; returns what to do with them."""
    path, difference = export(entry.path, "packed", out / "model.pt")
    (out / "README.md").write_text(card(entry, name or entry.run.name))
    size = path.stat().st_size / 1e6
    return (
        f"models.load_model reads the folder ({size:.2f} MB; float16 moves the logits by"
        f" {difference:.0e} of the largest)"
    )
