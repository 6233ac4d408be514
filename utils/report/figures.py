"""Figures of a report on groups of runs; nothing here writes files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from utils.early_bird import TOLERANCES
from utils.errors import require
from utils.report.runs import DENSE, FinishedRun, Group, Measured, density, lines_by_density
from utils.training.curves import BAND, draw_curves, legend_handles, mask_distances

Row = Mapping[str, Any]

_MARKERS = "osD^vPX"


def compared_curves(groups: Sequence[tuple[str, Sequence[Sequence[Row]]]]) -> Figure:
    """Accuracy curves, one panel per group, on one scale; for Robust Bird those of stage 2.

    ``groups`` holds a title and the rows of each seed's ``metrics.jsonl``. With several seeds,
    lines are means, bands reach from the lowest to the highest, and events are the first seed's.
    """
    columns = min(3, len(groups))
    lines = math.ceil(len(groups) / columns)
    titles = [_wrapped(title, 36) for title, _ in groups]
    height = 3.6 + 0.22 * max(title.count("\n") for title in titles)
    figure = Figure(figsize=(4.2 * columns, 1 + height * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    panels = grid.flat[: len(groups)]
    for spare in grid.flat[len(groups) :]:
        spare.remove()
    handles: dict[str, Any] = {}
    for axes, title, (_, seeds) in zip(panels, titles, groups, strict=True):
        draw_curves(axes, *([row for row in rows if row.get("stage", 2) == 2] for rows in seeds))
        axes.set_title(title)
        handles |= legend_handles(axes)
    for axes in panels:
        if not axes.get_subplotspec().is_first_col():
            axes.set_ylabel("")
    if any(len(seeds) > 1 for _, seeds in groups):
        handles = {
            name + (" (first seed)" if name in ("prune epoch", "grow epoch") else ""): handle
            for name, handle in handles.items()
        }
        handles["lowest to highest seed"] = Patch(color="tab:grey", alpha=BAND)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    return figure


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text


# ---------------------------------------------------------------- groups of seeds


def ra_against_sparsity(lines: Sequence[tuple[str, Sequence[Group]]]) -> Figure:
    """RA of the final model on training and test images, and the gap between them, by sparsity in
    percent (the paper's Figure 1).

    Args:
        lines: each line's title and groups, densest first, as from ``runs.lines_by_density``. Error
            bars are sample standard deviations over seeds; the dense network is a star.
    """
    names = [_wrapped(title, 90) for title, _ in lines]
    columns = 1 if any(len(name) > 40 for name in names) else 3
    rows = math.ceil((len(names) + 3) / columns) + sum(name.count("\n") for name in names)
    figure = Figure(figsize=(9.6, 4.2 + 0.22 * rows), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (_, groups) in enumerate(lines):
        for axes, figure_of, style in (
            (left, lambda s: s["final"]["train_ra"], "--"),
            (left, lambda s: s["final"]["test_ra"], "-"),
            (right, itemgetter("robust_gap"), "-"),
        ):
            _draw_by_sparsity(axes, groups, figure_of, {**_look(number), "linestyle": style})
    for axes, title, label in (
        (left, "final model", "RA (%)"),
        (right, "robust generalization gap", "training RA - test RA (points)"),
    ):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("sparsity (% of the weights)")
        axes.set_ylabel(label)
        axes.set_xlim(-4, 104)
        axes.grid(alpha=0.25)
    drawn = [Line2D([], [], **_look(number), label=name) for number, name in enumerate(names)]
    drawn += [
        Line2D([], [], color="black", linestyle="--", label="on training images"),
        Line2D([], [], color="black", label="on test images"),
        Line2D([], [], color="black", linestyle="", marker="*", markersize=11, label="dense"),
    ]
    figure.legend(handles=drawn, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _look(number: int) -> dict[str, Any]:
    """Colour and marker of a line."""
    return {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)]}


def _draw_by_sparsity(
    axes: Axes, groups: Sequence[Group], figure: Callable[[Row], float], style: Mapping[str, Any]
) -> None:
    sparsities = [100 * (1 - group.measured(density).mean) for group in groups]
    measured = [group.measured(figure) for group in groups]
    axes.errorbar(
        sparsities,
        [m.mean for m in measured],
        yerr=_bars(measured),
        capsize=3,
        linewidth=1.6,
        markersize=6,
        **style,
    )
    if groups[0].method == DENSE:  # drawn over the line's own marker
        axes.plot(sparsities[0], measured[0].mean, "*", color="black", markersize=11, zorder=3)


def _bars(measured: Sequence[Measured]) -> list[float] | None:
    """Lengths of the error bars; None if every group has a single seed."""
    return None if all(m.spread is None for m in measured) else [m.spread or 0.0 for m in measured]


def gap_bars(groups: Sequence[Group]) -> Figure:
    """Robust generalization gap and Diff. (best - final RA), in points, by group, with sample
    standard deviations over seeds."""
    names = [_wrapped(group.label, 34) for group in groups]
    tallest = 1 + max(name.count("\n") for name in names)
    figure = Figure(
        figsize=(8.0, 1.7 + max(0.62, 0.2 * tallest + 0.1) * len(groups)), layout="constrained"
    )
    axes = figure.add_subplot()
    for offset, name, colour, label in (
        (
            -0.2,
            "robust_gap",
            "tab:blue",
            "robust generalization gap (training RA - test RA, final model)",
        ),
        (0.2, "diff", "tab:orange", "Diff. (best RA - final RA, test images)"),
    ):
        measured = [group.measured(itemgetter(name)) for group in groups]
        places = [number + offset for number in range(len(groups))]
        means = [m.mean for m in measured]
        bars = axes.barh(
            places,
            means,
            0.38,
            xerr=_bars(measured),
            color=colour,
            label=label,
            capsize=3,
            error_kw={"elinewidth": 1.0},
        )
        axes.bar_label(bars, fmt="%.1f", padding=4, fontsize="small")
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.4, -0.6)  # the first on top
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlabel("points")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def layer_densities(rows: Sequence[Row], title: str) -> Figure:
    """Each layer's density by epoch, first layer on top, and below it the density of the network;
    ``rows`` are of ``metrics.jsonl``, at least one of them with ``layer_densities``."""
    rows = [row for row in rows if row.get("layer_densities")]
    names, epochs = list(rows[0]["layer_densities"]), [row["epoch"] for row in rows]
    figure = Figure(figsize=(8.0, 3.2 + 0.19 * len(names)), layout="constrained")
    above, below = figure.subplots(
        2, 1, sharex=True, height_ratios=[max(2.0, 0.19 * len(names)), 1.3]
    )
    above.set_title(_wrapped(title, 60), fontsize="medium")
    matrix = [[row["layer_densities"][name] for row in rows] for name in names]
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(names) - 0.5, -0.5)
    # A square-root scale tells sparse layers apart, and shows a layer without live weights.
    image = above.imshow(
        matrix,
        aspect="auto",
        extent=extent,
        cmap="viridis",
        norm=PowerNorm(0.5, 0.0, 1.0),
        interpolation="nearest",
    )
    figure.colorbar(
        image, ax=above, label="density of the layer", ticks=[0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1]
    )
    above.set_yticks(
        range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=8
    )
    totals = [row.get("density", math.nan) for row in rows]
    below.plot(epochs, totals, color="tab:blue", marker="." if len(epochs) == 1 else None)
    below.set_ylim(0, 1.15 * max(totals))
    below.set_ylabel("density of\nthe network")
    below.set_xlabel("epoch")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.grid(alpha=0.25)
    return figure


def ticket_distances(run: FinishedRun) -> Figure | None:
    """``mask_distances`` of a Robust Bird run, from the metrics of stage 1; None if the run did no
    stage 1 of its own."""
    rows = [row for row in run.epochs if row.get("stage") == 1]
    if not rows:
        return None
    watched = None
    if run.method.startswith("rb"):
        identity = run.identity
        tolerance = identity["eb_tolerance"]
        tolerance = TOLERANCES[identity["pruning"]] if tolerance is None else tolerance
        watched = (identity["eb_window"], tolerance, rows[-1].get("ticket", False))
    distances = [row.get("mask_distances", []) for row in rows]
    whole = [len(one) == n for n, one in enumerate(distances)]
    require(all(whole), f"{run.paths.metrics} lacks mask distances of stage 1")
    return mask_distances(distances, rows[-1]["epoch"], watched)


# ---------------------------------------------------------------- the figures of a report


@dataclass(frozen=True)
class Picture:
    """A figure of a report: the stem of its file name, the figure, a caption and alternative
    text."""

    stem: str
    figure: Figure
    caption: str
    alternative: str


def report_pictures(groups: Sequence[Group]) -> list[Picture]:
    """All figures of a report; raises ``InputError`` if the metrics of a run cannot be read."""
    found = [_curves_picture(groups), _gap_picture(groups)]
    lines = lines_by_density(groups)
    if lines:
        found.insert(1, _sparsity_picture(lines, groups))
    for number, group in enumerate(groups, 1):
        whose = group.label + (f", seed {group.seeds[0]}" if len(group.runs) > 1 else "")
        found += _masks_pictures(group, whose, f"{number}_{group.method}")
    return found


def _masks_pictures(group: Group, whose: str, stem: str) -> list[Picture]:
    """Layer densities or mask distances of a group's first seed, if its method has them."""
    run = group.first
    if group.method in ("fb", "fbp") and any(row.get("layer_densities") for row in run.last_stage):
        caption = f"{whose}: density of each layer after each epoch, and of the network."
        alternative = f"Heat map of the density by layer and epoch of {whose}."
        figure = layer_densities(run.last_stage, whose)
        return [Picture(f"layer_densities_{stem}", figure, caption, alternative)]
    distances = ticket_distances(run) if group.method.startswith("rb") else None
    if distances is None:
        return []
    caption = (
        f"{whose}: in what fraction of the positions the masks of two epochs of stage 1 differ; the"
        " frame is the last window."
    )
    alternative = f"Heat map of the distances between the masks of stage 1 of {whose}."
    return [Picture(f"mask_distances_{stem}", distances, caption, alternative)]


def _curves_picture(groups: Sequence[Group]) -> Picture:
    seeds = (
        "; the mean over seeds in a band from the lowest to the highest, events of the first seed"
        if _several(groups)
        else ""
    )
    events = (
        " with the epochs in which Flying Bird+ pruned (black) or grew (red)"
        if any(group.method.startswith("fbp") for group in groups)
        else ""
    )
    curves = compared_curves(
        [(group.label, [run.epochs for run in group.runs]) for group in groups]
    )
    alternative = f"Training, validation and test accuracy by epoch of {_names(groups)}."
    return Picture("curves", curves, f"Accuracies by epoch{events}{seeds}.", alternative)


def _sparsity_picture(
    lines: Sequence[tuple[str, Sequence[Group]]], groups: Sequence[Group]
) -> Picture:
    caption = (
        "RA of the final model on training and test images, and their gap, by"
        f" sparsity{_bars_are(groups)}."
    )
    alternative = (
        "Robust accuracy and robust generalization gap by sparsity of"
        f" {', '.join(title for title, _ in lines)}."
    )
    return Picture("sparsity", ra_against_sparsity(lines), caption, alternative)


def _gap_picture(groups: Sequence[Group]) -> Picture:
    caption = (
        f"Robust generalization gap and robust overfitting (Diff.) by method{_bars_are(groups)}."
    )
    alternative = f"Bars of the robust generalization gap and of Diff. of {_names(groups)}."
    return Picture("gaps", gap_bars(groups), caption, alternative)


def _several(groups: Sequence[Group]) -> bool:
    return any(len(group.runs) > 1 for group in groups)


def _bars_are(groups: Sequence[Group]) -> str:
    return "; error bars are sample standard deviations over seeds" if _several(groups) else ""


def _names(groups: Sequence[Group]) -> str:
    return ", ".join(group.label for group in groups)
