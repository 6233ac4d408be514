"""The model card of a finished run."""

from __future__ import annotations

from utils.report.runs import METHOD_NAMES, command_of
from utils.report.tables import valid_evaluations
from utils.storage.checkpoint import checksum
from utils.submission.entries import Entry

_BIRDS = ("rb", "fb", "fbp")


def card(entry: Entry, title: str, note: str = "") -> str:
    """A model card in Markdown: what the network is, its accuracies, how it was trained and how to
    load it, with an optional ``note`` on the weights."""
    summary, settings = entry.run.summary, entry.run.settings
    best, what = summary["best"], "channels" if entry.narrow else "weights"
    attack = f"PGD-{settings.test_step}, {settings.test_ball}"
    if settings.test_subset is not None:
        attack += f", {entry.run.config['images']['test']} images"
    rows = [
        ("robust accuracy", attack, f"{best['test_ra']:.2f} %"),
        ("clean accuracy", "none", f"{best['test_sa']:.2f} %"),
    ]
    weights = checksum(entry.trained.model.state_dict())
    for found in valid_evaluations(entry.run):
        # images crafted on another network are no attack on this one
        is_ours = found.get("network", {}).get("weights") == weights
        if is_ours and not found.get("source") and entry.run.took_data_of(found):
            ball = f"{found['norm']} {found['eps']:g}/255, {found['images']['test']} images"
            size = f", steps of {found['step_size']:g}/255" if found.get("step_size") else ""
            told = "; ".join([f"{found['title']}, {ball}{size}", *found.get("warnings", [])])
            rows.append(("robust accuracy", told, f"{found['test_ra']:.2f} %"))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    classes = ", ".join(entry.spec.get("classes") or [])
    size, width = "x".join(map(str, entry.trained.image_shape)), entry.spec["width"]
    wide = "" if width == 1 else f" at {width:g} of the width"
    attacked = settings.trainings()[-1][0].attack is not None
    trained = f"Trained {'to resist adversarial' if attacked else 'on clean'} images"
    return f"""# {title}
{METHOD_NAMES[entry.run.method]}, {settings.arch}{wide}: {entry.removed:.1f} % of the
{what} are pruned. {trained}; chosen by the robust accuracy on
validation images.

| figure, on test images | attack | |
|---|---|---:|
{table}

- images: {size}, pixels in [0, 1], normalized inside; classes: {classes or "not named"}
- inference FLOPs: {entry.inference_flops:.4g} per image, skipping zeros{note}
- training command:

```bash
{command_of(entry.run)}
```

```python
from models import load_model

model = load_model("FOLDER")  # the folder of this card; or models.hub.HubNetwork.from_pretrained
```

{_source(entry)}Robust accuracy is an upper bound: a stronger attack may lower it.
"""


def _source(entry: Entry) -> str:
    paper = 'of Chen et al., "Sparsity Winning Twice" (ICLR 2022)'
    method = entry.run.method
    if method in _BIRDS:
        return f"The method is that {paper}. "
    by_channels = method.removesuffix("-channel") in _BIRDS
    return f"The method is that {paper}, applied to channels. " if by_channels else ""
