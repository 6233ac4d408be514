"""Flying Bird on channels: while the network trains, only its live channels exist.

A full-size store keeps the weights of all channels. The network that is attacked, trained, tested
and saved is narrow. A mask update drops and grows an exact number of channels in each group and
gathers the narrow weights from the store. Weights that read a grown channel start at zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.channels import Channels, Kept, put, silence
from sparse_core import Course, MaskingConfig, Verdict, drop_lowest, grow_highest, stream, uniform
from utils.execution.distributed import ALONE, World
from utils.training.losses import LossOf

CHANNEL_GROWTHS = ("random", "gradient")
CHANNEL_SCORES = ("taylor", "scale")


@dataclass(frozen=True)
class ChannelMove:
    """How a mask update changed the tensors of a narrow network.

    Attributes:
        sources: by tensor name, the flat (row-major) index that each element had before the update,
            int64; -1 for a grown element.
        values: by tensor name, its values after the update.
        reshapes: whether any shape changed.
    """

    sources: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    reshapes: bool

    def carried(self, name: str, before: Tensor, grown: Tensor | None = None) -> Tensor:
        """Carry a tensor shaped like ``name`` (momentum, average) over the update; grown elements
        come from ``grown``, zero by default."""
        source = self.sources[name].to(before.device)
        carried = torch.take(before, source.clamp_min(0))
        other = torch.zeros_like(carried) if grown is None else grown.to(carried)
        return torch.where(source >= 0, carried, other)


class _Scored(NamedTuple):
    """A narrow weight whose indices ``rows`` along ``dim`` belong to the channels ``owner``."""

    weight: Tensor
    dim: int
    rows: Tensor
    owner: Tensor


def _gradient(weight: Tensor) -> Tensor:
    """The gradient of a weight, zero if it was not used."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


