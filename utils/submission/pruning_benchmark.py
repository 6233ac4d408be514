"""Writes a submission to the Adversarial Pruning Benchmark (Piras et al., arXiv 2409.01249): one
architecture, data set and structure at three sparsities, each with its adversarial distances; a
taxonomy entry; and the text of an issue."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.loading import build_network, full_size, full_size_state
from sparse_core import prunable
from utils.errors import RunError, require
from utils.report.paper import BENCHMARK_EPS, SPARSITIES
from utils.storage.files import json_bytes, saved_bytes
from utils.submission.entries import Entry, agrees, autoattack, beyond, distances

BALL = ("linf", 255 * BENCHMARK_EPS)  # of AutoAttack; HO-FMN's robust accuracy is at 8/255
_PAPER = "https://arxiv.org/pdf/2202.09844.pdf"
# largest deviation from the benchmark's sparsities, in percentage points
_TOLERANCES = {"weights": 0.5, "channels": 4.0}
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # in its Flying Bird networks
_PAPERS = ("fb", "fbp", "rb")  # the paper's methods, for weights
_KEYS = {"fb": "FlyingBird_Chen2021Sparsity", "rb": "RobustBird_Chen2021Sparsity"}
_METHODS = {"fb": "FlyingBird", "fbp": "FlyingBirdPlus", "rb": "RobustBird", "oneshot": "OneShot"}
_STATIC = {  # criteria of static masks
    "magnitude": "Lowest Weight Magnitude LWM",
    **dict.fromkeys(("snip", "grasp", "synflow"), "Least Importance Score (LIS)"),
}


def chosen(entries: Sequence[Entry]) -> dict[int, Entry]:
    """The networks by the benchmark's sparsity in percent; raises ``InputError`` if it does not
    accept them."""
    first = entries[0]
    for entry in entries:
        name, settings = entry.run.name, entry.run.settings
        arch = entry.spec["arch"]
        fits = arch in ("resnet18", "vgg16") and entry.spec["width"] == 1
        require(fits, f"{name}: the benchmark takes resnet18 and vgg16 of full width")
        require(
            entry.dataset in ("CIFAR10", "SVHN"),
            f"{name}: the benchmark takes networks of CIFAR-10 and SVHN (32x32), not of"
            f" {settings.dataset}",
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
    what = "channels" if first.narrow else "weights"
    rates, tolerance = tuple(SPARSITIES[what].values()), _TOLERANCES[what]
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
    """Evaluate the networks and write their files into the folder ``out``; returns the next step
    for the user. Raises ``RunError`` if a written network gives other logits."""
    networks = chosen(entries)
    first = next(iter(networks.values()))
    method = first.run.method.removesuffix("-channel")
    key = name or _key(method, first.narrow)
    taxonomy = json_bytes(_taxonomy(method, first, key))
    (out / "taxonomy.json").write_bytes(taxonomy)
    results, sections, left = {}, [], None
    for number, (rate, entry) in enumerate(networks.items(), 1):
        arch = "R18" if entry.spec["arch"] == "resnet18" else "V16"
        model_key = f"{key}_{arch}_{entry.dataset}_{'S' if entry.narrow else 'US'}_{rate}"
        (out / f"{model_key}.pt").write_bytes(saved_bytes({"state_dict": _flat_state(entry)}))
        _refuse_other_answers(out / f"{model_key}.pt", entry)
        scores = autoattack(entry, *BALL, flags)
        attack, found = distances(scores, trials, steps)
        (out / f"{model_key}.pickle").write_bytes(pickle.dumps([torch.tensor(d) for d in found]))
        results[model_key] = {
            "clean accuracy": scores.clean,
            "AutoAttack": {
                "norm": scores.evaluation.attack.norm,
                "eps": round(scores.evaluation.attack.eps, 6),
                "robust accuracy": scores.robust,
            },
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
        left = left or scores.shortfall(entry, "the benchmark")
    (out / "results.json").write_bytes(json_bytes(results))
    entry_text = f"## JSON Entry\n```json\n{taxonomy.decode()}```\n"
    (out / "issue.md").write_text("\n".join([entry_text, *sections, _details(first)]))
    return left or "upload each .pt and .pickle, put their ids into issue.md, and open the issue"


def _key(method: str, narrow: bool) -> str:
    """The benchmark's key for the method, else a placeholder that ``--name`` replaces."""
    if not narrow and method in _KEYS:
        return _KEYS[method]
    return f"{_METHODS.get(method, 'Static')}{'Channels' if narrow else ''}_Unpublished"


def _taxonomy(method: str, entry: Entry, key: str) -> dict[str, str]:
    """The taxonomy entry in the terms of the benchmark's form, or in ours if it has none."""
    settings: Any = entry.run.settings
    during, ticket = method in ("fb", "fbp"), method in ("rb", "oneshot")
    pipeline = {"Type of Pipeline:": "D-Methods Pruning During Training"}
    if during:
        pipeline["D: Training step "] = _training(settings)
    else:
        first = {"sgd": "Natural Training (NT)", "pgd": "Adversarial Training (AT) PGD"}
        pruned = "None" if not ticket else first.get(settings.stage1, settings.stage1)
        if ticket and settings.stage1_pretrained is not None:
            pruned = "Pretrained network"
        pipeline = {
            "Type of Pipeline:": "B-Methods Pruning Before Training",
            "B: Pruning step ": pruned,
            "B: Training step ": _training(settings),
            "B: OneShot (1S) vs Iterative (IT)": "1S",
        }
    # each layer or channel group grows as many as it drops
    local = during or entry.narrow or not ticket
    criterion = "Lowest Weight Magnitude LWM"
    if entry.narrow and during and settings.channel_score == "taylor":
        criterion = "Least Importance Score (LIS)"
    elif not during and not ticket:
        criterion = _STATIC.get("channels" if entry.narrow else settings.sparse_init, "Random")
    return {
        "link_to_paper": "" if entry.narrow or method not in _PAPERS else _PAPER,
        "ap_key": key,
        **pipeline,
        "Pruning structure": "Structured (S) channels" if entry.narrow else "Unstructured (US)",
        "Pruning locality": "Local Pruning (L)" if local else "Global Pruning (G)",
        "Pruning criterion": criterion,
    }


def _training(settings: Any) -> str:
    last = getattr(settings, "stage2", "pgd")  # of Robust Bird
    attack = {"sgd": "none", "fast": "fgsm-rs"}.get(last, settings.train_attack)
    if attack == "none":
        return "Natural Training (NT)"
    kind = "TRADES" if settings.train_loss == "trades" else attack.upper()
    return f"Adversarial Training (AT) {kind}" + (", AWP" if settings.awp else "")


def _flat_state(entry: Entry) -> dict[str, torch.Tensor]:
    """Full-size state dict without the pixel statistics, which the benchmark has as constants."""
    state = full_size_state(entry.spec, entry.trained.state)
    kept = {name: value for name, value in state.items() if not name.startswith("normalize.")}
    return {name: value.contiguous() for name, value in kept.items()}


def _refuse_other_answers(path: Path, entry: Entry) -> None:
    """Load the file strictly into the full-size network without normalization, as the benchmark
    does, and compare."""
    network = build_network(full_size(entry.spec), torch.device("cpu"))
    network.normalize = nn.Identity()
    network.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    if not agrees(network, entry, normalization=False):
        raise RunError(f"{path}: the full-size network does not give the logits of {entry.path}")


def _zeros(entry: Entry) -> dict[str, float]:
    state = _flat_state(entry)
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
