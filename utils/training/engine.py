"""One training epoch: adversarial images, forward, backward, optimizer, masks."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data import Batch
from sparse_core import Masking, mask_hash
from utils.attacks import PGD, attack_draws
from utils.errors import RunError
from utils.execution.distributed import World
from utils.execution.forward import Forward
from utils.seeding import preserved_generators, stream
from utils.training.averages import Average
from utils.training.channel_masking import ChannelMasking, ChannelMove
from utils.training.losses import LOSSES, NO_OPTIONS, LossOf, Network, Options, TrainLoss
from utils.training.schedule import Plan, set_learning_rate
from utils.training.weight_perturbation import perturbed_weights

# Between reports of progress; not after each step, as reading the losses waits for the device.
_SECONDS_BETWEEN_REPORTS = 1.0


@dataclass(frozen=True)
class Progress:
    """Progress of an epoch: mean loss and running accuracy (percent) over the first ``step`` of
    ``steps`` steps, the number of images in them, and the time they took in seconds."""

    step: int
    steps: int
    loss: float
    accuracy: float
    images: int
    seconds: float


class _SGD(torch.optim.SGD):
    """torch's SGD without the decorators that keep ``torch.compile`` out of it: they import
    ``torch._dynamo``, a quarter of a short run's time, and no optimizer is compiled here."""

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)


