"""Writes a submission to RobustBench: the entry that its ``benchmark(to_disk=True)`` writes, the
weights, a self-contained module of the architecture, and the text of an issue."""

from __future__ import annotations

import inspect
import keyword
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from models import normalize, resnet, vgg, wideresnet
from models.build import ARCHITECTURES, RESNETS, STAGES, network_class
from utils.errors import RunError, require
from utils.export import FORMATS
from utils.report.runs import command_of
from utils.storage.files import json_bytes
from utils.submission.entries import Entry, agrees, autoattack

_BALLS = {("linf", 8.0): ("Linf", "8/255"), ("l2", 127.5): ("L2", "0.5")}  # radius in 1/255
_DATASETS = {"CIFAR10": "cifar10", "CIFAR100": "cifar100"}
_PAPER = {  # for the paper's methods; for others the submitter fills in the fields
    "link": "https://arxiv.org/abs/2202.09844",
    "name": "Sparsity Winning Twice: Better Robust Generalization from More Efficient Training",
    "authors": "Tianlong Chen, Zhenyu Zhang, Pengjun Wang, Santosh Balachandra, Haoyu Ma, Zehao"
    " Wang, Zhangyang Wang",
    "venue": "ICLR 2022",
}


def checked(entry: Entry, name: str | None) -> tuple[str, str, str]:
    """The model's name, threat model and radius as RobustBench writes them; raises ``InputError``
    for an invalid name, an architecture of the user's own, or if there is no such leaderboard."""
    settings = entry.run.settings
    require(
        entry.dataset in _DATASETS,
        f"{entry.run.name}: RobustBench takes networks of CIFAR-10 and CIFAR-100 (32x32),"
        f" not of {settings.dataset}",
    )
    require(
        entry.spec["arch"] in ARCHITECTURES,
        f"{entry.run.name}: {entry.spec['arch']} is a network of your own, whose module you have",
    )
    found = _BALLS.get((settings.norm, settings.test_eps))
    require(
        found is not None,
        f"{entry.run.name}: RobustBench attacks with linf 8/255 or l2 0.5 (--test_eps 127.5), not"
        f" {settings.test_ball}",
    )
    assert found is not None
    model_id = name or f"Sparse_{entry.run.method}".replace("-", "_")
    good = model_id.isidentifier() and not keyword.iskeyword(model_id)
    require(good, f"--name {model_id}: it becomes the name of a class")
    return model_id, *found


def write(entry: Entry, out: Path, name: str | None, flags: Sequence[str]) -> str:
    """Evaluate the network and write its files into the folder ``out``; returns the next step for
    the user. Raises ``RunError`` if the written network gives other logits."""
    model_id, threat, radius = checked(entry, name)
    (out / f"{model_id}.pt").write_bytes(FORMATS["state_dict"].content(entry.trained))
    (out / f"{model_id}.py").write_text(architecture(entry.spec, model_id))
    _refuse_other_answers(out, model_id, entry)
    scores = autoattack(entry, *ball(entry), flags)
    figures = {"clean_acc": f"{scores.clean:.2f}", "autoattack_acc": f"{scores.robust:.2f}"}
    info = _info(entry, radius, figures)
    folder = out / "model_info" / _DATASETS[str(entry.dataset)] / threat
    folder.mkdir(parents=True)
    (folder / f"{model_id}.json").write_bytes(json_bytes(info))
    (out / "issue.md").write_text(_issue(model_id, threat, info))
    done = "upload the weights, put their address into issue.md, and open the issue"
    return scores.shortfall(entry, "RobustBench") or done


def ball(entry: Entry) -> tuple[str, float]:
    """Norm and radius, in 1/255, of the attack."""
    return entry.run.settings.norm, entry.run.settings.test_eps


