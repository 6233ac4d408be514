"""The summary of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.report.tables import _percent

Row = Mapping[str, Any]


def summary_text(summary: Row) -> str:
    """The end of a run in a few lines."""
    best, final, flops, first = (
        summary["best"],
        summary["final"],
        summary["flops"],
        summary.get("stage1"),
    )
    return "\n".join(
        [
            *([_ticket_text(first)] if first else []),
            (
                f"best model (epoch {best['epoch']}, by validation RA):  test RA"
                f" {best['test_ra']:.2f}  test SA {best['test_sa']:.2f}  training RA"
                f" {best['train_ra']:.2f}"
            ),
            (
                f"final model (epoch {final['epoch']}):  test RA {final['test_ra']:.2f}  test SA"
                f" {final['test_sa']:.2f}  training RA {final['train_ra']:.2f}"
            ),
            (
                f"Diff. (best - final RA) {_percent(summary['diff'])}  robust generalization gap"
                f" {_percent(summary['robust_gap'])}  density {summary['density']:.4f}"
            ),
            (
                f"FLOPs real:   training {flops['real']['training']:.4g}  inference"
                f" {flops['real']['inference']:.4g} an image"
            ),
            (
                f"FLOPs paper:  training {flops['paper']['training']:.4g}  inference"
                f" {flops['paper']['inference']:.4g} an image"
            ),
        ]
    )


def _ticket_text(first: Row) -> str:
    if first["pretrained"] is not None:
        return f"ticket drawn from {first['pretrained']}, whose training is not in the FLOPs"
    emerged = "emerged" if first["emerged"] else "was drawn"
    return (
        f"ticket {emerged} after {first['epochs']} epochs of {first['kind']} (validation SA"
        f" {first['val_sa']:.2f})"
    )
