"""Tables and pictures of runs. Functions of metrics and summaries; nothing here writes files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Row = Mapping[str, Any]

METHOD_NAMES = {"dense": "Dense", "fb": "Flying Bird", "fbp": "Flying Bird+", "static": "Static"}
_SERIES = (
    ("train_ra", "training RA", "tab:orange", "-"),
    ("val_ra", "validation RA", "tab:blue", "-"),
    ("test_ra", "test RA", "tab:green", "-"),
    ("val_sa", "validation SA", "tab:blue", ":"),
    ("test_sa", "test SA", "tab:green", ":"),
)


def training_curves(rows: Sequence[Row], title: str) -> Figure:
    """Accuracies (percent) by epoch; Flying Bird+'s prune epochs as black lines and its grow epochs as red ones."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    _draw_curves(axes, rows)
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def compared_curves(runs: Sequence[tuple[str, Sequence[Row]]]) -> Figure:
    """One panel a run, on one scale: ``runs`` are titles with the lines of ``metrics.jsonl``."""
    figure = Figure(figsize=(4.2 * len(runs), 4.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, (title, rows) in zip(panels, runs, strict=True):
        _draw_curves(axes, rows)
        axes.set_title(title)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in panels[1:]:
        axes.set_ylabel("")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_curves(axes: Axes, rows: Sequence[Row]) -> None:
    epochs = [row["epoch"] for row in rows]
    for key, label, colour, style in _SERIES:
        axes.plot(epochs, [row[key] for row in rows], style, color=colour, label=label, linewidth=1.6)
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
    return [*(f"{x:.2f}" for x in figures), f"{s['density']:.4f}", f"{flops['training']:.3g}", f"{flops['inference']:.3g}"]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (f" {cell:<{w}} " if i == 0 else f" {cell:>{w}} " for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))
    return "|" + "|".join([first, *rest]) + "|"


def summary_text(summary: Row) -> str:
    """The end of a run in a few lines."""
    best, final, flops = summary["best"], summary["final"], summary["flops"]
    return "\n".join(
        [
            f"best model (epoch {best['epoch']}, by validation RA):  test RA {best['test_ra']:.2f}  test SA {best['test_sa']:.2f}"
            f"  training RA {best['train_ra']:.2f}",
            f"final model (epoch {final['epoch']}):  test RA {final['test_ra']:.2f}  test SA {final['test_sa']:.2f}"
            f"  training RA {final['train_ra']:.2f}",
            f"Diff. (best - final RA) {summary['diff']:.2f}  robust generalization gap {summary['robust_gap']:.2f}"
            f"  density {summary['density']:.4f}",
            f"FLOPs real:   training {flops['real']['training']:.4g}  inference {flops['real']['inference']:.4g} an image",
            f"FLOPs paper:  training {flops['paper']['training']:.4g}  inference {flops['paper']['inference']:.4g} an image",
        ]
    )
