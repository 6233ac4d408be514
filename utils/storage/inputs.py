"""What a command line points to: a checkpoint or the folder of a run, and what to say of something
else that lies there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.storage.checkpoint import load_checkpoint
from utils.storage.paths import RunPaths
from utils.storage.safetensors import SUFFIX

# Files that are made of a checkpoint, by their suffix, and what they are for.
_MADE_OF_CHECKPOINTS = {
    ".onnx": "an ONNX file: onnxruntime runs it",
    ".pt2": "a program of torch.export: torch.export.load reads it",
    SUFFIX: "a safetensors file: load_model and scripts/export.py read it",
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """As ``utils.storage.checkpoint.load_checkpoint``; a folder, or a file made of a checkpoint, is
    refused as what it is."""
    refuse_what_is_no_checkpoint(path)
    return load_checkpoint(path)


def refuse_what_is_no_checkpoint(path: str | Path) -> None:
    """Raise ``InputError`` for a folder and for a file in another format; what is not there at all
    is left to who reads it."""
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


def refuse_what_is_no_run(resume_dir: str | Path) -> None:
    """Raise ``InputError`` for a file and for a folder of runs; what is not there at all is left to
    who reads it."""
    path = Path(resume_dir)
    if path.is_file():
        raise InputError(
            f"--resume_dir {path} is a file; the folder of its run is wanted: {path.parent}"
        )
    if path.is_dir() and not RunPaths(path).holds_a_run():
        runs = sorted(
            folder
            for folder in path.iterdir()
            if folder.is_dir() and RunPaths(folder).holds_a_run()
        )
        if runs:
            raise InputError(
                f"--resume_dir {path} is a folder of {len(runs)} run(s); one of them is wanted,"
                f" such as {runs[0]}"
            )
