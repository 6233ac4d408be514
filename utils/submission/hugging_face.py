"""A folder for the Hugging Face Hub: ``config.json``, ``model.safetensors``, a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from utils.errors import InputError, RunError
from utils.report.page import command_of
from utils.report.runs import METHOD_NAMES
from utils.submission.entries import Entry


def write(entry: Entry, out: Path, name: str | None) -> str:
    """Write the network's files into the folder ``out``; returns what to do with them."""
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
            raise RunError(f"{out} does not answer as {entry.path}")
    return f"hf upload USER/{title} {out}"


def card(entry: Entry, title: str) -> str:
    """What the network is, how good it is, how it was made and how it is loaded, in Markdown."""
    summary, settings = entry.run.summary, entry.run.settings
    best, what = summary["best"], "channels" if entry.narrow else "weights"
    attack = f"PGD-{settings.test_step}, {settings.test_ball}"
    rows = [
        ("robust accuracy", attack, f"{best['test_ra']:.2f} %"),
        ("clean accuracy", "none", f"{best['test_sa']:.2f} %"),
    ]
    for found in entry.run.evaluations:
        if found.get("network", {}).get("weights") == _checksum(entry):
            ball = f"{found['norm']} {found['eps']:g}/255, {found['images']['test']} images"
            rows.append(
                ("robust accuracy", f"{found['title']}, {ball}", f"{found['test_ra']:.2f} %")
            )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    classes = ", ".join(entry.spec.get("classes") or [])
    size = entry.spec["image_size"]
    return f"""# {title}
{METHOD_NAMES[entry.run.method]}, {settings.arch}{_width(entry)}: {entry.removed:.1f} % of the
{what} are pruned. Trained to resist adversarial images; chosen by the robust accuracy on
validation images.

| figure, on test images | attack | |
|---|---|---:|
{table}

- images: {size}x{size}, pixels in [0, 1], normalized inside; classes: {classes or "not named"}
- FLOPs of an inference: {summary["flops"]["real"]["inference"]:.4g} where zeros are skipped
- made by

```bash
{command_of(entry.run)}
```

```python
from models import load_model

model = load_model("FOLDER")  # where this card lies; or models.hub.HubNetwork.from_pretrained
```

The method is of Chen et al., "Sparsity Winning Twice" (ICLR 2022). A robust accuracy is an upper
bound: a stronger attack may find more.
"""


def _checksum(entry: Entry) -> str:
    from utils.storage.checkpoint import checksum

    return checksum(entry.trained.model.state_dict())


def _width(entry: Entry) -> str:
    width = entry.spec["width"]
    return "" if width == 1 else f" of {width:g} of the width"


def _metadata(entry: Entry, title: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    best, settings = entry.run.summary["best"], entry.run.settings
    common: dict[str, Any] = {
        "task_type": "image-classification",
        "dataset_type": (entry.dataset or settings.dataset).lower(),
        "dataset_name": entry.dataset or settings.dataset,
        "metric_type": "accuracy",
    }
    attack = f"robust accuracy, PGD-{settings.test_step}, {settings.test_ball}"
    return ModelCardData(
        license="mit",
        library_name="pytorch",
        tags=["adversarial-robustness", "sparsity", "image-classification"],
        model_name=title,
        eval_results=[
            EvalResult(**common, metric_name=attack, metric_value=best["test_ra"]),
            EvalResult(**common, metric_name="clean accuracy", metric_value=best["test_sa"]),
        ],
    ).to_yaml()
