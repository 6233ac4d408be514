from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests import toy

# Two threads on two cores; OMP_NUM_THREADS=1 where something else runs beside, since threads that
# wait for each other crawl then.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Decoded image folders of tests never touch the user's cache."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def run_adv(monkeypatch, capsys):
    """Run main_adv.py in this process: ``run_adv(*flags)`` gives exit code, stdout and stderr."""
    return toy.Command("main_adv", monkeypatch, capsys)


@pytest.fixture
def run_eb(monkeypatch, capsys):
    """The same for Robust-Bird/train_eb.py."""
    return toy.Command("train_eb", monkeypatch, capsys)


@pytest.fixture
def run_base(monkeypatch, capsys):
    """The same for Robust-Bird/train_base.py."""
    return toy.Command("train_base", monkeypatch, capsys)


@pytest.fixture
def image_tree(tmp_path) -> Path:
    """An image folder with three classes: ``train/<class>`` of 20 and ``test/<class>`` of 8 images,
    16x16."""
    return toy.write_image_tree(tmp_path / "images")
