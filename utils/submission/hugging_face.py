"""Writes a folder for the Hugging Face Hub: ``config.json``, ``model.safetensors`` and a card."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch

from utils.errors import InputError, RunError
from utils.submission.card import card
from utils.submission.entries import Entry


def write(entry: Entry, out: Path, name: str | None) -> str:
    """Write the network's files into the folder ``out`` and return how to upload them.

    Raises:
        InputError: huggingface_hub is not installed.
        RunError: the network in ``out`` gives other logits.
    """
    try:
        from huggingface_hub import ModelCard

        from models.hub import HubNetwork
    except ImportError as error:
        raise InputError(
            "--for huggingface needs huggingface_hub: pip install huggingface_hub"
        ) from error
    title = name or entry.run.name
    ModelCard(f"---\n{_metadata(entry, title)}\n---\n{card(entry, title)}").save(out / "README.md")
    HubNetwork.read(entry.path, entry.trained.about).save_pretrained(out)
    images = entry.trained.images(5)
    with torch.no_grad():
        again = HubNetwork.from_pretrained(str(out))(images)
        if not torch.equal(again, entry.trained.model(images)):
            raise RunError(f"{out} does not give the logits of {entry.path}")
    return f"upload it with: hf upload {shlex.quote(f'USER/{title}')} {shlex.quote(str(out))}"


def _metadata(entry: Entry, title: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    from models.hub import LIBRARY, LICENSE, TAGS

    best, settings = entry.run.summary["best"], entry.run.settings
    common: dict[str, Any] = {
        "task_type": "image-classification",
        "dataset_type": (entry.dataset or settings.dataset).lower(),
        "dataset_name": entry.dataset or settings.dataset,
        "metric_type": "accuracy",
    }
    attack = f"robust accuracy, PGD-{settings.test_step}, {settings.test_ball}"
    return ModelCardData(
        license=LICENSE,
        library_name=LIBRARY,
        tags=TAGS,
        model_name=title,
        eval_results=[
            EvalResult(**common, metric_name=attack, metric_value=best["test_ra"]),
            EvalResult(**common, metric_name="clean accuracy", metric_value=best["test_sa"]),
        ],
    ).to_yaml()