def _info(entry: Entry, radius: str, figures: dict[str, str]) -> dict[str, Any]:
    """The fields of RobustBench's ``ModelInfo``, in order."""
    what = "channels" if entry.narrow else "weights"
    paper = _PAPER if entry.run.method in ("rb", "fb", "fbp") else dict.fromkeys(_PAPER)
    return {
        **{field: paper[field] for field in ("link", "name", "authors")},
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": _DATASETS[str(entry.dataset)],
        "venue": paper["venue"],
        "architecture": _architecture_name(entry),
        "eps": radius,
        "clean_acc": figures["clean_acc"],
        "reported": figures["autoattack_acc"],
        **dict.fromkeys(f"corruptions_{kind}" for kind in ("acc", "acc_3d", "mce", "mce_3d")),
        "autoattack_acc": figures["autoattack_acc"],
        "footnote": f"{entry.removed:.1f} % of the {what} are pruned. Trained by:"
        f" {command_of(entry.run)}",
    }


def _architecture_name(entry: Entry) -> str:
    arch, spec = entry.spec["arch"], entry.spec
    if arch == "wideresnet":
        return f"WideResNet-{spec['depth_factor']}-{spec['width_factor']}"
    number = re.sub(r"\D", "", arch)
    name = f"PreActResNet-{number}" if arch in RESNETS else f"VGG-{number}"
    return name if spec["width"] == 1 else f"{name} x{spec['width']:g}"


def architecture(spec: Any, name: str) -> str:
    """Source of a module with the class ``name``, the full-size network; it needs only torch."""
    family = {**dict.fromkeys(RESNETS, resnet), **dict.fromkeys(STAGES, vgg)}
    module = family.get(spec["arch"], wideresnet)
    # a WideResNet is built from the ResNets' layers
    parts = [normalize, resnet, module] if module is wideresnet else [normalize, module]
    network, sizes = network_class(
        spec["arch"], spec["width"], spec["depth_factor"], spec["width_factor"]
    )
    shown = [size.__name__ if isinstance(size, type) else repr(size) for size in sizes]
    pixels = f"Normalize({list(spec['mean'])!r}, {list(spec['std'])!r})"
    arguments = ", ".join([*shown, repr(spec["num_classes"]), pixels])
    return (
        f'"""{network.__name__} for images [N, C, H, W] in [0, 1]."""\n\n'
        "from __future__ import annotations\n\n"
        + "\n\n".join(map(_without_own_imports, parts))
        + f"\n\nclass {name}({network.__name__}):\n"
        f"    def __init__(self):\n        super().__init__({arguments})\n"
    )


def _without_own_imports(module: ModuleType) -> str:
    source = inspect.getsource(module).replace(f'"""{module.__doc__}"""', "", 1)
    return re.sub(r"^from (__future__|models\.\w+) import .*\n", "", source, flags=re.M).strip()


def _refuse_other_answers(out: Path, name: str, entry: Entry) -> None:
    network = runpy.run_path(str(out / f"{name}.py"))[name]()
    network.load_state_dict(torch.load(out / f"{name}.pt", weights_only=True), strict=True)
    if not agrees(network, entry, normalization=True):
        raise RunError(f"{out / name}.py does not give the logits of {entry.path}")


def _issue(name: str, threat: str, info: dict[str, Any]) -> str:
    return f"""# Paper Information
- **Paper Title**: {info["name"] or ""}
- **Paper URL**: {info["link"] or ""}

# Leaderboard Claim(s)
## Model 1
- **Architecture**: {info["architecture"]}
- **Threat Model**: {threat}
- **Clean accuracy**: {info["clean_acc"]}
- **Robust accuracy**: {info["autoattack_acc"]}
- **Evaluation method**: AutoAttack, standard version, eps {info["eps"]}
- **Checkpoint and code**: {name}.pt and {name}.py, attached

# Model Zoo:
- [x] I want to add my models to the Model Zoo
- [x] I use an architecture that is **not** included among those in the Model Zoo ({name}.py)
- [ ] I agree to release my model(s) under MIT license

{info["footnote"]}
"""
