"""hubconf.py through torch.hub, in a separate process with another working directory."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import build_model

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys, torch
root, checkpoint = sys.argv[1:]
def load(name, *given, **options):
    return torch.hub.load(root, name, *given, source="local", **options)
images = torch.rand(2, 3, 32, 32)
for model in (load("resnet18", width=0.0625), load("vgg16", 7, width=0.0625),
              load("wideresnet", depth_factor=10, width_factor=1),
              load("build", "resnet34", 5, width=0.0625)):
    print(*model(images).shape)
model = load("load", checkpoint, arch="resnet18", num_classes=10, width=0.0625)
print(model.training, model.linear.bias.sum().item())
"""


def test_every_entry_point(tmp_path):
    model = build_model("resnet18", 10, width=0.0625)
    model.linear.bias.data.fill_(0.5)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(tmp_path / "plain.pth")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["2 10", "2 7", "2 10", "2 5", "False 5.0"]


def test_only_entry_points_are_public():
    """``torch.hub.list`` shows every callable whose name does not begin with an underscore."""
    names = {
        name
        for name, value in vars(importlib.import_module("hubconf")).items()
        if callable(value) and not name.startswith("_")
    }
    assert names == {"load", "build", "resnet18", "vgg16", "wideresnet"}


def test_an_entry_point_that_is_not_there():
    with pytest.raises(RuntimeError, match="resnet1000"):
        torch.hub.load(str(ROOT), "resnet1000", source="local")
