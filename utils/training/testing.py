"""Tests of a network in training: after an epoch, and at the end of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from torch import nn

from data import Data
from utils.evaluation.scores import FinalScores, epoch_scores, final_scores
from utils.execution.distributed import World
from utils.execution.forward import Forward
from utils.settings.common import CommonSettings
from utils.storage.checkpoint import checksum
from utils.storage.run_folder import RunFolder
from utils.training.display import EpochDisplay
from utils.training.saving import AVERAGE
from utils.training.stage import Stage


class Tester:
    """Tests with a progress bar; ``leave_if_asked`` is called after each batch and may raise."""

    def __init__(
        self,
        data: Data,
        settings: CommonSettings,
        world: World,
        folder: RunFolder,
        leave_if_asked: Callable[[], None],
    ) -> None:
        self._data, self._settings, self._world = data, settings, world
        self._folder, self._leave_if_asked = folder, leave_if_asked
        self._final: dict[str, FinalScores] = {}  # by checksum of the network

    def _on_batch(self, display: EpochDisplay) -> Callable[[int], None]:
        def on_batch(images: int) -> None:
            display.images(images)
            self._leave_if_asked()

        return on_batch

    def after_epoch(self, stage: Stage, title: str, parts: Collection[str]) -> dict[str, float]:
        """Clean and attacked scores on ``parts`` ("val", "test"); those of the averaged network, if
        there is one, begin with ``AVERAGE``."""
        found = self._scores(title, stage.forward, parts)
        averaged = stage.averaged() if parts else None
        if averaged is not None:
            # a second network is not worth compiling
            forward = Forward(averaged, dataclasses.replace(stage.execution, compile=False))
            scores = self._scores(f"{title} average", forward, parts)
            found |= {AVERAGE + name: score for name, score in scores.items()}
        return found

    def _scores(self, title: str, forward: Forward, parts: Collection[str]) -> dict[str, float]:
        total = sum(self._data.images[part] for part in parts)
        with EpochDisplay(self._folder, f"{title} test", total) as display:
            return epoch_scores(
                forward.model,
                self._data,
                self._settings.test_attack,
                seed=self._settings.seed,
                parts=parts,
                forward=forward,
                on_batch=self._on_batch(display),
            )

    def final(self, name: str, model: nn.Module) -> FinalScores:
        """The figures reported of a network, in float32; ``name`` says which it is. The best, last
        and averaged network are often the same, which is measured once."""
        weights = self._world.from_first(lambda: checksum(model.state_dict()))
        if weights not in self._final:
            self._final[weights] = self._final_scores(name, model)
        return self._final[weights]

    def _final_scores(self, name: str, model: nn.Module) -> FinalScores:
        train, subset = self._data.train, self._settings.gap_subset
        if subset is not None:
            train = train.subset(train.spread(subset))
        images = len(self._data.test) + len(train)
        with EpochDisplay(self._folder, f"{name} model", images) as display:
            return final_scores(
                model,
                self._data,
                self._settings.test_attack,
                seed=self._settings.seed,
                train=train,
                world=self._world,
                on_batch=self._on_batch(display),
            )
