"""Figures of a run: training curves and mask distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

_SERIES = (
    ("train_ra", "training RA", "tab:orange", "-"),
    ("train_sa", "training SA", "tab:orange", ":"),
    ("val_ra", "validation RA", "tab:blue", "-"),
    ("test_ra", "test RA", "tab:green", "-"),
    ("val_sa", "validation SA", "tab:blue", ":"),
    ("test_sa", "test SA", "tab:green", ":"),
    ("average_val_ra", "validation RA, averaged", "tab:blue", "--"),
    ("average_test_ra", "test RA, averaged", "tab:green", "--"),
)

Row = Mapping[str, Any]


BAND = 0.18  # opacity of the range over seeds


def training_curves(rows: Sequence[Row], title: str) -> Figure:
    """Accuracies (percent) by epoch, one panel per stage, with Flying Bird+'s prune epochs as black
    lines and its grow epochs as red ones."""
    stages = sorted({row.get("stage", 2) for row in rows})
    panels = [[row for row in rows if row.get("stage", 2) == stage] for stage in stages]
    figure = Figure(figsize=(8 + 2 * (len(panels) - 1), 5), layout="constrained")
    # A minimum width leaves room for the labels of a stage with few epochs.
    widths = [max(len(panel), len(rows) / 4) for panel in panels]
    handles: dict[str, Any] = {}
    for axes, panel in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0],
        panels,
        strict=True,
    ):
        draw_curves(axes, panel)
        handles |= legend_handles(axes)
        if len(panels) > 1:
            axes.set_title(f"stage {panel[0]['stage']}")
        if panel is not panels[0]:
            axes.set_ylabel("")
    figure.suptitle(title)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    return figure


def mask_distances(
    distances: Sequence[Sequence[float]], drawn: int | None, watched: tuple[int, float, bool] | None
) -> Figure:
    """The early-bird plot: the fraction of positions in which the masks of each pair of epochs
    differ.

    Args:
        distances: row e holds those of epoch e to all earlier epochs, as ``EarlyBird.distances``.
        drawn: the epoch (from 1) whose mask was drawn as the ticket; None before that.
        watched: window, tolerance and whether the ticket has emerged; None if it does not end the
            stage. A frame shows the window.
    """
    n = len(distances)
    matrix = [
        [0.0 if i == j else distances[max(i, j)][min(i, j)] for j in range(n)] for i in range(n)
    ]
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        matrix, origin="lower", extent=(0.5, n + 0.5, 0.5, n + 0.5), cmap="viridis", vmin=0.0
    )
    figure.colorbar(image, label="fraction of positions that differ")
    title, what = "masks of stage 1", "drawn"
    if watched is not None:
        window, tolerance, emerged = watched
        title += f", window {window}, tolerance {tolerance:g}"
        what = "ticket" if emerged else "no ticket, drawn"
        if drawn is not None:
            size = min(window, drawn)
            corner = drawn - size + 0.5
            axes.add_patch(
                Rectangle(
                    (corner, corner), size, size, fill=False, edgecolor="white", linewidth=2.0
                )
            )
    if drawn is not None:
        title += f", {what} after epoch {drawn}"
    axes.set_title(title, fontsize="medium")
    for axis, label in ((axes.xaxis, axes.set_xlabel), (axes.yaxis, axes.set_ylabel)):
        label("epoch")
        axis.set_major_locator(MaxNLocator(integer=True))
    return figure


def legend_handles(axes: Axes) -> dict[str, Any]:
    return dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))


def draw_curves(axes: Axes, rows: Sequence[Row], *others: Sequence[Row]) -> None:
    """Plot the accuracies of a run, or their mean and range over it and runs of other seeds."""
    for key, label, colour, style in _SERIES:
        epochs, values = _by_epoch([rows, *others], key)
        if epochs:
            marker = "." if len(epochs) == 1 else None  # a line of one point is invisible
            means = [sum(seeds) / len(seeds) for seeds in values]
            axes.plot(epochs, means, style, color=colour, label=label, linewidth=1.6, marker=marker)
            if others:
                lowest, highest = list(map(min, values)), list(map(max, values))
                axes.fill_between(epochs, lowest, highest, color=colour, alpha=BAND, linewidth=0)
    for verdict, colour, offset in (("prune", "black", -0.12), ("grow", "red", 0.12)):
        marked = [row["epoch"] for row in rows if any(u[verdict] for u in row.get("updates", []))]
        for number, epoch in enumerate(marked):
            # Side by side, so that an epoch with both verdicts shows both.
            axes.axvline(
                epoch + offset,
                color=colour,
                linewidth=1.0,
                alpha=0.7,
                label=f"{verdict} epoch" if number == 0 else None,
            )
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)


def _by_epoch(runs: Sequence[Sequence[Row]], key: str) -> tuple[list[int], list[list[float]]]:
    """The epochs in which all runs measured ``key``, and for each epoch the value of every run."""
    found = [{row["epoch"]: row[key] for row in rows if key in row} for rows in runs]
    epochs = sorted(set(found[0]).intersection(*found[1:]))
    return epochs, [[measured[epoch] for measured in found] for epoch in epochs]
