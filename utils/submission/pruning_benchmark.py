"""What the Adversarial Pruning Benchmark asks for (Piras et al., arXiv 2409.01249): one
architecture, data set and structure at three sparsities, each with its distances; a taxonomy entry;
and an issue that reports them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from models.loading import build_network, full_size
from sparse_core import prunable
from utils.errors import RunError, require
from utils.submission.entries import (
    Entry,
    agrees,
    autoattack,
    beyond,
    distances,
    flat_state,
    json_text,
)

EPS = 0.031  # of AutoAttack there; HO-FMN's robust accuracy is at 8/255
_IMAGES = 10_000
_PAPER = "https://arxiv.org/pdf/2202.09844.pdf"
# percent pruned of weights and of channels, and how near a network must be to one of them
_RATES = {False: ((90, 95, 99), 0.5), True: ((50, 75, 90), 4.0)}
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # in their networks of Flying Bird
_KEYS = {"fb": "FlyingBird_Chen2021Sparsity", "rb": "RobustBird_Chen2021Sparsity"}
_METHODS = {"fb": "FlyingBird", "fbp": "FlyingBirdPlus", "rb": "RobustBird", "oneshot": "OneShot"}
_AT = "Adversarial Training (AT) PGD"


def chosen(entries: Sequence[Entry]) -> dict[int, Entry]:
    """The networks by the benchmark's sparsity; raises ``InputError`` if they are not what it
    takes."""
    first = entries[0]
    for entry in entries:
        name, settings = entry.run.name, entry.run.settings
        arch = entry.spec["arch"]
        fits = arch in ("resnet18", "vgg16") and entry.spec["width"] == 1
        require(fits, f"{name}: the benchmark takes resnet18 and vgg16 of full width")
        require(
            entry.dataset in ("CIFAR10", "SVHN"),
            f"{name}: the benchmark takes networks of CIFAR-10 and SVHN, not of {settings.dataset}",
        )
        require(
            entry.run.method != "dense", f"{name} is dense; the benchmark is of pruned networks"
        )
        same = (arch, entry.dataset, entry.narrow, entry.run.method)
        require(
            same == (first.spec["arch"], first.dataset, first.narrow, first.run.method),
            f"{name} and {first.run.name} differ in architecture, data set, structure or method",
        )
    found: dict[int, Entry] = {}
    rates, tolerance = _RATES[first.narrow]
    what = "channels" if first.narrow else "weights"
    for entry in entries:
        rate = min(rates, key=lambda rate: abs(rate - entry.removed))
        require(
            abs(rate - entry.removed) <= tolerance,
            f"{entry.run.name} has pruned {entry.removed:.2f} % of its {what}; the benchmark takes"
            f" {', '.join(map(str, rates))} %",
        )
        require(rate not in found, f"two of the runs have pruned {rate} % of their {what}")
        found[rate] = entry
    missing = [str(rate) for rate in rates if rate not in found]
    require(not missing, f"the benchmark asks for a network at {', '.join(missing)} % too")
    return dict(sorted(found.items()))


def write(
    entries: Sequence[Entry],
    out: Path,
    name: str | None,
    flags: Sequence[str],
    trials: int,
    steps: int,
) -> str:
    """Evaluate the networks and write their files into the folder ``out``; returns what to do with
    them."""
    networks = chosen(entries)
    first = next(iter(networks.values()))
    method = first.run.method.removesuffix("-channel")
    key = name or _key(method, first.narrow)
    (out / "taxonomy.json").write_text(json_text(_taxonomy(method, first, key)))
    results, sections = {}, []
    for number, (rate, entry) in enumerate(networks.items(), 1):
        arch = "R18" if entry.spec["arch"] == "resnet18" else "V16"
        model_key = f"{key}_{arch}_{entry.dataset}_{'S' if entry.narrow else 'US'}_{rate}"
        (out / f"{model_key}.pt").write_bytes(_checkpoint(entry))
        _refuse_other_answers(out / f"{model_key}.pt", entry)
        scores = autoattack(entry, 255 * EPS, flags)
        attack, found = distances(scores, trials, steps)
        (out / f"{model_key}.pickle").write_bytes(pickle.dumps([torch.tensor(d) for d in found]))
        results[model_key] = {
            "clean accuracy": scores.clean,
            "AutoAttack": {"eps": EPS, "robust accuracy": scores.robust},
            "HO-FMN": {
                "eps": 8 / 255,
                "robust accuracy": beyond(found, 8 / 255),
                "steps": attack.steps,
                "trials": trials,
                "step size": attack.step_size,
                "momentum": attack.momentum,
            },
            "images": scores.images,
            "removed %": entry.removed,
            "zero weights by layer, %": _zeros(entry),
        }
        sections.append(
            f"## Evaluation Results of Model n°{number}\n"
            f'_Model GDrive:_ "{model_key}" : ["", ".pt"]\n'
            f'_Distances GDrive:_ "{model_key}" : ["", ".pickle"]\n\n'
            f"_Clean Accuracy:_ {scores.clean:.2f}\n"
            f"_Robust Accuracy (AA):_ {scores.robust:.2f}\n"
            f"_Robust Accuracy (HO-FMN):_ {beyond(found, 8 / 255):.2f}\n"
        )
        images = scores.images
    (out / "results.json").write_text(json_text(results))
    entry_text = f"## JSON Entry\n```json\n{json_text(_taxonomy(method, first, key))}```\n"
    (out / "issue.md").write_text("\n".join([entry_text, *sections, _details(first)]))
    left = "upload each .pt and .pickle, put their ids into issue.md, and open the issue"
    if images < _IMAGES:
        left = f"measured on {images} images; the benchmark wants all {_IMAGES:,} test images"
    return left


def _key(method: str, narrow: bool) -> str:
    if not narrow and method in _KEYS:
        return _KEYS[method]
    return f"{_METHODS.get(method, 'Static')}{'Channels' if narrow else ''}_Chen2021Sparsity"


def _taxonomy(method: str, entry: Entry, key: str) -> dict[str, str]:
    """In the words of the benchmark's form."""
    during = method in ("fb", "fbp")
    score = getattr(entry.run.settings, "channel_score", "taylor")
    least = entry.narrow and during and score == "taylor"
    if during:
        pipeline = {"Type of Pipeline:": "D-Methods Pruning During Training"}
        pipeline["D: Training step "] = _AT
    else:
        first = "Natural Training (NT)" if method in ("rb", "oneshot") else "None"
        pipeline = {"Type of Pipeline:": "B-Methods Pruning Before Training"}
        pipeline |= {"B: Pruning step ": first, "B: Training step ": _AT}
        pipeline["B: OneShot (1S) vs Iterative (IT)"] = "1S"
    # per layer or group: as many grow as were dropped there
    local = during or entry.narrow or method not in ("rb", "oneshot")
    return {
        "link_to_paper": _PAPER,
        "ap_key": key,
        **pipeline,
        "Pruning structure": "Structured (S) channels" if entry.narrow else "Unstructured (US)",
        "Pruning locality": "Local Pruning (L)" if local else "Global Pruning (G)",
        "Pruning criterion": (
            "Least Importance Score (LIS)" if least else "Lowest Weight Magnitude LWM"
        ),
    }


