from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests import toy

# Otherwise each process lists the machine's fonts again, as each test has a new home folder.
os.environ.setdefault("MPLCONFIGDIR", f"{tempfile.gettempdir()}/matplotlib-{os.getuid()}")
# Two threads, for two cores. Set OMP_NUM_THREADS=1 on a busy machine, where threads that wait for
# each other slow to a crawl.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keeps the tests' decoded images out of the user's cache."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def run_adv(monkeypatch, capsys):
    """Runs main_adv.py in this process: ``run_adv(*flags)`` gives exit code, stdout and stderr."""
    return toy.Command("main_adv", monkeypatch, capsys)


@pytest.fixture
def run_eb(monkeypatch, capsys):
    """The same for Robust-Bird/train_eb.py."""
    return toy.Command("train_eb", monkeypatch, capsys)


@pytest.fixture
def run_base(monkeypatch, capsys):
    """The same for Robust-Bird/train_base.py."""
    return toy.Command("train_base", monkeypatch, capsys)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Copies a finished run: ``finished(*flags, to=folder)`` gives its run folder in ``folder``.

    A run is trained once for all tests and test processes that ask for the same flags.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def finished(*flags: object, to: Path, script: str = "main_adv") -> Path:
        name = hashlib.sha256(repr((script, *map(str, flags))).encode()).hexdigest()[:16]
        trained = shared / f"run-{name}"
        with FileLock(f"{trained}.lock"):
            if not trained.exists():
                unfinished = trained.with_suffix(".part")
                with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
                    code = toy.call_main(script, [*flags, "--save_dir", unfinished], patch)
                assert code == 0
                unfinished.rename(trained)
        shutil.copytree(trained, to, dirs_exist_ok=True)
        (run,) = trained.iterdir()
        return to / run.name

    return finished


@pytest.fixture
def image_tree(tmp_path) -> Path:
    """An image folder of three classes, each with 20 training and 8 test images of 16x16."""
    return toy.write_image_tree(tmp_path / "images")
