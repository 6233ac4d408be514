"""Averaged networks, kept beside the network in training.

``ExponentialAverage`` moves a little after every step; ``EpochAverage`` is the mean over epochs
(stochastic weight averaging, Izmailov et al., 2018). Both follow the masks: the average of a dead
weight is zero, and that of a grown weight starts from scratch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.channels import put
from models.modes import norm_statistics
from sparse_core import Masking
from utils.training.channel_masking import ChannelMasking, ChannelMove

AnyMasking = Masking | ChannelMasking


class Average:
    """Base class: the averaged network.

    Attributes:
        model: the averaged weights and batch-norm statistics, in eval mode, without gradients.
        count: networks averaged so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.eval()
        self.count = 0

    def after_step(self, model: nn.Module, masking: AnyMasking | None) -> None:
        """Follow the weights and masks after a training step."""

    def after_epoch(self, model: nn.Module, masking: AnyMasking | None, epoch: int) -> None:
        """Follow the weights after an epoch's last step; once an epoch, even if a run that was
        stopped after it calls again."""

    @torch.no_grad()
    def follow(self, move: ChannelMove) -> None:
        """Follow a mask update of channels: grown channels start their average from scratch."""
        mine = _tensors(self.model)
        put(self.model, {n: move.carried(n, mine[n], value) for n, value in move.values.items()})

    @property
    def is_ready(self) -> bool:
        """Whether there is anything in it to test."""
        return self.count > 0

    def begin(self, model: nn.Module) -> None:
        """Start from weights that were set after construction, as by masks."""
        self.model.load_state_dict(model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.model.state_dict(), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["weights"])
        self.count = int(state["count"])


class ExponentialAverage(Average):
    """``average = d average + (1 - d) weights`` after every step, the statistics of norms included;
    other buffers are the network's.

    Args:
        model: its weights are the initial average.
        decay: d after a warm-up; step t (from 0) uses min(d, (1 + t) / (10 + t)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        moving = {**dict(model.named_parameters()), **norm_statistics(model)}
        self._moving = [name for name, value in moving.items() if value.is_floating_point()]
        self.decay = decay
        self._masks: Mapping[str, Tensor] | None = None

    @torch.no_grad()
    def after_step(self, model: nn.Module, masking: AnyMasking | None) -> None:
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        mine, theirs = _tensors(self.model), _tensors(model)
        ours = [mine[name] for name in self._moving]
        torch._foreach_lerp_(ours, [theirs[name] for name in self._moving], 1 - decay)
        for name in mine.keys() - self._moving:
            mine[name].copy_(theirs[name])
        self.count += 1
        # A grown weight and its average are both zero, so its average starts from scratch.
        if masking is not None and masking.masks is not self._masks:
            self._masks = masking.masks
            for name, mask in masking.masks.items():
                mine[name].masked_fill_(~mask, 0.0)


class EpochAverage(Average):
    """The mean of the weights after each epoch from ``start`` (from 0) on. It may be moved later,
    in a longer run, and earlier epochs then do not count.

    Buffers are the last network's, apart from batch-norm statistics, which ``estimate_statistics``
    computes before a test.
    """

    def __init__(self, model: nn.Module, start: int = 0) -> None:
        super().__init__(model)
        self._start = start
        self._masks: Mapping[str, Tensor] | None = None
        # Epochs averaged into each weight since it grew.
        self._ages: dict[str, Tensor] = {}
        self._last = -1  # epoch averaged, from 0

    @torch.no_grad()
    def follow(self, move: ChannelMove) -> None:
        super().follow(move)
        for name, weight in self.model.named_parameters():
            if name in move.values:
                stays, known = move.sources[name] >= 0, self._ages.get(name)
                self._ages[name] = (
                    (self.count * stays).to(weight.device, torch.int16)
                    if known is None
                    else move.carried(name, known)
                )

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, masking: AnyMasking | None, epoch: int) -> None:
        if epoch < self._start or epoch <= self._last:
            return
        if self._last < self._start:  # averaged before the run was extended
            self.count = 0
            self._ages.clear()
        self._last = epoch
        masks = {} if masking is None else masking.masks
        mine, theirs = dict(self.model.named_parameters()), dict(model.named_parameters())
        for name, average in mine.items():
            if name in masks:
                age = self._ages.setdefault(name, torch.zeros_like(masks[name], dtype=torch.int16))
                age.add_(1).mul_(masks[name])
                average.add_((theirs[name] - average) / age.clamp_min(1))
                average.masked_fill_(~masks[name], 0.0)
            elif name in self._ages:  # its channels grew at different times
                average.add_((theirs[name] - average) / self._ages[name].add_(1))
            else:
                average.add_((theirs[name] - average) / (self.count + 1))
        buffers = dict(model.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        self.count += 1

    @property
    def is_ready(self) -> bool:
        return self.count > 0 and self._last >= self._start

    @torch.no_grad()
    def after_step(self, model: nn.Module, masking: AnyMasking | None) -> None:
        """Reset the average and the age of weights that a mask update has dropped."""
        if masking is None or masking.masks is self._masks:
            return
        self._masks = masking.masks
        for name, average in self.model.named_parameters():
            if name in self._masks:
                average.masked_fill_(~self._masks[name], 0.0)
                if name in self._ages:
                    self._ages[name].mul_(self._masks[name])

    @torch.no_grad()
    def estimate_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics of batch norms that ``train()`` puts into train mode from clean
        training images ``[N, C, H, W]``."""
        # not by torch's update_bn, which resets frozen norms as well
        self.model.train()
        norms = [
            norm
            for norm in self.model.modules()
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training
        ]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        for x in batches if norms else ():
            self.model(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.model.eval()

    def state_dict(self) -> dict[str, Any]:
        ages = {name: age.clone() for name, age in self._ages.items()}
        return {**super().state_dict(), "ages": ages, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._last = int(state["last"])
        self._ages = {
            name: age.to(next(self.model.parameters()).device)
            for name, age in state["ages"].items()
        }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
