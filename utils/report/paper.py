"""Published results (``results/paper``), which of them apply to a group of runs, and how the
group's set-up differs from the paper's."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.report.runs import Group, setting_text, value_text

_FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper"
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tinyimagenet": "Tiny-ImageNet"}
_DENSITY = 0.2  # of the paper's sparse rows
# the benchmark's sparsities in percent, by density
SPARSITIES = {"weights": {0.1: 90, 0.05: 95, 0.01: 99}, "channels": {0.5: 50, 0.25: 75, 0.1: 90}}
BENCHMARK_EPS = 0.031  # linf radius of the benchmark's AutoAttack
_EPOCHS = 200  # the paper's, in either stage
# Settings that a report shows elsewhere, or replaces by what the run really used.
_NO_DIFFERENCE = set("seed dataset data density fb fbp fix pruning precision image_size".split())
_NO_DIFFERENCE |= {"train_subset", "test_subset"}


_FACTS = ("classes", "training images", "test images", "image side")
_IMAGES = {
    "cifar10": (10, 45_000, 10_000, 32),
    "cifar100": (100, 45_000, 10_000, 32),
    "tinyimagenet": (200, 90_000, 10_000, 64),
}


@dataclass(frozen=True)
class Published:
    """A method's test accuracies in the benchmark, in percent; None if unknown."""

    method: str
    clean: float | None
    autoattack: float


def dataset_of(group: Group, paper_dataset: str | None) -> str | None:
    """The data set of ``DATASETS`` to compare a group with: its own, or ``paper_dataset`` if the
    paper lacks it."""
    return group.settings.dataset if group.settings.dataset in DATASETS else paper_dataset


def table1(group: Group, paper_dataset: str | None = None) -> dict[str, float]:
    """A group's row of the paper's Table 1, by column, with FLOPs unscaled; empty if it has none.
    Raises ``InputError`` if the file cannot be read."""
    dataset = dataset_of(group, paper_dataset)
    fits = group.settings.arch == "resnet18" and group.density == (
        1.0 if group.method == "dense" else _DENSITY
    )
    for row in _read("table1.csv") if fits else []:
        if (row["dataset"], row["method"]) == (dataset, group.method):
            figures = {
                name: float(cell) for name, cell in row.items() if name not in ("dataset", "method")
            }
            figures["train_flops"] = figures.pop("train_flops_e17") * 1e17
            figures["inference_flops"] = figures.pop("inference_flops_e9") * 1e9
            return figures
    return {}


def benchmark(dataset: str | None, arch: str, structure: str, sparsity: int) -> list[Published]:
    """The benchmark's methods on a data set and architecture, at a sparsity in percent of the
    weights or channels; empty if it has no such cell."""
    cells = [
        row
        for row in _read("adversarial_pruning_benchmark.csv")
        if (row["dataset"], row["arch"], row["structure"]) == (dataset, arch, structure)
    ]
    return [
        Published(row["method"], float(clean) if clean else None, float(row["autoattack_accuracy"]))
        for row in cells
        if float(row["sparsity_percent"]) == sparsity
        for clean in [row["clean_accuracy"]]
    ]


def benchmark_sparsity(group: Group) -> tuple[str, int] | None:
    """A group's structure and requested sparsity in percent, as in the benchmark; None for
    densities that it lacks."""
    settings = group.settings
    # The fraction of the channels is then not the requested density.
    if group.method == "fbp-channel" or getattr(settings, "flops", None) is not None:
        return None
    structure = "channels" if group.method.endswith("-channel") else "weights"
    sparsity = SPARSITIES[structure].get(group.density)
    return None if sparsity is None else (structure, sparsity)


def differences(group: Group, dataset: str | None) -> list[str]:
    """How a group's runs differ from those of the paper on ``dataset``, in words; density is left
    out."""
    settings, found = group.settings, list[str]()
    if dataset != settings.dataset:
        folder = f" {Path(settings.data).name}" if settings.dataset == "imagefolder" else ""
        found.append(f"data set {settings.dataset}{folder}")
    if dataset is not None:
        found += _other_images(group.first.config, _IMAGES[dataset])
    precision = group.first.precision
    if precision != "float32":
        found.append(f"trained in {precision} (paper: float32)")
    return found + _other_settings(group)


def _other_images(config: Mapping[str, Mapping[str, int]], theirs: Sequence[int]) -> list[str]:
    images, network = config.get("images", {}), config.get("network", {})
    ours = (network.get("num_classes"), images.get("train"), images.get("test"))
    facts = zip(_FACTS, (*ours, network.get("image_size")), theirs, strict=True)
    return [
        f"{what} {own} (paper: {paper})" for what, own, paper in facts if own not in (None, paper)
    ]


def _other_settings(group: Group) -> list[str]:
    """The settings that differ from their defaults, which are the paper's."""
    settings = group.settings
    lengths: dict[str, Any] = {
        name: _EPOCHS for name in ("epochs1", "epochs2", "epochs") if hasattr(settings, name)
    }
    # Milestones given as fractions scale with the length, so they are compared at the paper's.
    at_length = dataclasses.replace(settings, **lengths).canonical()
    ours, fields = settings.canonical(), dataclasses.fields(settings)
    defaults = {f.name: f.default for f in fields if f.metadata["result"]}
    if group.method.split("-")[0] in ("fb", "fbp"):
        defaults["dynamic_fre"] = True  # as in the paper's commands
    found = []
    for name, default in defaults.items():
        value = ours[name] if name in lengths else at_length[name]
        if name not in _NO_DIFFERENCE and value != default:
            found.append(f"{setting_text(name, ours[name])} (paper: {value_text(name, default)})")
    return found


def _read(name: str) -> Sequence[Mapping[str, str]]:
    path = _FOLDER / name
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error})") from error
