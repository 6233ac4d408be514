"""The summary of a run: final scores, FLOPs and checksums."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from models.loading import network_of, spec_in
from utils.evaluation.scores import FinalScores
from utils.settings.common import CommonSettings
from utils.storage.checkpoint import checksum, load_checkpoint
from utils.storage.paths import RunPaths
from utils.training.stage import Row


def entry(row: Mapping[str, Any], scores: FinalScores, *, averaged: bool = False) -> Row:
    """One network's entry: its epoch, validation RA, whether its weights are averaged, and its
    final scores."""
    average = {"averaged": True} if averaged else {}
    return {"epoch": row["epoch"], "val_ra": row["val_ra"], **average, **dataclasses.asdict(scores)}


def summary_content(
    settings: CommonSettings, name: str, history: Sequence[Row], entries: Mapping[str, Row]
) -> Row:
    """What ``summary.json`` says of a run called ``name``: its settings, its networks' ``entries``,
    and the sparsity and time in its ``history``."""
    last, best, final = history[-1], entries["best"], entries["final"]
    return {
        "method": settings.method,
        "run": name,
        "settings": dataclasses.asdict(settings),
        **entries,
        "diff": best["test_ra"] - final["test_ra"],
        "robust_gap": final["robust_gap"],
        "density": last["density"],
        "layer_densities": last["layer_densities"],
        "explored": last["explored"],
        "seconds": sum(row["seconds"] for row in history),
    }


def weight_checksums(paths: RunPaths) -> dict[str, str]:
    """Checksums of the saved networks that may be evaluated, by file name."""
    found = {}
    for path in (paths.best_ra, paths.best_sa, paths.checkpoint, paths.average):
        if not path.exists():  # e.g. without an averaged network
            continue
        content = load_checkpoint(path)
        network = network_of(content, path, spec_in(content, path) or {}, torch.device("cpu"))
        found[path.name] = checksum(network.state_dict())
    return found


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary in a few lines, for the end of a run's log."""
    best, final, first = summary["best"], summary["final"], summary.get("stage1")
    lines = [_ticket_text(first)] if first else []
    average, kind = summary.get("average"), "best averaged" if best.get("averaged") else "best"
    lines += [
        f"{kind} model (epoch {best['epoch']}, by validation RA):{_scores_text(best)}",
        f"final model (epoch {final['epoch']}):{_scores_text(final)}",
        *([f"averaged model (at the end):{_scores_text(average)}"] if average else []),
        f"Diff. (best - final RA) {percent(summary['diff'])}  robust generalization gap"
        f" {percent(summary['robust_gap'])}  density {summary['density']:.4f}",
    ]
    for kind, counts in summary["flops"].items():
        lines.append(
            f"{f'FLOPs {kind}:':<12}  training {counts['training']:.4g}  inference"
            f" {counts['inference']:.4g} an image"
        )
    return "\n".join(lines)


def _scores_text(figures: Mapping[str, Any]) -> str:
    return (
        f"  test RA {figures['test_ra']:.2f}  test SA {figures['test_sa']:.2f}"
        f"  training RA {figures['train_ra']:.2f}"
    )


def percent(x: float) -> str:
    """Two decimals."""
    return f"{round(x, 2) + 0.0:.2f}"  # never -0.00


def _ticket_text(first: Mapping[str, Any]) -> str:
    if first["pretrained"] is not None:
        return f"ticket drawn from {first['pretrained']}, whose training is not in the FLOPs"
    emerged = "emerged" if first["emerged"] else "was drawn"
    return (
        f"ticket {emerged} after {first['epochs']} epochs of {first['kind']} (validation SA"
        f" {first['val_sa']:.2f})"
    )
