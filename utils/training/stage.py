"""A network in training, with its optimizer, masks and costs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data import Augmentation, Data, TrainLoader
from models import CUSTOM_ARCHITECTURES, flops
from sparse_core import Masking
from utils.errors import require
from utils.evaluation.scores import EVAL_BATCH
from utils.execution.distributed import World, synchronize_batch_norm
from utils.execution.forward import PLAIN, Execution, Forward
from utils.seeding import preserved_generators, stream
from utils.settings.common import CommonSettings
from utils.training.averages import Average, EpochAverage, ExponentialAverage
from utils.training.channel_masking import ChannelMasking, ChannelMove
from utils.training.collapse import CollapseGuard
from utils.training.engine import Progress, Tally, sgd, train_epoch
from utils.training.rehearsal import refuse_bound_copy, refusing, rehearse_step
from utils.training.schedule import Plan

Row = dict[str, Any]


class Stage:
    """A network in training: its optimizer, its masks if it has any, and its cost per image.

    Args:
        model: trained in place.
        data: trained on its training split.
        plan: epochs, attack and learning rate.
        settings: batch size, momentum and weight decay.
        execution: how the network is computed, and by which processes.
        dense: number of weights of each prunable layer before channels were removed; the network's
            own by default.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        plan: Plan,
        settings: CommonSettings,
        execution: Execution = PLAIN,
        dense: Mapping[str, int] | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        together = self._synchronized = settings.sync_bn and execution.world.size > 1
        self.loader = _loader(data, plan, settings, execution.world)
        self.optimizer = sgd(
            model,
            lr=plan.rate(0, 0, len(self.loader)),
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
        self.average = _average(model, plan)
        self.guard: CollapseGuard | None = None
        if plan.guarded and plan.attack is not None and plan.attack.is_one_step:
            self.guard = CollapseGuard(plan.attack, data, plan.seed)
        self._masking: Masking | ChannelMasking | None = None
        idle, draws = _rehearsed(model, data, settings.arch, execution)
        self.costs = flops.layer_costs(model, data.image_shape)
        if settings.arch in CUSTOM_ARCHITECTURES:
            if self.average is not None:
                with refusing(settings.arch):
                    refuse_bound_copy(model, self.average.model, data)
            _warn_of_uncounted(model, self.costs, idle)
        further = [plan.further_passes(epoch) for epoch in range(plan.epochs)]
        dense_costs = [flops.real_inference(self.costs)] * plan.epochs
        work = flops.real_training(dense_costs, len(data.train), plan.attack_steps, further)
        plain = dataclasses.replace(execution, compile=False)
        compiled = execution.for_training(work, data.train.device)
        self.execution = plain if together else compiled
        sizes = (self.loader.most, EVAL_BATCH)
        self.forward = Forward(model, self.execution, sizes, has_idle=bool(idle) or draws)
        self._is_prepared = not self.execution.compile
        self._most_tested = max(len(data.val), len(data.test))
        self._train, self._image_shape = data.train, data.image_shape
        self._dense = dense or {cost.name: cost.weights for cost in self.costs}

    @property
    def masking(self) -> Masking | ChannelMasking | None:
        """The network's masks; setting them starts the average from the masked network."""
        return self._masking

    @masking.setter
    def masking(self, masking: Masking | ChannelMasking) -> None:
        self._masking = masking
        if self.average is not None:
            self.average.begin(self.model)

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return len(self.loader)

    def prepare(self) -> str | None:
        """Compile before the first step, if that is due; returns a note for the log."""
        if self._is_prepared:
            return None
        self._is_prepared = True
        x = next(iter(self.loader.epoch(0))).x
        tested = EVAL_BATCH if self._most_tested >= EVAL_BATCH else 0
        return self.forward.prepare(
            x, self.plan.attack is not None, self.plan.attack_training, tested
        )

    def train_epoch(self, epoch: int, tally: Tally, **options: Any) -> Progress:
        """Train the steps of an epoch (from 0) that ``tally`` has not seen; ``options`` go to
        ``engine.train_epoch``."""
        if self._synchronized:  # not earlier: each process builds its stage on its own
            synchronize_batch_norm(self.model)
        batches = self.loader.epoch(epoch, first_step=tally.step)
        plan = self.plan
        if self.guard is not None:
            plan = dataclasses.replace(plan, attack=self.guard.attack)
        options |= {"plan": plan, "epoch": epoch, "steps": self.steps, "tally": tally}
        options |= {"masking": self.masking, "average": self.average, "on_move": self._follow}
        return train_epoch(self.model, self.optimizer, batches, forward=self.forward, **options)

    def _follow(self, move: ChannelMove) -> None:
        """Update what else depends on the network's shapes or on the positions of its channels."""
        if self.average is not None:
            self.average.follow(move)
        if move.reshapes:
            self.forward.reset()
            self.costs = flops.layer_costs(self.model, self._image_shape)

    def averaged(self) -> nn.Module | None:
        """The averaged network, ready for a test; None before there is one."""
        if self.average is None or not self.average.is_ready:
            return None
        if isinstance(self.average, EpochAverage):
            # shuffled: each batch's own statistics count, and image folders are sorted by class
            batches = TrainLoader(self._train, EVAL_BATCH, Augmentation(), self.plan.seed).epoch(0)
            with preserved_generators(self._train.device) as seed:
                seed(stream(self.plan.seed, "statistics"))
                self.average.estimate_statistics(batch.x for batch in batches)
        return self.average.model

    def live_counts(self) -> dict[str, int]:
        """Live weights of each prunable layer."""
        if isinstance(self.masking, Masking):
            return self.masking.live_counts()
        return {cost.name: cost.weights for cost in self.costs}

    def removed(self) -> Row:
        """The part of the network's description that only its masks know: its live channels."""
        masking = self.masking
        return {"channels": masking.kept()} if isinstance(masking, ChannelMasking) else {}

    def figures(self) -> Row:
        """Sparsity and cost per image of the network, for ``metrics.jsonl``."""
        live = self.live_counts()
        masks = self.masking.masks if self.masking else {}
        # an unused layer has no costs, so its mask gives its size
        dense = {name: self._dense.get(name) or masks[name].numel() for name in live}
        density = sum(live.values()) / sum(dense.values())
        by_layer = {name: live[name] / dense[name] for name in live}
        return {
            "density": density,
            "explored": self.masking.explored_fraction() if self.masking else density,
            "layer_densities": by_layer if density < 1 else {},
            "inference_flops": flops.real_inference(self.costs, {**live, **masks}),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "masking": self.masking.state_dict() if self.masking else None,
            **({"average": self.average.state_dict()} if self.average else {}),
            **({"guard": self.guard.state_dict()} if self.guard else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                # memory layout of the weights, so that a step is one pass
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    like = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                    kept[name] = like.copy_(value)
        if self.masking is not None:
            self.masking.load_state_dict(state["masking"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.guard is not None and "guard" in state:  # older checkpoints have none
            self.guard.load_state_dict(state["guard"])


def _loader(data: Data, plan: Plan, settings: CommonSettings, world: World) -> TrainLoader:
    """The batches of training; raises ``InputError`` if a process would get too few images."""
    together = settings.sync_bn and world.size > 1
    least = 1 if together else 2
    too_small = (
        f"--batch_size {settings.batch_size} leaves {world.size} processes fewer than {least}"
        " image(s) each"
    )
    require(world.size == 1 or settings.batch_size >= least * world.size, too_small)
    loader = TrainLoader(
        data.train, settings.batch_size, data.augmentation, plan.seed, world=world, least=least
    )
    # A repeated image would count in the shared statistics of batch norm.
    smallest = (
        f"--sync_bn: the last batch of an epoch has {loader.smallest} images for"
        f" {world.size} processes; another --batch_size"
    )
    require(not together or loader.smallest >= world.size, smallest)
    return loader


def _average(model: nn.Module, plan: Plan) -> Average | None:
    if plan.ema:
        return ExponentialAverage(model, plan.ema)
    return None if plan.swa_start is None else EpochAverage(model, plan.swa_start)


def _warn_of_uncounted(
    model: nn.Module, costs: Sequence[flops.LayerCost], idle: Sequence[str]
) -> None:
    """FLOPs are counted where layers are called, not where only their weights are used."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    weights = [f"{n}.weight" for n, module in model.named_modules() if isinstance(module, kinds)]
    counted = {cost.name for cost in costs}
    if left := [name for name in weights if name not in counted and name not in idle]:
        warnings.warn(
            f"FLOPs leave out layers that are not called: {', '.join(left)}", stacklevel=3
        )


def _rehearsed(
    model: nn.Module, data: Data, arch: str, execution: Execution
) -> tuple[list[str], bool]:
    """What ``rehearse_step`` finds about a custom network; built-in ones need no rehearsal."""
    if arch not in CUSTOM_ARCHITECTURES:
        return [], False
    with refusing(arch):
        idle, draws = rehearse_step(model, data, execution)
    if idle:
        warnings.warn(
            "without a gradient on the first images, so these stay unchanged until they are used:"
            f" {', '.join(idle)}",
            stacklevel=2,
        )
    return idle, draws
