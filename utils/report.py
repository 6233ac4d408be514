"""Tables and pictures of runs. Functions of metrics and summaries; nothing here writes files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

Row = Mapping[str, Any]

METHOD_NAMES = {
    "dense": "Dense",
    "rb": "Robust Bird",
    "rb-channel": "Robust Bird, channels",
    "fb": "Flying Bird",
    "fbp": "Flying Bird+",
    "static": "Static",
    "oneshot": "One-shot",
    "oneshot-channel": "One-shot, channels",
}
_SERIES = (
    ("train_ra", "training RA", "tab:orange", "-"),
    ("train_sa", "training SA", "tab:orange", ":"),
    ("val_ra", "validation RA", "tab:blue", "-"),
    ("test_ra", "test RA", "tab:green", "-"),
    ("val_sa", "validation SA", "tab:blue", ":"),
    ("test_sa", "test SA", "tab:green", ":"),
)


def training_curves(rows: Sequence[Row], title: str) -> Figure:
    """Accuracies (percent) by epoch, a panel a stage; Flying Bird+'s prune epochs as black lines and its grow epochs as red ones."""
    stages = sorted({row.get("stage", 2) for row in rows})
    panels = [[row for row in rows if row.get("stage", 2) == stage] for stage in stages]
    figure = Figure(figsize=(8 + 2 * (len(panels) - 1), 5), layout="constrained")
    # Wide enough for its labels, however few epochs a stage has.
    widths = [max(len(panel), len(rows) / 4) for panel in panels]
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0], panels, strict=True):
        _draw_curves(axes, panel)
        handles |= _handles(axes)
        if len(panels) > 1:
            axes.set_title(f"stage {panel[0]['stage']}")
        if panel is not panels[0]:
            axes.set_ylabel("")
    figure.suptitle(title)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    return figure


def mask_distances(distances: Sequence[Sequence[float]], drawn: int | None, watched: tuple[int, float, bool] | None) -> Figure:
    """The early-bird picture: in what fraction of the positions the masks of two epochs differ, for all pairs.

    Args:
        distances: row e holds those of epoch e to the epochs before it, as ``EarlyBird.distances``.
        drawn: the epoch (from 1) whose mask was drawn, if one was.
        watched: window and tolerance of the early bird and whether its ticket has emerged, where it ends the stage;
            a frame shows the window.
    """
    n = len(distances)
    matrix = [[0.0 if i == j else distances[max(i, j)][min(i, j)] for j in range(n)] for i in range(n)]
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, origin="lower", extent=(0.5, n + 0.5, 0.5, n + 0.5), cmap="viridis", vmin=0.0)
    figure.colorbar(image, label="fraction of positions that differ")
    title, what = "masks of stage 1", "drawn"
    if watched is not None:
        window, tolerance, emerged = watched
        title += f", window {window}, tolerance {tolerance:g}"
        what = "ticket" if emerged else "no ticket, drawn"
        if drawn is not None:
            size = min(window, drawn)
            corner = drawn - size + 0.5
            axes.add_patch(Rectangle((corner, corner), size, size, fill=False, edgecolor="white", linewidth=2.0))
    if drawn is not None:
        title += f", {what} after epoch {drawn}"
    axes.set_title(title, fontsize="medium")
    for axis, label in ((axes.xaxis, axes.set_xlabel), (axes.yaxis, axes.set_ylabel)):
        label("epoch")
        axis.set_major_locator(MaxNLocator(integer=True))
    return figure


def compared_curves(runs: Sequence[tuple[str, Sequence[Row]]]) -> Figure:
    """One panel a run, on one scale: ``runs`` are titles with the lines of ``metrics.jsonl``; of Robust Bird stage 2."""
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(4.2 * columns, 1 + 3.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    panels = grid.flat[: len(runs)]
    for spare in grid.flat[len(runs) :]:
        spare.remove()
    handles: dict[str, Any] = {}
    for axes, (title, rows) in zip(panels, runs, strict=True):
        _draw_curves(axes, [row for row in rows if row.get("stage", 2) == 2])
        axes.set_title(title)
        handles |= _handles(axes)
    for axes in panels:
        if not axes.get_subplotspec().is_first_col():
            axes.set_ylabel("")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _handles(axes: Axes) -> dict[str, Any]:
    return dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))