class ChannelMasking(Course):
    """Keeps a network narrow: holds, updates, saves and restores its live channels.

    The counterpart of ``sparse_core.Masking`` for channels, stepped and observed like it.

    Args:
        model: the narrow network; its weights are overwritten with those of the store.
        store: the full-size network with the initial weights of all channels, which are scaled in
            place to the narrow layers' fan-in.
        optimizer: SGD on the narrow network.
        channels: the channel groups of the store.
        live: the channels that ``model`` has, bool ``[channels.total]``.
        config: schedule and verdicts, as for weights; densities are of channels.
        score: ``taylor`` drops the channels with the smallest |scale * its gradient|, averaged over
            the steps since the last update; ``scale`` those with the smallest |scale| now.
        multiple: channels of a group that Flying Bird+ adds or removes at once.
        world: the processes that train together.

    Raises:
        ValueError: the optimizer is not SGD with a single parameter group; the state of others
            would be lost at the first update.
    """

    # no weight of the narrow network is masked
    masks: Mapping[str, Tensor] = {}

    def __init__(
        self,
        model: nn.Module,
        store: nn.Module,
        optimizer: torch.optim.SGD,
        channels: Channels,
        live: Tensor,
        config: MaskingConfig,
        *,
        score: str = "taylor",
        multiple: int = 1,
        world: World = ALONE,
    ) -> None:
        super().__init__(config)
        if not isinstance(optimizer, torch.optim.SGD) or len(optimizer.param_groups) > 1:
            raise ValueError("the optimizer must be SGD with one parameter group")
        self.channels, self.live = channels, live.clone()
        self._model, self._store, self.optimizer = model, store, optimizer
        self._score, self._multiple, self._world = score, multiple, world
        self._explored = live.clone()
        device = next(model.parameters()).device
        self._sums = torch.zeros(channels.total, dtype=torch.float64, device=device)
        self._summed = 0  # steps in _sums
        self._unspent = {"prune": 0.0, "grow": 0.0}  # multiples of channels, by rounding
        self._shapes = {name: tuple(value.shape) for name, value in store.state_dict().items()}
        self._scale_to_fan_in()
        self._gather(self._positions())
        self._find_scored()
        if not config.fixed and score == "taylor":
            # before the step, while the weights are those that the gradients belong to
            optimizer.register_step_pre_hook(lambda *_: self._add_scores())

    # ---- every step

    def step(self, loss_of: LossOf) -> ChannelMove | None:
        """Call after each ``optimizer.step()``, before gradients are cleared; updates when due.

        Args:
            loss_of: computes the last batch's training loss for any network of this architecture.

        Returns:
            The update's changes, for other tensors shaped like the weights; None without an update.
        """
        self.steps += 1
        return self.update(loss_of) if self.update_due() else None

    @torch.no_grad()
    def _add_scores(self) -> None:
        self._sums += self._scores_now()
        self._summed += 1

    def _scores_now(self) -> Tensor:
        """Scores of all channels, float64: |scale * gradient| (or |scale|) summed over a channel's
        batch norms; without any, |sum of weight * gradient| (or the sum of |weight|) over the
        weights that read it. Dead channels score zero."""
        scores = torch.zeros_like(self._sums)
        for part in self._scales:
            scores.index_add_(0, part.owner, self._values(part).abs().double())
        if self._readers:
            read = torch.zeros_like(scores)
            for part in self._readers:
                read.index_add_(0, part.owner, self._values(part).flatten(1).sum(1).double())
            scores += read.abs()
        return scores

    def _values(self, part: _Scored) -> Tensor:
        weight = part.weight
        value = weight.abs() if self._score == "scale" else weight * _gradient(weight)
        return value.transpose(0, part.dim)[part.rows]

    def _find_scored(self) -> None:
        """Find the narrow network's scales, and the weights that read channels without one."""
        normed = torch.zeros_like(self.live)
        for name in self.channels.scales:
            owner = self.channels.owners[name][0]
            normed[owner[owner >= 0]] = True
        self._scales = [self._scored(name, 0, normed) for name in self.channels.scales]
        readers = [self._scored(name, dim, ~normed) for name, dim in self.channels.readers.items()]
        self._readers = [part for part in readers if len(part.rows)]

    def _scored(self, name: str, dim: int, among: Tensor) -> _Scored:
        weight = self._model.get_parameter(name)
        owner = self.channels.owners[name][dim][self.channels.indices(name, self.live)[dim]]
        wanted = (owner >= 0) & among[owner]
        rows, owner = wanted.nonzero().squeeze(1), owner[wanted]
        return _Scored(weight, dim, rows.to(weight.device), owner.to(weight.device))

    # ---- every update

    @torch.no_grad()
    def update(self, loss_of: LossOf) -> ChannelMove:
        """Drop and grow channels in every group, by the current schedule and verdict. Called by
        ``step`` when due."""
        verdict, fraction = self.verdict(), self.schedule.at(self.steps)
        scores = (self._sums / self._summed if self._summed else self._scores_now()).cpu()
        changes = self._changes(scores, fraction, verdict)
        before, was_live = self._positions(), self.live
        self._scatter(before)
        kept = self._kept(scores, changes)
        ranks, statistics = self._probe(loss_of, kept)
        self.live = self._grown(ranks, kept, changes)
        self._explored = self._explored | self.live
        grown = self.live & ~was_live
        silence(self._store, self.channels, grown)
        self._reset_norms(self._store.state_dict(keep_vars=True), grown, statistics)
        move = self._move(before)
        self._sums.zero_()
        self._summed = 0
        self._find_scored()
        self._add_event(verdict, self.density())
        return move

    def _changes(
        self, scores: Tensor, fraction: float, verdict: Verdict
    ) -> dict[str, tuple[int, int]]:
        """How many channels each group drops, and how many dead ones it then grows."""
        counts, sizes = self.counts(), self.channels.sizes
        swaps = {
            name: min(math.ceil(fraction * live), sizes[name] - live, live - 1)
            for name, live in counts.items()
        }
        pruned, grown = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
        means = {
            name: (part.sum() / counts[name]).item()
            for name, part in self.channels.by_group(scores * self.live).items()
        }
        by_mean = sorted(counts, key=lambda name: (means[name], name))
        total = fraction * sum(counts.values()) / self._multiple
        if verdict.prune:
            most = self._budget("prune", total * self.config.prune_ratio)
            room = {n: live - max(self._multiple, swaps[n] + 1) for n, live in counts.items()}
            self._spread(pruned, most, by_mean, room)
        if verdict.grow:
            most = self._budget("grow", total * self.config.growth_ratio)
            room = {n: sizes[n] - live - swaps[n] for n, live in counts.items()}
            self._spread(grown, most, by_mean[::-1], room)
        return {name: (swaps[name] + pruned[name], swaps[name] + grown[name]) for name in counts}

    def _budget(self, kind: str, asked: float) -> int:
        """The whole multiples to change now; what rounding adds or leaves counts next time."""
        asked += self._unspent[kind]
        whole = max(0, round(asked))
        self._unspent[kind] = asked - whole
        return whole

    def _spread(
        self, given: dict[str, int], multiples: int, order: list[str], room: Mapping[str, int]
    ) -> None:
        """Add ``multiples`` of channels to ``given`` in place, one per group in turn if it fits."""
        while multiples:
            taking = [name for name in order if room[name] - given[name] >= self._multiple]
            if not taking:
                return
            for name in taking[:multiples]:
                given[name] += self._multiple
            multiples -= min(multiples, len(taking))

    def _kept(self, scores: Tensor, changes: Mapping[str, tuple[int, int]]) -> Tensor:
        live, by_group = self.live.clone(), self.channels.by_group(scores)
        for name, part in self.channels.by_group(live).items():
            part.copy_(drop_lowest(by_group[name], part, changes[name][0]))
        return live

    def _grown(self, ranks: Tensor, kept: Tensor, changes: Mapping[str, tuple[int, int]]) -> Tensor:
        """``kept`` and the highest-ranked channels among those that were dead before."""
        # a channel that was just dropped cannot grow back in the same update
        taken = self.live | kept
        grown, by_group = taken.clone(), self.channels.by_group(ranks)
        for name, part in self.channels.by_group(grown).items():
            tie_key = stream(self.config.seed, "ties", self.steps, name)
            part.copy_(grow_highest(by_group[name], part, changes[name][1], tie_key=tie_key))
        return kept | (grown & ~taken)

    def _probe(self, loss_of: LossOf, kept: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Run one batch through the full-size network; dead channels are computed but not read.

        Returns:
            Each channel's rank for growth (random, or the norm of the gradient of the weights that
            read it), and the batch-norm statistics by name.
        """
        probe = copy.deepcopy(self._store).train()
        self._reset_norms(probe.state_dict(keep_vars=True), ~kept, {})
        silence(probe, self.channels, ~kept)
        for module in probe.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0  # statistics of this batch alone
        by_gradient = self.config.growth == "gradient"
        with torch.set_grad_enabled(by_gradient):
            loss = loss_of(probe)
            if by_gradient:
                loss.backward()
        state = probe.state_dict(keep_vars=True)
        statistics = {
            name: self._world.total(value.detach().clone()) / self._world.size
            for name, value in state.items()
            if name.endswith(("running_mean", "running_var"))
        }
        if not by_gradient:
            parts = [
                uniform(stream(self.config.seed, "grow", self.steps, name), torch.arange(size))
                for name, size in self.channels.sizes.items()
            ]
            return torch.cat(parts), statistics
        squares = torch.zeros(self.channels.total, dtype=torch.float64)
        for name, dim in self.channels.readers.items():
            gradient = self._world.total(_gradient(state[name]).clone()) / self._world.size
            sums = gradient.transpose(0, dim).flatten(1).double().square().sum(1).cpu()
            owner = self.channels.owners[name][dim]
            squares.index_add_(0, owner[owner >= 0], sums[owner >= 0])
        return squares.sqrt(), statistics

    def _reset_norms(
        self, state: Mapping[str, Tensor], chosen: Tensor, statistics: Mapping[str, Tensor]
    ) -> None:
        """Set scale 1, shift 0 and the given statistics for ``chosen`` channels of all norms."""
        for name in self.channels.scales:
            layer = name.removesuffix("weight")
            owner = self.channels.owners[name][0]
            index = (chosen[owner] & (owner >= 0)).nonzero().squeeze(1).to(state[name].device)
            state[name].index_fill_(0, index, 1.0)
            if layer + "bias" in state:
                state[layer + "bias"].index_fill_(0, index, 0.0)
        for name in statistics.keys() & self.channels.owners.keys():  # norms without a scale, too
            owner = self.channels.owners[name][0]
            index = (chosen[owner] & (owner >= 0)).nonzero().squeeze(1).to(state[name].device)
            state[name][index] = statistics[name][index]

    # ---- store and network

    @torch.no_grad()
    def _scale_to_fan_in(self) -> None:
        """Scale the initial weights of each layer to the fan-in that it has when narrow."""
        state = self._store.state_dict(keep_vars=True)
        for name, dim in self.channels.readers.items():
            kept = len(self.channels.indices(name, self.live)[dim])
            state[name].mul_(math.sqrt(self._shapes[name][dim] / kept))

    def _positions(self) -> dict[str, Tensor]:
        device = next(self._model.parameters()).device
        found = self.channels.positions(self.live, self._shapes)
        return {name: index.to(device) for name, index in found.items()}

    @torch.no_grad()
    def _gather(self, positions: Mapping[str, Tensor]) -> None:
        stored = self._store.state_dict(keep_vars=True)
        for name, value in self._model.state_dict(keep_vars=True).items():
            whole = stored[name]
            value.copy_(torch.take(whole, positions[name]) if name in positions else whole)

    @torch.no_grad()
    def _scatter(self, positions: Mapping[str, Tensor]) -> None:
        stored = self._store.state_dict(keep_vars=True)
        for name, value in self._model.state_dict(keep_vars=True).items():
            if name in positions:
                _put(stored[name], positions[name], value)
            else:
                stored[name].copy_(value)

    def _move(self, before: Mapping[str, Tensor]) -> ChannelMove:
        """Gather the narrow network from the store, and carry its momentum over."""
        after = self._positions()
        stored = self._store.state_dict()
        reshapes = any(after[name].shape != index.shape for name, index in before.items())
        sources, values = {}, {}
        for name, index in before.items():
            numbers = torch.arange(index.numel(), device=index.device).view(index.shape)
            places = torch.full(self._shapes[name], -1, dtype=torch.long, device=index.device)
            _put(places, index, numbers)
            sources[name] = places.take(after[name])
            values[name] = torch.take(stored[name], after[name])
        move = ChannelMove(sources, values, reshapes)
        momenta = {
            name: self.optimizer.state.pop(parameter).get("momentum_buffer")
            for name, parameter in self._model.named_parameters()
            if parameter in self.optimizer.state
        }
        put(self._model, values)
        (group,) = self.optimizer.param_groups
        group["params"] = list(self._model.parameters())
        for name, parameter in self._model.named_parameters():
            momentum = momenta.get(name)
            if momentum is not None:
                if name in values:
                    momentum = torch.empty_like(parameter).copy_(move.carried(name, momentum))
                self.optimizer.state[parameter] = {"momentum_buffer": momentum}
        return move

    # ---- queries, state

    def counts(self) -> dict[str, int]:
        """Live channels of each group."""
        return {name: int(part.sum()) for name, part in self.channels.by_group(self.live).items()}

    def density(self) -> float:
        """Live fraction of all channels of the groups."""
        return self.live.double().mean().item()

    def explored_fraction(self) -> float:
        """Fraction of the channels that have ever been live."""
        return self._explored.double().mean().item()

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes in training, as tensors and plain values."""
        return {
            "live": self.live.clone(),
            "explored": self._explored.clone(),
            "store": self._store.state_dict(),
            "sums": self._sums.clone(),
            "summed": self._summed,
            "unspent": dict(self._unspent),
            **self._course(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a ``state_dict``; raises ``ValueError`` if its live channels are not those of
        this network."""
        if not torch.equal(state["live"], self.live):
            raise ValueError("the live channels are not those of the network")
        self._explored = state["explored"].clone()
        self._store.load_state_dict(state["store"])
        self._sums.copy_(state["sums"])
        self._summed = int(state["summed"])
        self._unspent |= state.get("unspent", {})
        self._load_course(state)

    def kept(self) -> Kept:
        """What ``models.channels.narrow`` keeps of the full-size network to make this one."""
        return self.channels.kept(self.live)


def _put(whole: Tensor, index: Tensor, values: Tensor) -> None:
    """``whole.put_(index, values)``, which refuses to run with ``--deterministic``."""
    whole[torch.unravel_index(index, whole.shape)] = values
