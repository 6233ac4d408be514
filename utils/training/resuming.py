"""Checks whether a run folder, or one beside it, holds the run that the settings describe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data import Data
from utils.errors import InputError, one_line
from utils.settings.common import CommonSettings, settings_from
from utils.settings.stored import settings_in
from utils.storage.json_files import read_object
from utils.storage.paths import RunPaths


def refuse_used_folder(paths: RunPaths, *, resuming: bool, has_checkpoint: bool) -> None:
    """Raise ``InputError`` for a used folder unless resuming, or for epochs without checkpoint."""
    if paths.holds_a_run() and not resuming:
        raise InputError(
            f"{paths.root} already holds a run with these settings; --resume resumes it, another"
            " --save_dir starts elsewhere"
        )
    if not has_checkpoint and paths.metrics.exists() and paths.metrics.read_text().strip():
        raise InputError(
            f"{paths.root} has epochs but no checkpoint, so it cannot be resumed; another"
            " --save_dir starts a new run"
        )


def refuse_changed_images(settings: CommonSettings, paths: RunPaths, data: Data) -> None:
    """Raise ``InputError`` if a run beside this one has the same settings and data path but was
    trained on other images: it was probably meant."""
    mine = (settings.method, settings.data)
    for root, config, differs in _beside(settings, paths):
        if not differs and (config.get("method"), config["settings"].get("data")) == mine:
            refuse_other_images(config, root, data, settings.data)


def refuse_other_images(
    content: Mapping[str, Any], path: Path, data: Data, given: str | None
) -> None:
    """Raise ``InputError`` if ``content`` (a checkpoint or ``config.json``) is of other data; older
    ones without digests of their data pass."""
    theirs = content.get("digests")
    theirs = theirs if isinstance(theirs, Mapping) else {}
    changed = [part for part, digest in data.digests.items() if theirs.get(part, digest) != digest]
    if changed:
        raise InputError(
            f"{path} was trained on other data than {given} has now: its {', '.join(changed)}"
            " differ"
        )


def refuse_extended_run(settings: CommonSettings, stored: Mapping[str, Any], root: Path) -> None:
    """Raise ``InputError`` for an extended run, whose folder is still named by its first length."""
    for name in settings.may_grow if settings.resume_dir is None else ():
        if stored.get(name) != getattr(settings, name):
            raise InputError(
                f"the run in {root} has grown to --{name} {stored.get(name)}; --resume_dir resumes"
                " it"
            )


def closest_existing_run(settings: CommonSettings, paths: RunPaths) -> str:
    """Text that names the closest run beside this one: same seed, at most two other settings."""
    found = [
        (len(differs), root, ", ".join(differs) or "these settings and other data")
        for root, _, differs in _beside(settings, paths)
    ]
    found = [near for near in found if near[0] <= 2 and "--seed" not in near[2]]
    return one_line(f"; {min(found)[1]} has {min(found)[2]}") if found else ""


def _beside(
    settings: CommonSettings, paths: RunPaths
) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """Other runs beside this one: folder, ``config.json`` and the flags that differ."""
    mine = settings.canonical()
    results = [field.name for field in dataclasses.fields(settings) if field.metadata["result"]]
    for path in paths.root.parent.glob("*/" + paths.config.name):
        if path.parent == paths.root:
            continue
        try:
            config = read_object(path)
            theirs = settings_from(type(settings), settings_in(config, path)).canonical()
        except InputError:  # not a run of this script
            continue
        differs = [f"--{name} {theirs[name]}" for name in results if theirs[name] != mine[name]]
        yield path.parent, config, differs
