"""Settings classes by script, and the settings stored in a run's checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.settings.adversarial import AdversarialSettings
from utils.settings.common import CommonSettings
from utils.settings.robust_bird import EarlyBirdSettings, TicketSettings
from utils.storage.checkpoint import load_newest
from utils.storage.inputs import require_run_folder
from utils.storage.paths import RunPaths

SETTINGS_OF: dict[str, type[CommonSettings]] = {
    kind.script: kind for kind in (AdversarialSettings, EarlyBirdSettings, TicketSettings)
}


def resumed_settings(script: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the run that ``--resume_dir`` names, empty if that flag is not ``given``;
    ``InputError`` if another script made it."""
    if not given.get("resume_dir"):
        return {}
    require_run_folder(given["resume_dir"])
    paths = RunPaths(Path(given["resume_dir"]))
    content, path, _ = load_newest(paths.checkpoint, paths.previous)
    made_by = content.get("script", script)
    if made_by != script:
        raise InputError(f"{path} is from a run of {made_by}; resume with it")
    return settings_in(content, path)


def settings_in(content: Mapping[str, Any], path: object) -> Mapping[str, Any]:
    """The settings in a checkpoint's content; ``InputError`` if they are not names and values."""
    settings = content.get("settings", {})
    if not isinstance(settings, Mapping):
        raise InputError(f"{path}: its settings are not names and values")
    return settings
