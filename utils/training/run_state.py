"""The state of a run: its data, stage and history, new or restored from the checkpoint in its
folder, and how it is stored."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from models import CUSTOM_ARCHITECTURES
from models.loading import full_size, spec_in
from utils.errors import InputError, one_line
from utils.execution.distributed import ALONE, World
from utils.execution.forward import Execution
from utils.settings.applied import load_data_for, network_spec, placed
from utils.settings.common import CommonSettings
from utils.settings.stored import settings_in
from utils.storage.checkpoint import load_weights, network_weights, refuse_unfit_training_state
from utils.storage.paths import RunPaths
from utils.storage.provenance import environment, made_by
from utils.storage.run_folder import refuse_locked
from utils.training import messages, resuming
from utils.training.rehearsal import refusing, rehearse_checkpoint
from utils.training.saving import Checkpoints
from utils.training.stage import Row, Stage


class RunState(ABC):
    """The state of a run; ``Run`` adds the training."""

    stage: Stage

    def __init__(
        self, settings: CommonSettings, device: torch.device, world: World = ALONE
    ) -> None:
        """Build everything and check it against the data. Nothing is written and no other process
        is waited for before ``train``."""
        # One process looks, as several would lock each other out.
        if world.is_first and settings.resume_dir is not None:
            refuse_locked(RunPaths(Path(settings.resume_dir)))
        self.data = load_data_for(settings, device)
        self.settings, self.paths = placed(settings, self.data, device, world.size)
        self.device = device
        self.world = world
        if world.is_first:
            refuse_locked(self.paths)  # another process may be changing its files
        self.stamps = self.paths.stamps()  # before any of its files is read
        self.spec = network_spec(settings, self.data)
        self.history: list[Row] = []
        # the checkpoint's unfinished epoch
        self.partial: Mapping[str, Any] | None = None
        self.checkpoints = Checkpoints(self.paths)
        compiled = {"auto": None, "on": True, "off": False}[settings.compile]
        self.execution = Execution(
            self.settings.precision, compiled, self.settings.cuda_graphs, world
        )
        self.processes = world.size  # those that wrote the checkpoint, if there is one
        self._begin()

    def _begin(self) -> None:
        """Restore the checkpoint, or build the first stage."""
        settings, paths = self.settings, self.paths
        resuming_one = settings.resume or settings.resume_dir is not None
        has_checkpoint = self.checkpoints.exist()
        resuming.refuse_used_folder(paths, resuming=resuming_one, has_checkpoint=has_checkpoint)
        if has_checkpoint:
            content = self.checkpoints.load()
            stored = settings_in(content, self.checkpoints.last_good)
            resuming.refuse_extended_run(settings, stored, paths.root)
            self.restore(content)
            return
        if settings.resume:
            resuming.refuse_changed_images(settings, paths, self.data)
        with refusing(settings.arch):
            self.stage = self.first_stage()
            if settings.arch in CUSTOM_ARCHITECTURES:
                self.stage.figures()
                states = self.stage.state_dict()
                rehearse_checkpoint(
                    self.stage.model, states, self.network, self.data, self.device, settings.seed
                )

    # ---- defined by each script

    @abstractmethod
    def first_stage(self) -> Stage:
        """The stage that a new run begins with."""

    def stage_of(self, content: Mapping[str, Any]) -> Stage:
        """The stage that a checkpoint was saved in; its states are loaded afterwards."""
        return self.first_stage()

    def further_state(self) -> dict[str, Any]:
        """The script's own additions to the checkpoint and to each epoch's metrics."""
        return {}

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Number of epochs of the last stage."""

    @property
    def rows(self) -> list[Row]:
        """Metrics of the last stage's epochs, which the run's figures are from."""
        return self.history

    @property
    def network(self) -> dict[str, Any]:
        """The current network's description."""
        return {**self.spec, **self.stage.removed()}

    # ---- what it stores

    def network_content(self, prefix: str = "") -> dict[str, Any]:
        """The network as it is, or its average if ``prefix`` is ``AVERAGE``, with its description
        and the metrics of its epoch: part of every checkpoint."""
        row = self.history[-1] if self.history else {}
        average = self.stage.average if prefix else None
        return {
            "state_dict": (average or self.stage).model.state_dict(),
            **({"averaged": True} if prefix else {}),
            "network": self.network,
            "script": self.settings.script,
            "settings": dataclasses.asdict(self.settings),
            "digests": dict(self.data.digests),
            "epoch": row.get("epoch", 0),
            "val_ra": row.get(prefix + "val_ra"),
            "val_sa": row.get(prefix + "val_sa"),
        }

    def content(self, partial: Mapping[str, Any] | None) -> dict[str, Any]:
        """Contents of a checkpoint; ``partial`` is the tally of an unfinished epoch."""
        where = {
            "history": self.history,
            **self.further_state(),
            "partial": partial,
            "processes": self.world.size,
        }
        return {**self.network_content(), **self.stage.state_dict(), **where}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Adopt the contents of a checkpoint; raises ``InputError`` if they do not fit."""
        path, spec = self.paths.checkpoint, spec_in(content, self.paths.checkpoint) or {}
        resuming.refuse_other_images(content, path, self.data, self.settings.data)
        told = {"classes", "image_shape"} & self.spec.keys()  # not by older checkpoints
        if {name: self.spec[name] for name in told} | full_size(spec) != full_size(self.spec):
            raise InputError(
                f"{path} was trained on other data: classes, image size or pixel statistics differ"
            )
        self.spec = spec
        try:
            self.history = list(content["history"])
            self.stage = self.stage_of(content)
            load_weights(self.stage.model, network_weights(content, path), path, self.settings.arch)
            refuse_unfit_training_state(self.stage.model, content)
            self.stage.load_state_dict(content)
            self.partial = content.get("partial")
            self.processes = int(content.get("processes", 1))
            self.checkpoints.progress = messages.saved_text(
                self.history, self.partial, self.stage.steps
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be resumed from ({one_line(error)})") from error

    def config(self) -> Row:
        """Contents of ``config.json``."""
        settings, data = self.settings, self.data
        return {
            "method": settings.method,
            "settings": dataclasses.asdict(settings),
            "milestones": settings.milestones_in(self.epochs),
            "network": self.network,
            "classes": data.classes,
            "digests": dict(data.digests),
            "images": data.images,
            "steps_per_epoch": self.stage.steps,
            "compiled": self.stage.execution.compile,
            "made_by": self.made_by,
        }

    @cached_property
    def made_by(self) -> list[Row]:
        """The starts and resumes of this run, one entry each; the last is this one."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return [
            *made_by(self.paths),
            {"when": now, "processes": self.world.size, **environment(self.device)},
        ]