def _draw_curves(axes: Axes, rows: Sequence[Row]) -> None:
    for key, label, colour, style in _SERIES:
        measured = [row for row in rows if key in row]
        if measured:
            marker = "." if len(measured) == 1 else None  # a line of one point is invisible
            points = [row["epoch"] for row in measured], [row[key] for row in measured]
            axes.plot(*points, style, color=colour, label=label, linewidth=1.6, marker=marker)
    for verdict, colour, offset in (("prune", "black", -0.12), ("grow", "red", 0.12)):
        marked = [row["epoch"] for row in rows if any(update[verdict] for update in row["updates"])]
        for number, epoch in enumerate(marked):
            # Side by side, so that an epoch with both verdicts shows both.
            axes.axvline(epoch + offset, color=colour, linewidth=1.0, alpha=0.7, label=f"{verdict} epoch" if number == 0 else None)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)


_COLUMNS = ("method", "RA best", "RA final", "Diff.", "SA best", "SA final", "robust gap", "density", "train FLOPs", "infer FLOPs")


def summary_table(summaries: Sequence[Row]) -> str:
    """A Markdown table, a line a run: accuracies on the test set in percent, FLOPs by the real count."""
    lines = [[_method_name(s), *_cells(s)] for s in summaries]
    widths = [max(len(line[i]) for line in [_COLUMNS, *lines]) for i in range(len(_COLUMNS))]
    text = [_line(_COLUMNS, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    return "\n".join(text + [_line(line, widths) for line in lines])


def _method_name(summary: Row) -> str:
    name = METHOD_NAMES[summary["method"]]
    return f"{name} ({summary['settings']['sparse_init']})" if summary["method"] == "static" else name


def _cells(s: Row) -> list[str]:
    best, final, flops = s["best"], s["final"], s["flops"]["real"]
    figures = [best["test_ra"], final["test_ra"], s["diff"], best["test_sa"], final["test_sa"], s["robust_gap"]]
    return [*map(_percent, figures), f"{s['density']:.4f}", f"{flops['training']:.3g}", f"{flops['inference']:.3g}"]


def _percent(x: float) -> str:
    return f"{round(x, 2) + 0.0:.2f}"  # never -0.00


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (f" {cell:<{w}} " if i == 0 else f" {cell:>{w}} " for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))
    return "|" + "|".join([first, *rest]) + "|"


def summary_text(summary: Row) -> str:
    """The end of a run in a few lines."""
    best, final, flops, first = summary["best"], summary["final"], summary["flops"], summary.get("stage1")
    return "\n".join(
        [
            *([_ticket_text(first)] if first else []),
            f"best model (epoch {best['epoch']}, by validation RA):  test RA {best['test_ra']:.2f}  test SA {best['test_sa']:.2f}"
            f"  training RA {best['train_ra']:.2f}",
            f"final model (epoch {final['epoch']}):  test RA {final['test_ra']:.2f}  test SA {final['test_sa']:.2f}"
            f"  training RA {final['train_ra']:.2f}",
            f"Diff. (best - final RA) {_percent(summary['diff'])}  robust generalization gap {_percent(summary['robust_gap'])}"
            f"  density {summary['density']:.4f}",
            f"FLOPs real:   training {flops['real']['training']:.4g}  inference {flops['real']['inference']:.4g} an image",
            f"FLOPs paper:  training {flops['paper']['training']:.4g}  inference {flops['paper']['inference']:.4g} an image",
        ]
    )


def _ticket_text(first: Row) -> str:
    if first["pretrained"] is not None:
        return f"ticket drawn from {first['pretrained']}, whose training is not in the FLOPs"
    emerged = "emerged" if first["emerged"] else "was drawn"
    return f"ticket {emerged} after {first['epochs']} epochs of {first['kind']} (validation SA {first['val_sa']:.2f})"
