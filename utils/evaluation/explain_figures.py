"""Figures of the results of ``utils.evaluation.explain``; nothing here writes files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator
from torch import Tensor

from utils.evaluation.explain import CamStage, Explanation, View, grid_coordinates

_CAM_OPACITY = 0.5  # of the overlay
_LEVELS = 16  # contour lines
_SMALLEST_LOSS = 1e-4  # smaller losses are drawn as this
_LOSS_FORMAT = "%.3g"
_COORDINATE_TICKS = (-1.0, -0.5, 0.0, 0.5, 1.0)


def saliency_figure(found: Explanation, classes: Sequence[str], attack: str, title: str) -> Figure:
    """One row per image: clean and attacked, each with Grad-CAM, saliency and prediction, and the
    perturbation; the two saliency maps of an image share one scale."""
    clean, attacked, y = found.clean, found.attacked, found.y
    n = len(y)
    figure = Figure(figsize=(11.5, 1.5 + 1.75 * n), layout="constrained")
    figure.suptitle(f"{title}\n{_where(found.stage)}", fontsize="medium")
    headings, *rows = figure.subplots(n + 1, 7, height_ratios=[0.12, *[1.0] * n], squeeze=False)
    perturbation = attacked.images - clean.images
    gain = 0.5 / perturbation.abs().max().clamp_min(1 / 510).item()
    half = ["Grad-CAM", "saliency"]
    for axes, heading in zip(
        headings,
        ["image", *half, f"{attack} image", *half, f"perturbation x {gain:.3g}"],
        strict=True,
    ):
        axes.set_axis_off()
        axes.text(0.5, 0.0, heading, ha="center", va="bottom", fontweight="bold")
    for i, row in enumerate(rows):
        brightest = max(clean.saliency[i].max().item(), attacked.saliency[i].max().item())
        _draw_half(row[:3], clean, i, int(y[i]), classes, brightest)
        _draw_half(row[3:6], attacked, i, int(y[i]), classes, brightest)
        row[6].imshow(_pixels(0.5 + gain * perturbation[i]))
        row[0].set_ylabel(classes[int(y[i])])
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    return figure


def _draw_half(
    row: Sequence[Axes], view: View, i: int, y: int, classes: Sequence[str], brightest: float
) -> None:
    """Draw image ``i`` of a view, its Grad-CAM overlay titled with the prediction, its saliency."""
    pixels = _pixels(view.images[i])
    row[0].imshow(pixels)
    row[1].imshow(pixels)
    row[1].imshow(view.cam[i].numpy(), cmap="turbo", vmin=0.0, vmax=1.0, alpha=_CAM_OPACITY)
    row[2].imshow(view.saliency[i].numpy(), cmap="inferno", vmin=0.0, vmax=brightest or 1.0)
    answer = int(view.probabilities[i].argmax())
    colour = "tab:green" if answer == y else "tab:red"
    row[1].set_title(
        f"predicted {classes[answer]} ({view.probabilities[i, answer]:.2f})",
        fontsize="medium",
        color=colour,
    )


def _where(stage: CamStage) -> str:
    height, width = stage.size
    text = (
        f"Grad-CAM of the true class at {stage.name} (a map of {height}x{width}; red: most"
        " evidence, dark: none)"
    )
    return text + (
        f"; the map of {', '.join(stage.too_small)} is too small to show places"
        if stage.too_small
        else ""
    )


def _pixels(image: Tensor) -> np.ndarray:
    """An image ``[C, H, W]``, C = 1 or 3, as ``[H, W, 3]`` clipped to [0, 1]."""
    return image.clamp(0.0, 1.0).expand(3, -1, -1).permute(1, 2, 0).numpy()


def landscape_figure(found: Explanation, attack: str, title: str) -> Figure:
    """Contours of the clean and the robust loss around a network on one scale, and cuts through the
    network along both directions."""
    names = ("clean loss", f"robust loss ({attack})")
    shown = found.losses.clamp_min(_SMALLEST_LOSS)
    low = shown.min().item()
    levels = np.geomspace(low, max(shown.max().item(), 1.01 * low), _LEVELS)
    figure = Figure(figsize=(14.5, 4.6), layout="compressed")
    figure.suptitle(title, fontsize="medium")
    *panels, cuts = figure.subplots(1, 3)
    for axes, name, surface in zip(
        panels, (names[0], f"{names[1]}, crafted at the centre"), shown, strict=True
    ):
        filled = _draw_contours(axes, surface, levels)
        axes.set_title(name, fontsize="medium")
    panels[0].set_ylabel("along the second direction")
    figure.colorbar(
        filled, ax=panels, label="mean cross-entropy", ticks=_loss_ticks(), format=_LOSS_FORMAT
    )
    _draw_cuts(cuts, shown, names)
    return figure


def _loss_ticks() -> LogLocator:
    return LogLocator(subs=(1, 2, 5))


def _draw_contours(axes: Axes, surface: Tensor, levels: np.ndarray) -> ContourSet:
    coordinates = grid_coordinates(len(surface)).numpy()
    # Transposed: the first direction is the x axis, and matplotlib has x along the columns.
    filled = axes.contourf(
        coordinates,
        coordinates,
        surface.T.numpy(),
        levels,
        cmap="viridis",
        norm=LogNorm(levels[0], levels[-1]),
    )
    axes.contour(filled, colors="black", linewidths=0.5)
    axes.plot(0.0, 0.0, "x", color="white", markersize=8, markeredgewidth=2)
    axes.set_xlabel("along the first direction")
    axes.set_box_aspect(1)
    axes.set_xticks(_COORDINATE_TICKS)
    axes.set_yticks(_COORDINATE_TICKS)
    return filled


def _draw_cuts(axes: Axes, surfaces: Tensor, names: Sequence[str]) -> None:
    coordinates = grid_coordinates(surfaces.shape[1]).numpy()
    centre = surfaces.shape[1] // 2
    for surface, name, colour in zip(surfaces, names, ("tab:blue", "tab:red"), strict=True):
        cuts = (("-", surface[:, centre], "first"), ("--", surface[centre], "second"))
        for style, cut, which in cuts:
            label = f"{name}, {which} direction"
            axes.plot(coordinates, cut.numpy(), style, color=colour, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_loss_ticks())
    axes.yaxis.set_major_formatter(FormatStrFormatter(_LOSS_FORMAT))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(_COORDINATE_TICKS)
    axes.set_xlabel("distance from the network, in norms of its filters")
    axes.set_title("cuts through the network", fontsize="medium")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
