"""Checkpoints and run folders named on the command line, with specific errors for anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.storage.checkpoint import load_checkpoint
from utils.storage.paths import RunPaths
from utils.storage.safetensors import SUFFIX

# Files exported from a checkpoint, by suffix, and what reads them.
_MADE_OF_CHECKPOINTS = {
    ".onnx": "an ONNX file: onnxruntime runs it",
    ".pt2": "a program of torch.export: torch.export.load reads it",
    SUFFIX: "a safetensors file: load_model and scripts/export.py read it",
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """``load_checkpoint``, with a specific ``InputError`` for a folder or an exported file."""
    require_checkpoint(path)
    return load_checkpoint(path)


def require_checkpoint(path: str | Path) -> None:
    """Raise ``InputError`` for a folder or an exported file; the caller handles a missing one."""
    path = Path(path)
    if path.is_dir():
        best = RunPaths(path).best_ra
        there = (
            f"its best model is {best}"
            if best.is_file()
            else f"a checkpoint is a file, such as the {best.name} of a run"
        )
        raise InputError(f"{path} is a folder; {there}")
    kind = _MADE_OF_CHECKPOINTS.get(path.suffix)
    if kind is not None and path.is_file():
        raise InputError(
            f"{path} is {kind} (docs/deploying.md); here the checkpoint that it was made of is"
            " needed"
        )


def require_run_folder(resume_dir: str | Path) -> None:
    """Raise ``InputError`` for a file or a folder of runs; the caller handles a missing one."""
    path = Path(resume_dir)
    if path.is_file():
        raise InputError(
            f"--resume_dir {path} is a file; give the folder of its run: {path.parent}"
        )
    if path.is_dir() and not RunPaths(path).holds_a_run():
        runs = sorted(inner for inner in path.iterdir() if RunPaths(inner).holds_a_run())
        if runs:
            raise InputError(
                f"--resume_dir {path} is a folder of {len(runs)} run(s); give one of them,"
                f" such as {runs[0]}"
            )