def sgd(
    model: nn.Module, *, lr: float, momentum: float, weight_decay: float, nesterov: bool = False
) -> torch.optim.SGD:
    """Fused SGD: one pass over the weights."""
    optimizer = _SGD(
        model.parameters(),
        lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        fused=True,
    )
    if momentum:
        optimizer.register_step_pre_hook(_begin_momentum)
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give a parameter that is used for the first time a momentum of zero, where others have one:
    the fused kernel expects all or none."""
    states = optimizer.state
    for group in optimizer.param_groups:
        used = [parameter for parameter in group["params"] if parameter.grad is not None]
        new = [p for p in used if p not in states or "momentum_buffer" not in states[p]]
        if 0 < len(new) < len(used):
            for parameter in new:
                states[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


LossAndLogits = tuple[Tensor, Tensor]


class Step(NamedTuple):
    """Result of one update, on the device.

    Attributes:
        loss: mean over the batch (of all processes), detached.
        right: number of images in it that are classified correctly.
        loss_of: the same batch's loss for another network of this architecture.
    """

    loss: Tensor
    right: Tensor
    loss_of: LossOf


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    attack: PGD | None,
    attack_training: bool,
    key: tuple[int | str, ...],
    forward: Forward | None = None,
    loss: TrainLoss = LOSSES["ce"],
    options: Options = NO_OPTIONS,
    awp: float = 0.0,
    masks: Mapping[str, Tensor] | None = None,
) -> Step:
    """One update on one batch, masks apart.

    Args:
        model: attacked and updated. The attack waits for other processes only if batch norm is
            synchronized.
        attack: None trains on the images as they are.
        attack_training: craft in train mode (the paper's way) or eval mode.
        key: of the random start, together with the images' indices.
        forward: how the network is computed, and by which processes, each with its part of the
            batch; by default in float32 by this process alone.
        loss: training loss, with its ``options``.
        awp: size of the adversarial weight perturbation; 0 for none.
        masks: of weights that the perturbation leaves at zero.
    """
    forward = Forward(model) if forward is None else forward
    world = forward.world
    draws = attack_draws(attack, batch.indices, batch.x.shape[1:], *key) if attack else None

    def batch_loss(network: Network, x: Tensor, attacked: Tensor, y: Tensor) -> LossAndLogits:
        value, logits = loss.compute(network, x, attacked, y, options)
        # Averaged over processes, this is the mean over the whole batch, however it is split.
        return value * (batch.weight * world.size) if world.size > 1 else value, logits

    def update(x: Tensor, y: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        attacked = x
        if attack is not None:
            attacked = forward.attack(x, y, attack, training=attack_training, draws=draws)
        loss_there = partial(batch_loss, forward.averaged, x, attacked, y)
        with perturbed_weights(model, awp, lambda: loss_there()[0], masks):
            optimizer.zero_grad(set_to_none=True)
            value, logits = loss_there()
            value.backward()
        optimizer.step()
        return value.detach(), (logits.detach().argmax(dim=1) == y).sum(), attacked

    kind = (attack, attack_training, loss, options, awp)
    given = (batch.x, batch.y, draws)
    value, right, attacked = forward.update(update, *given, optimizer=optimizer, key=kind)

    def loss_of(other: nn.Module) -> Tensor:
        return batch_loss(partial(forward.plainly, other), batch.x, attacked, batch.y)[0]

    if world.size == 1:
        return Step(value, right, loss_of)
    world.share_buffers(model)
    counts = right.double() * (batch.weight > 0)
    sums = world.total(torch.stack([value.double() / world.size, counts]))
    return Step(sums[0].to(value.dtype), sums[1].long(), loss_of)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    plan: Plan,
    epoch: int,
    steps: int,
    masking: Masking | ChannelMasking | None = None,
    average: Average | None = None,
    tally: Tally | None = None,
    print_freq: int = 50,
    forward: Forward | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    after_step: Callable[[Tally], None] = lambda tally: None,
    on_move: Callable[[ChannelMove], None] = lambda move: None,
) -> Progress:
    """Train for one epoch in train mode.

    Args:
        batches: the epoch's batches after those in ``tally``.
        steps: batches in the whole epoch.
        epoch: from 0. It keys the attack's random starts and, with the step and the process, what
            the network itself draws from the global generators, which are left as found.
        masking, average: updated after each step.
        tally: of the steps done before, for an epoch that is resumed.
        print_freq: steps between calls of ``on_progress``, which check the losses; slow steps are
            reported once a second.
        forward: as in ``train_step``.
        after_step: called after each step, masks included; may raise.
        on_move: called after an update of channels, before the average.

    Raises:
        RunError: a loss is not finite, or masks differ between processes.
    """
    model.train()
    tally = Tally(steps) if tally is None else tally
    forward = Forward(model) if forward is None else forward
    options, reported_at = plan.step_options(epoch), tally.seconds
    start = time.perf_counter() - reported_at
    with preserved_generators(next(model.parameters()).device) as seed:
        for step, batch in enumerate(batches, tally.step):
            # so that dropout draws the same in a resumed run
            seed(stream(plan.seed, "network", epoch, step, forward.world.rank))
            set_learning_rate(optimizer, plan.rate(epoch, step, steps))
            masks = None if masking is None else masking.masks
            done = train_step(model, optimizer, batch, forward=forward, masks=masks, **options)
            _step_masks(masking, forward.world, done.loss_of, on_move)
            if average is not None:
                average.after_step(model, masking)
            tally.add(done.loss, done.right, batch.total)
            tally.seconds = time.perf_counter() - start
            is_late = tally.seconds - reported_at > _SECONDS_BETWEEN_REPORTS  # in any process
            if forward.world.highest(is_late or step + 1 == steps or (step + 1) % print_freq == 0):
                progress = _progress(tally, epoch, forward.world)  # waits for the device
                reported_at = tally.seconds = time.perf_counter() - start
                on_progress(progress)
            after_step(tally)
    return tally.progress(epoch)


def _step_masks(
    masking: Masking | ChannelMasking | None,
    world: World,
    loss_of: LossOf,
    on_move: Callable[[ChannelMove], None],
) -> None:
    if masking is None:
        return
    if isinstance(masking, ChannelMasking):
        move = masking.step(loss_of)
        if move is not None:
            on_move(move)
        masks: Mapping[str, Tensor] = {"channels": masking.live}
    else:
        masking.step()
        masks = masking.masks
    if world.size > 1 and masking.update_due():
        world.require_equal(mask_hash(masks), f"after {masking.steps} steps the masks")


def _progress(tally: Tally, epoch: int, world: World) -> Progress:
    try:
        return tally.progress(epoch)
    except RunError as error:
        world.fail(error)
        raise


class Tally:
    """An epoch's running sums. They stay on the device until they are read, so that no step waits.

    Attributes:
        images: number trained on so far.
        seconds: time spent so far.
    """

    def __init__(self, steps: int) -> None:
        self.images = 0
        self.seconds = 0.0
        self._steps = steps
        self._losses: list[Tensor] = []
        self._right: Tensor | int = 0
        self._weights: list[int] = []

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        self._losses.append(loss)
        self._right = self._right + right
        self._weights.append(images)
        self.images += images

    @property
    def step(self) -> int:
        """Number of steps done."""
        return len(self._losses)

    def progress(self, epoch: int) -> Progress:
        """Mean loss and accuracy so far; raises ``RunError`` if a loss is not finite."""
        losses = torch.stack(self._losses).double().cpu()
        if not bool(losses.isfinite().all()):
            step = int((~losses.isfinite()).nonzero()[0]) + 1
            raise RunError(
                f"the loss became {losses[step - 1].item()} in epoch {epoch + 1}, step {step} of"
                f" {self._steps}"
            )
        total = (losses * torch.tensor(self._weights, dtype=torch.float64)).sum().item()
        accuracy = 100.0 * int(self._right) / self.images
        mean = total / self.images
        return Progress(self.step, self._steps, mean, accuracy, self.images, self.seconds)

    def state_dict(self) -> dict[str, Any]:
        losses = torch.stack(self._losses).cpu() if self._losses else torch.empty(0)
        return {
            "losses": losses,
            "right": int(self._right),
            "weights": list(self._weights),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a ``state_dict``, its tensors on ``device``."""
        self._losses = list(state["losses"].to(device).unbind())
        self._right = int(state["right"])
        self._weights = [int(images) for images in state["weights"]]
        if len(self._losses) != len(self._weights):
            raise ValueError("the tally of an unfinished epoch is broken")
        self.images = sum(self._weights)
        self.seconds = float(state["seconds"])