def _checkpoint(entry: Entry) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": flat_state(entry, normalization=False)}, buffer)
    return buffer.getvalue()


def _refuse_other_answers(path: Path, entry: Entry) -> None:
    """Load the file strictly into the full-size network without normalization, as the benchmark
    does, and compare."""
    network = build_network(full_size(entry.spec), torch.device("cpu"))
    network.normalize = nn.Identity()
    network.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    if not agrees(network, entry, normalization=False):
        raise RunError(f"{path}: the full-size network does not answer as {entry.path}")


def _zeros(entry: Entry) -> dict[str, float]:
    state = flat_state(entry, normalization=False)
    return {
        name: round(100 * (state[name] == 0).float().mean().item(), 2)
        for name in prunable(entry.trained.full_size())
    }


def _details(entry: Entry) -> str:
    base = "models/flyingbird.py"
    spec = entry.spec
    same = all(
        abs(a - b) < 5e-5
        for a, b in zip((*spec["mean"], *spec["std"]), (*_MEAN, *_STD), strict=True)
    )
    pixels = (
        f"Pixels are normalized as in {base}: mean {list(_MEAN)}, standard deviation {list(_STD)}."
        if same
        else "Pixels must be normalized with the training data's mean"
        f" {[round(m, 4) for m in spec['mean']]} and standard deviation"
        f" {[round(d, 4) for d in spec['std']]}, which are not those in {base}."
    )
    return (
        "## Architecture details and normalization\n"
        f"{pixels} The checkpoints hold `state_dict` with the names and full-size shapes of {base}"
        " (a pre-activation ResNet-18, or VGG-16 with batch norm), zeros where nothing lives, and"
        " load with strict=True. HO-FMN is a re-implementation: DLR loss, SGD on the normalized"
        " gradient with a cosine schedule, step size and momentum from a Sobol search.\n"
    )
