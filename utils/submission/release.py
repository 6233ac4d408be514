"""Writes a model for release: the packed network and its card."""

from __future__ import annotations

from pathlib import Path

from utils.export import export
from utils.submission.card import card
from utils.submission.entries import Entry


def write(entry: Entry, out: Path, name: str | None) -> str:
    """Write the network's files into the folder ``out``; returns the next step for the user."""
    path, difference = export(entry.path, "packed", out / "model.pt")
    note = (
        "\n- the accuracies are those of the float32 weights; float16 changes the logits by at"
        f" most {difference:.0e} of the largest logit"
    )
    (out / "README.md").write_text(card(entry, name or entry.run.name, note))
    return f"models.load_model reads the folder; it takes {path.stat().st_size / 1e6:.2f} MB"
