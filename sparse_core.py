"""Sparse training: how dense each layer is, which weights live, and when that changes.

The parts compose and each can be used alone:

* ``layer_densities`` / ``layer_counts`` spread a density over the layers (IGQ, ERK, ER, uniform);
* ``initial_masks`` draws or scores the first masks (also SNIP, GraSP, SynFlow, magnitude);
* ``drop_lowest`` and ``grow_highest`` are the two halves of every mask update, with exact counts;
* ``DropFractionSchedule`` says how much to drop, ``DensityController`` is Flying Bird+'s verdict;
* ``Masking`` holds the masks of a network in training and applies all of this.

Sources: "Sparsity Winning Twice" (Chen et al., ICLR 2022) for Flying Bird and Flying Bird+; "Rigging the
Lottery" (Evci et al., ICML 2020) for ERK and gradient growth; "Connectivity Matters" (Vysogorets and
Kempe, JMLR 2023) for the ideal gas quotas (IGQ).

In someone else's training loop::

    masking = Masking(model, optimizer, MaskingConfig(density=0.1, total_steps=epochs * len(loader)))
    for x, y in loader:
        optimizer.zero_grad()
        loss_function(model(x), y).backward()
        optimizer.step()
        masking.step()
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.seeding import random_bits, stream, uniform

DENSITY_METHODS = ("igq", "erk", "er", "uniform")
SCORED_STARTS = ("magnitude", "random_global", "snip", "grasp", "synflow")
SPARSE_INITS = DENSITY_METHODS + SCORED_STARTS
SCHEDULES = ("cosine", "linear", "constant")
_GRASP_TEMPERATURE = 200.0
_SYNFLOW_ROUNDS = 100

ImagesAndLabels = tuple[Tensor, Tensor]


# ---------------------------------------------------------------- densities by layer


def layer_densities(shapes: Mapping[str, Sequence[int]], density: float, method: str) -> dict[str, float]:
    """Spread one density over layers.

    Args:
        shapes: weight shape by layer name, of two or more dimensions, the two channel counts first.
        density: kept fraction of all weights together, in (0, 1].
        method: ``igq`` (keep 1 / (F n + 1) of a layer of n weights, F by bisection), ``erk`` (proportional
            to the sum over the product of the shape), ``er`` (the same from the two channel counts alone) or
            ``uniform``. For ``erk`` and ``er`` a layer that would pass 1 is dense and the rest is solved again.

    Returns:
        The kept fraction of each layer, in (0, 1]; weighted by size they average to ``density``.

    Raises:
        ValueError: a density outside (0, 1], an unknown method, no layers.
    """
    _check_density(density)
    if not shapes:
        raise ValueError("no layers to spread a density over")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if method == "uniform" or density == 1.0:
        return dict.fromkeys(shapes, density)
    if method == "igq":
        return _igq(sizes, density)
    if method == "erk":
        return _erdos_renyi(sizes, {name: sum(s) / math.prod(s) for name, s in shapes.items()}, density)
    if method == "er":
        return _erdos_renyi(sizes, {name: (s[0] + s[1]) / (s[0] * s[1]) for name, s in shapes.items()}, density)
    raise ValueError(f"unknown density method {method!r}; known: {', '.join(DENSITY_METHODS)}")


def _igq(sizes: Mapping[str, int], density: float) -> dict[str, float]:
    target = density * sum(sizes.values())
    low, high = 0.0, 1.0
    while sum(n / (high * n + 1) for n in sizes.values()) > target:
        high *= 2
    for _ in range(200):  # to the last bit of a float64
        middle = (low + high) / 2
        if sum(n / (middle * n + 1) for n in sizes.values()) > target:
            low = middle
        else:
            high = middle
    return {name: 1 / (high * n + 1) for name, n in sizes.items()}


def _erdos_renyi(sizes: Mapping[str, int], weights: Mapping[str, float], density: float) -> dict[str, float]:
    dense: set[str] = set()
    while True:
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = budget / sum(sizes[name] * weights[name] for name in sizes if name not in dense)
        over = {name for name in sizes if name not in dense and scale * weights[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else scale * weights[name] for name in sizes}
        dense |= over


def layer_counts(shapes: Mapping[str, Sequence[int]], density: float, method: str) -> dict[str, int]:
    """Live weights of each layer: ``layer_densities`` in whole weights.

    They sum to ``round(density * total)`` exactly (largest remainders, ties to the earlier layer), and no
    layer is left without a weight, so that no network is cut in two by rounding.
    """
    densities = layer_densities(shapes, density, method)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    exact = {name: densities[name] * n for name, n in sizes.items()}
    counts = {name: max(1, min(sizes[name], math.floor(value))) for name, value in exact.items()}
    missing = round(density * sum(sizes.values())) - sum(counts.values())
    by_remainder = sorted(sizes, key=lambda name: counts[name] - exact[name])
    while missing > 0:
        for name in [name for name in by_remainder if counts[name] < sizes[name]][:missing]:
            counts[name] += 1
            missing -= 1
    while missing < 0:
        largest = max(counts, key=lambda name: counts[name])
        if counts[largest] == 1:
            raise ValueError(f"density {density} leaves fewer weights than the network has layers ({len(sizes)})")
        counts[largest] -= 1
        missing += 1
    return counts


def _check_density(density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is the kept fraction and lies in (0, 1], not {density}")


# ---------------------------------------------------------------- drop and grow


def drop_lowest(score: Tensor, mask: Tensor, n: int) -> Tensor:
    """A new mask without the ``n`` live positions of lowest score.

    Args:
        score: any shape, floating; NaN counts as infinite.
        mask: bool, the same shape; True is live. Not changed.
        n: how many to drop, 0 to the number of live positions.

    Ties go to the lower index (row-major), on every device. Raises ``ValueError`` for a bad ``n``.
    """
    return _switch(score, mask, n, lowest=True)


def grow_highest(score: Tensor, mask: Tensor, n: int) -> Tensor:
    """A new mask with the ``n`` dead positions of highest score added.

    Args and ties as in ``drop_lowest``; ``n`` is 0 to the number of dead positions.
    """
    return _switch(score, mask, n, lowest=False)


def _switch(score: Tensor, mask: Tensor, n: int, *, lowest: bool) -> Tensor:
    if score.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"score {tuple(score.shape)} and bool mask {tuple(mask.shape)} must have the same shape")
    # Row-major order whatever the memory format, so that ties break alike for channels-last weights.
    positions = (mask if lowest else ~mask).reshape(-1).nonzero().squeeze(1)
    if not 0 <= n <= positions.numel():
        raise ValueError(f"cannot choose {n} of {positions.numel()} positions")
    switched = mask.reshape(-1).clone()
    if n:
        values = score.reshape(-1)[positions]
        switched[positions[_extreme(values, n, lowest)]] = not lowest
    return switched.view(mask.shape)


def _extreme(values: Tensor, n: int, lowest: bool) -> Tensor:
    """Indices of the ``n`` lowest (or highest) values, ties to the lower index."""
    values = values.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    chosen = values.topk(n, largest=not lowest, sorted=False).values
    threshold = chosen.amax() if lowest else chosen.amin()
    # topk breaks ties as it likes, so it only gives the threshold.
    beyond = (values < threshold if lowest else values > threshold).nonzero().squeeze(1)
    tied = (values == threshold).nonzero().squeeze(1)
    return torch.cat([beyond, tied[: n - beyond.numel()]])


# ---------------------------------------------------------------- schedules and verdicts


@dataclass(frozen=True)
class DropFractionSchedule:
    """The fraction of a layer's live weights dropped at a mask update after ``step`` optimizer steps.

    ``cosine`` and ``linear`` go from ``initial`` to ``minimum`` over ``total_steps`` and stay there;
    ``constant`` stays at ``initial``. The paper calls it the death rate.
    """

    initial: float
    total_steps: int
    kind: str = "cosine"
    minimum: float = 0.005

    def __post_init__(self) -> None:
        if not 0.0 < self.initial <= 1.0:
            raise ValueError(f"the drop fraction lies in (0, 1], not {self.initial}")
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be positive, not {self.total_steps}")
        if self.kind not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.kind!r}; known: {', '.join(SCHEDULES)}")

    def at(self, step: int) -> float:
        """The fraction after ``step`` optimizer steps, in (0, 1]."""
        progress = min(max(step / self.total_steps, 0.0), 1.0)
        floor = min(self.minimum, self.initial)
        if self.kind == "cosine":
            return floor + (self.initial - floor) * (1 + math.cos(math.pi * progress)) / 2
        if self.kind == "linear":
            return self.initial + (floor - self.initial) * progress
        return self.initial


@dataclass(frozen=True)
class Verdict:
    """What Flying Bird+ adds to one mask update, for all layers: ``prune`` further weights, ``grow`` more."""

    prune: bool = False
    grow: bool = False


@dataclass
class DensityController:
    """Flying Bird+'s two tests on how training goes (paper, section 3.2; SPEC 6).

    ``prune``: (training accuracy - validation RA) rose in at least ``threshold`` of the last
    ``epoch_range`` epoch-to-epoch differences. ``grow``: the validation robust loss did not fall in at
    least that fraction. Fewer differences are used when fewer exist; none means no verdict.
    """

    epoch_range: int = 4
    threshold: float = 0.5
    start_epoch: int = 100
    gaps: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.epoch_range < 1:
            raise ValueError(f"epoch_range counts epoch-to-epoch differences and is at least 1, not {self.epoch_range}")
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"the threshold is a fraction in (0, 1], not {self.threshold}")

    def observe(self, *, train_ra: float, val_ra: float, val_loss: float) -> None:
        """Take in one finished epoch: accuracies in percent, the mean robust loss on validation images."""
        self.gaps.append(float(train_ra) - float(val_ra))
        self.val_losses.append(float(val_loss))

    def decide(self, epoch: int) -> Verdict:
        """The verdict during ``epoch`` (from 0), which sees the epochs observed before it."""
        if epoch < self.start_epoch:
            return Verdict()
        rises = [after > before for before, after in _pairs(self.gaps[:epoch], self.epoch_range)]
        not_falls = [after >= before for before, after in _pairs(self.val_losses[:epoch], self.epoch_range)]
        return Verdict(prune=self._reached(rises), grow=self._reached(not_falls))

    def _reached(self, held: Sequence[bool]) -> bool:
        return bool(held) and sum(held) / len(held) >= self.threshold


def _pairs(values: Sequence[float], most: int) -> list[tuple[float, float]]:
    """The last ``most`` pairs of neighbours."""
    return list(itertools.pairwise(values))[-most:]


# ---------------------------------------------------------------- first masks


_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of convolutions (also 1-d, 3-d and transposed), linear layers and attention's projections, by name.

    Biases, norms, embeddings and free parameters are never masked, whatever their shape; frozen weights (``requires_grad`` False)
    are left alone and do not count. A weight that several layers share counts once.

    Raises:
        ValueError: a layer whose weight is computed from others, as by ``weight_norm`` or ``torch.nn.utils.prune``, so that zeros
            in what is trained are not zeros in what is computed.
    """
    weights: set[int] = set()
    for name, module in model.named_modules():
        weights |= {id(_trained_weight(module, leaf, name)) for leaf in _weight_names(module)}
    return {name: p for name, p in model.named_parameters() if id(p) in weights and p.requires_grad}


def _weight_names(module: nn.Module) -> list[str]:
    if isinstance(module, nn.MultiheadAttention):  # its last projection is a linear layer of its own
        return [leaf for leaf in _ATTENTION_WEIGHTS if getattr(module, leaf) is not None]
    return ["weight"] if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) else []


def _trained_weight(module: nn.Module, leaf: str, name: str) -> nn.Parameter:
    """The parameter behind a layer's weight: itself, or what a spectral norm divides, since there a zero stays one."""
    own = dict(module.named_parameters(recurse=False))
    if leaf in own:
        return own[leaf]
    if hasattr(module, f"{leaf}_mask"):
        raise ValueError(f"{name} is masked by torch.nn.utils.prune already; torch.nn.utils.prune.remove(layer, '{leaf}') makes that plain")
    if f"{leaf}_orig" in own:  # the older spectral norm
        return own[f"{leaf}_orig"]
    if f"{leaf}_g" in own:
        raise ValueError(
            f"{name} has a weight_norm, whose zeros are no zeros of its weight; torch.nn.utils.remove_weight_norm takes it off"
        )
    if nn.utils.parametrize.is_parametrized(module, leaf):
        parts: Any = module.parametrizations[leaf]  # type: ignore[index]
        kinds = [type(part).__name__ for part in parts]
        if kinds == ["_SpectralNorm"]:
            return parts.original
        computed = f"computed by {', '.join(kinds).strip('_')}, whose zeros are no zeros of it"
        raise ValueError(f"{name} has a weight {computed}; torch.nn.utils.parametrize.remove_parametrizations takes that off")
    raise ValueError(f"{name} has a {leaf} that is no parameter, so it cannot be masked")


def _warn_of_frozen(model: nn.Module) -> None:
    """Name what a caller may have expected to be masked."""
    weights = [(name, _trained_weight(m, leaf, name)) for name, m in model.named_modules() for leaf in _weight_names(m)]
    frozen = list(dict.fromkeys(name for name, weight in weights if not weight.requires_grad))
    if frozen:
        warnings.warn(f"frozen layers are left alone and do not count: {', '.join(frozen)}", stacklevel=3)


def initial_masks(
    model: nn.Module, density: float, method: str = "igq", *, seed: int = 1, batches: Sequence[ImagesAndLabels] = ()
) -> dict[str, Tensor]:
    """First masks (name -> bool, True is live) with ``round(density * total)`` live weights in all.

    Args:
        model: left as it is; scores are computed on a copy.
        density: kept fraction in (0, 1].
        method: a density method (positions drawn at random within the layer's exact count), or a score over
            all layers together: ``magnitude``, ``random_global``, ``snip`` (Lee et al., 2019), ``grasp`` (Wang
            et al., 2020), ``synflow`` (Tanaka et al., 2020).
        seed: of the random positions.
        batches: images and labels for ``snip`` and ``grasp`` (their gradients are summed over them); the
            image shape is also what ``synflow`` needs.

    Raises:
        ValueError: unknown method, bad density, no batches where the score needs them.
    """
    _check_density(density)
    weights = prunable(model)
    if not weights:
        raise ValueError("the network has no weights to mask: no trained convolution, linear layer or attention")
    if method in DENSITY_METHODS:
        counts = layer_counts({name: tuple(w.shape) for name, w in weights.items()}, density, method)
        return {
            name: grow_highest(_random_score(w, seed, "init", name), torch.zeros_like(w, dtype=torch.bool), counts[name])
            for name, w in weights.items()
        }
    if method not in SCORED_STARTS:
        raise ValueError(f"unknown sparse start {method!r}; known: {', '.join(SPARSE_INITS)}")
    if method in ("snip", "grasp", "synflow") and not batches:
        raise ValueError(f"{method} needs batches of images and labels to score the weights")
    if method == "synflow":
        return _synflow_masks(model, density, batches[0][0][:1])
    if method == "magnitude":
        scores = {name: w.detach().abs() for name, w in weights.items()}
    elif method == "random_global":
        scores = {name: _random_score(w, seed, "init", name) for name, w in weights.items()}
    else:
        scores = (_snip_scores if method == "snip" else _grasp_scores)(model, batches)
    return _connected_masks(scores, density)


def _connected_masks(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """``global_masks`` that leave each layer its highest weight, and the last one, the classifier, that of each output.

    A layer that a start empties lets nothing through, so it never has a gradient to grow by.
    """
    masks = global_masks(scores, density)
    *_, classifier = scores
    lacking = {name: ~mask.flatten(1).any(dim=1) if name == classifier else ~mask.any().view(1) for name, mask in masks.items()}
    if not any(bool(rows.any()) for rows in lacking.values()):
        return masks
    least = len(scores) - 1 + len(lacking[classifier])
    if round(density * sum(score.numel() for score in scores.values())) < least:
        raise ValueError(f"density {density} leaves fewer weights than one a layer and one for each output of {classifier}, {least}")
    # Rows are views of it, which a channels-last tensor does not have.
    raised = {name: score.clone(memory_format=torch.contiguous_format) for name, score in scores.items()}
    for name, score in raised.items():
        rows = score.view(len(lacking[name]), -1)
        rows.scatter_(1, rows.argmax(dim=1, keepdim=True), float("inf"))
    return global_masks(raised, density)


def global_masks(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Keep the highest scores over all layers together, ``round(density * total)`` in all; ties to the earlier layer."""
    _check_density(density)
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    live = round(density * flat.numel())
    if live < len(scores):
        raise ValueError(f"density {density} leaves fewer weights than the network has layers ({len(scores)})")
    kept = grow_highest(flat, torch.zeros_like(flat, dtype=torch.bool), live)
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _random_score(weight: Tensor, seed: int, *names: int | str) -> Tensor:
    counter = torch.arange(weight.numel(), device=weight.device)
    return uniform(stream(seed, *names), counter).view(weight.shape)


def _snip_scores(model: nn.Module, batches: Sequence[ImagesAndLabels]) -> dict[str, Tensor]:
    """|w * dL/dw| with the loss summed over all batches."""
    model = copy.deepcopy(model).train()
    weights = prunable(model)
    for x, y in batches:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    # A layer that the loss does not reach has no gradient.
    return {name: (w.detach() * (torch.zeros_like(w) if w.grad is None else w.grad)).abs() for name, w in weights.items()}


def _grasp_scores(model: nn.Module, batches: Sequence[ImagesAndLabels]) -> dict[str, Tensor]:
    """w * (H g): how much gradient flow is lost with a weight (kept: the highest), logits divided by 200."""
    model = copy.deepcopy(model).train()
    weights = prunable(model)

    def gradients(x: Tensor, y: Tensor, create_graph: bool) -> Sequence[Tensor]:
        loss = F.cross_entropy(model(x) / _GRASP_TEMPERATURE, y, reduction="sum")
        return torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True)

    totals = [torch.zeros_like(w) for w in weights.values()]
    for x, y in batches:
        torch._foreach_add_(totals, list(gradients(x, y, create_graph=False)))
    products = [torch.zeros_like(w) for w in weights.values()]
    for x, y in batches:
        terms = [(g * t).sum() for g, t in zip(gradients(x, y, create_graph=True), totals, strict=True)]
        torch._foreach_add_(
            products, list(torch.autograd.grad(torch.stack(terms).sum(), list(weights.values()), allow_unused=True, materialize_grads=True))
        )
    return {name: w.detach() * hg for (name, w), hg in zip(weights.items(), products, strict=True)}


def _synflow_masks(model: nn.Module, density: float, x: Tensor) -> dict[str, Tensor]:
    """100 rounds of keeping the highest |w * dR/dw|, R = the network's output on ones with all weights positive."""
    # float64: in a deep positive network the products span more than float32 holds.
    model = copy.deepcopy(model).double().eval()
    weights = prunable(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    ones = torch.ones_like(x, dtype=torch.float64)
    normalize = getattr(model, "normalize", None)
    if normalize is not None:  # so that the first convolution sees ones
        ones = ones * normalize.std.view(1, -1, 1, 1) + normalize.mean.view(1, -1, 1, 1)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for done in range(1, _SYNFLOW_ROUNDS + 1):
        gradients = torch.autograd.grad(model(ones).sum(), list(weights.values()), allow_unused=True, materialize_grads=True)
        scores = {name: (w.detach() * g).abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}
        masks = global_masks(scores, density ** (done / _SYNFLOW_ROUNDS))
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])
    return masks


# ---------------------------------------------------------------- masks in training


@dataclass(frozen=True)
class MaskingConfig:
    """How a network is kept sparse while it trains. Defaults are the paper's.

    Attributes:
        density: kept fraction of the prunable weights at the start, in (0, 1].
        total_steps: optimizer steps of the whole run; the drop fraction's schedule spans them.
        sparse_init: one of ``SPARSE_INITS``.
        fixed: the masks of the start stay (static sparsity).
        growth: one of ``GROWTHS``: ``random``, ``gradient`` (largest |gradient| of the last batch) or ``momentum``.
        drop_fraction, drop_schedule: of a layer's live weights, dropped and regrown at one update.
        update_frequency: optimizer steps between updates; ``second_frequency`` once past half of ``total_steps``.
        adaptive: Flying Bird+, whose density follows the verdicts of a ``DensityController`` made of
            ``start_epoch``, ``epoch_range`` and ``update_threshold``.
        prune_ratio, growth_ratio: sizes of Flying Bird+'s extra prune and extra growth.
        seed: of the random positions.
    """

    density: float
    total_steps: int
    sparse_init: str = "igq"
    fixed: bool = False
    growth: str = "random"
    drop_fraction: float = 0.5
    drop_schedule: str = "cosine"
    update_frequency: int = 900
    second_frequency: int | None = None
    adaptive: bool = False
    start_epoch: int = 100
    epoch_range: int = 4
    update_threshold: float = 0.5
    prune_ratio: float = 0.4
    growth_ratio: float = 0.05
    seed: int = 1

    def __post_init__(self) -> None:
        _check_density(self.density)
        if self.sparse_init not in SPARSE_INITS:
            raise ValueError(f"unknown sparse start {self.sparse_init!r}; known: {', '.join(SPARSE_INITS)}")
        if self.growth not in GROWTHS:
            raise ValueError(f"unknown growth {self.growth!r}; known: {', '.join(GROWTHS)}")
        if self.update_frequency < 1 or (self.second_frequency is not None and self.second_frequency < 1):
            raise ValueError("update frequencies count optimizer steps and are at least 1")
        if self.prune_ratio < 0 or self.growth_ratio < 0:
            raise ValueError("prune_ratio and growth_ratio must not be negative")
        if self.adaptive and self.fixed:
            raise ValueError("fixed masks cannot adapt their density")


def update_is_due(config: MaskingConfig, step: int) -> bool:
    """Whether the masks change after ``step`` optimizer steps (from 1)."""
    if config.fixed:
        return False
    late = 2 * step > config.total_steps
    frequency = config.second_frequency if late and config.second_frequency else config.update_frequency
    return step % frequency == 0


def _refuse_other_optimizer(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Its momentum would bring masked weights back: of a copy of the network, say, or of a part of it."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, weight in weights.items():
        if id(weight) not in trained:
            raise ValueError(f"the optimizer does not hold {name}: make it of this model's parameters, after the model is complete")


def _warn_of_idle_updates(config: MaskingConfig) -> None:
    if not config.fixed and not any(update_is_due(config, step) for step in range(1, config.total_steps + 1)):
        frequency = f"update_frequency={config.update_frequency}"
        advice = "a smaller one moves the masks, fixed=True says that they shall stay"
        # The line named is the one that makes the Masking.
        warnings.warn(f"with {frequency} no mask update falls into {config.total_steps} steps; {advice}", stacklevel=3)


class Masking:
    """Keeps a network sparse: masks, their updates, and what is needed to resume them.

    The network stays plain: dense tensors whose dead weights are zero, so ``param.grad`` is the dense
    gradient that growth needs. ``masks`` maps names to bool tensors shaped like ``weights``, the prunable ones.

    Args:
        model: its prunable weights (``prunable``) are masked in place at once.
        optimizer: every state tensor shaped like a weight (momentum) is masked too.
        config: see ``MaskingConfig``.
        masks: the first masks, instead of ``config.sparse_init`` (a Robust Bird ticket, say).
        batches: images and labels, for starts that score weights by data.

    Raises:
        ValueError: masks that do not fit the network, an optimizer that does not train it, or a start without the batches it needs.

    Warns where masks that are not ``fixed`` would never change in ``total_steps``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: MaskingConfig,
        *,
        masks: Mapping[str, Tensor] | None = None,
        batches: Sequence[ImagesAndLabels] = (),
    ) -> None:
        self.config = config
        self.steps = 0
        self._put_off = False  # an update that fell on gradients without use
        self.events: list[dict[str, Any]] = []
        self.controller = DensityController(config.epoch_range, config.update_threshold, config.start_epoch)
        self.schedule = DropFractionSchedule(config.drop_fraction, config.total_steps, config.drop_schedule)
        self.weights = prunable(model)
        self._optimizer = optimizer
        _warn_of_frozen(model)
        _refuse_other_optimizer(self.weights, optimizer)
        _warn_of_idle_updates(config)
        if masks is None:
            masks = initial_masks(model, config.density, config.sparse_init, seed=config.seed, batches=batches)
        self.masks: dict[str, Tensor] = {}
        self._explored: dict[str, Tensor] = {}
        self._set_masks(masks)
        self._explored = {name: mask.clone() for name, mask in self.masks.items()}
        self.apply()

    # ---- every step

    def step(self) -> None:
        """Call after each ``optimizer.step()``, gradients still in place: masks again, and updates when due."""
        self.steps += 1
        if not self.update_due():
            self.apply()
        elif self.config.growth == "gradient" and not self._gradients_tell():
            self._put_off = True
            self.apply()
        else:
            self._put_off = False
            self.update_topology()

    def update_due(self) -> bool:
        """Whether the masks change after the step that was just counted."""
        return self._put_off or update_is_due(self.config, self.steps)

    def _gradients_tell(self) -> bool:
        """Whether the last gradients say where to grow: finite, and not all zero, as they are after a step that a scaler skipped."""
        largest = torch.stack([gradient.abs().amax() for gradient in self._gradients()])  # of NaN that is NaN
        return bool(largest.isfinite().all() & (largest > 0).any())

    def _gradients(self) -> list[Tensor]:
        found = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        if not found:
            raise ValueError("gradient growth needs the gradients of the last batch: update masks before zero_grad()")
        return found

    @torch.no_grad()
    def apply(self) -> None:
        """Set dead weights and their momentum to zero, in place."""
        for name, weight in self.weights.items():
            for tensor in (weight, *self.moments(name)):
                tensor.masked_fill_(self._dead[name], 0.0)  # not times 0, which an infinite gradient would make NaN

    def moments(self, name: str) -> Iterable[Tensor]:
        """What the optimizer remembers of a layer, each tensor shaped like its weight: the momentum of SGD."""
        weight = self.weights[name]
        state = self._optimizer.state.get(weight, {})
        return [s for s in state.values() if isinstance(s, Tensor) and s.shape == weight.shape]

    # ---- every update

    @torch.no_grad()
    def update_topology(self) -> None:
        """Drop and grow in every layer that is not fully dense, once, by the schedule and the verdict now.

        Called by ``step`` when due. Needs the gradients of the last batch for ``gradient`` growth and the
        optimizer's momentum, not yet masked, for ``momentum`` growth.
        """
        if self.config.growth == "gradient":
            self._gradients()  # without any, nothing would move
        verdict = self.controller.decide(self.epoch) if self.config.adaptive else Verdict()
        fraction = self.schedule.at(self.steps)
        live_counts = torch.stack([mask.sum() for mask in self.masks.values()]).tolist()  # one wait for the device
        updated = {name: self._update_layer(name, live, fraction, verdict) for (name, live) in zip(self.masks, live_counts, strict=True)}
        self.apply()  # old masks first: what grows starts at zero; a weight dropped and regrown at once keeps its value
        self._set_masks(updated)
        for name, mask in self.masks.items():
            self._explored[name] |= mask
        self.apply()
        self.events.append(
            {
                "step": self.steps,
                "epoch": self.epoch,
                "drop_fraction": fraction,
                "prune": verdict.prune,
                "grow": verdict.grow,
                "density": self.density(),
            }
        )

    def _update_layer(self, name: str, live: int, fraction: float, verdict: Verdict) -> Tensor:
        mask, weight = self.masks[name], self.weights[name]
        if live == mask.numel():
            return mask
        if self.config.growth == "gradient" and weight.grad is None:  # not used in the last step
            return mask
        n_drop = min(live, math.ceil(fraction * live))
        n_prune = math.ceil(fraction * self.config.prune_ratio * live) if verdict.prune else 0
        n_grow = int(n_drop * (1 + self.config.growth_ratio)) if verdict.grow else n_drop
        n_dropped = min(live, n_drop + n_prune)
        dropped = drop_lowest(weight.abs(), mask, n_dropped)
        return grow_highest(GROWTHS[self.config.growth](self, name), dropped, min(n_grow, mask.numel() - live + n_dropped))

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        if {name: tuple(mask.shape) for name, mask in masks.items()} != shapes:
            raise ValueError("the masks do not fit the network: names or shapes differ")
        # Same device and memory layout as the weights, so that applying them is one pass.
        self.masks = {
            name: torch.empty_like(weight, dtype=torch.bool, requires_grad=False).copy_(masks[name])
            for name, weight in self.weights.items()
        }
        self._dead = {name: ~mask for name, mask in self.masks.items()}

    # ---- every epoch, and questions

    @property
    def epoch(self) -> int:
        """The current epoch from 0: the number of epochs observed."""
        return len(self.controller.gaps)

    def observe(self, *, train_ra: float, val_ra: float, val_loss: float) -> None:
        """Take in a finished epoch (accuracies in percent, mean validation robust loss); once an epoch."""
        self.controller.observe(train_ra=train_ra, val_ra=val_ra, val_loss=val_loss)

    def density(self) -> float:
        """Live fraction of all prunable weights."""
        return sum(self.live_counts().values()) / sum(mask.numel() for mask in self.masks.values())

    def live_counts(self) -> dict[str, int]:
        """Live weights of each layer."""
        counts = torch.stack([mask.sum() for mask in self.masks.values()]).tolist()
        return dict(zip(self.masks, counts, strict=True))

    def layer_densities(self) -> dict[str, float]:
        """Live fraction of each layer."""
        return {name: live / self.masks[name].numel() for name, live in self.live_counts().items()}

    def explored_fraction(self) -> float:
        """Fraction of the prunable weights that have been live at some time."""
        explored = torch.stack([seen.sum() for seen in self._explored.values()]).sum().item()
        return explored / sum(seen.numel() for seen in self._explored.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes in training, as tensors and plain values; copies, so it can be kept."""
        put_off = {"put_off": True} if self._put_off else {}
        return put_off | {
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "explored": {name: seen.clone() for name, seen in self._explored.items()},
            "steps": self.steps,
            "gaps": list(self.controller.gaps),
            "val_losses": list(self.controller.val_losses),
            "events": [dict(event) for event in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a ``state_dict``; raises ``ValueError`` if it is of another network. Masks are applied at once."""
        self._set_masks(state["masks"])
        self._explored = {name: state["explored"][name].to(mask.device).clone() for name, mask in self.masks.items()}
        self.steps = int(state["steps"])
        self._put_off = bool(state.get("put_off", False))
        self.controller.gaps = [float(gap) for gap in state["gaps"]]
        self.controller.val_losses = [float(loss) for loss in state["val_losses"]]
        self.events = [dict(event) for event in state["events"]]
        self.apply()


def _random_growth(masking: Masking, name: str) -> Tensor:
    return _random_score(masking.weights[name], masking.config.seed, "grow", masking.steps, name)


def _gradient_growth(masking: Masking, name: str) -> Tensor:
    gradient = masking.weights[name].grad
    if gradient is None:
        raise ValueError(f"gradient growth needs the gradient of {name}: update masks before zero_grad()")
    return gradient.abs()


_MOMENTA = ("momentum_buffer", "exp_avg")  # as torch's optimizers name them


def _momentum_growth(masking: Masking, name: str) -> Tensor:
    state = masking._optimizer.state.get(masking.weights[name], {})
    momentum = next((state[key] for key in _MOMENTA if isinstance(state.get(key), Tensor)), None)
    if momentum is None:  # sums and averages of squares, as of Adagrad and RMSprop, have no direction
        raise ValueError("momentum growth needs an optimizer with momentum: SGD or RMSprop with momentum=, or one of the Adam family")
    return momentum.abs()


# Scores shaped like a layer's weight, by the masking and the layer's name; the highest among the dead positions grow.
GROWTHS: dict[str, Callable[[Masking, str], Tensor]] = {
    "random": _random_growth,
    "gradient": _gradient_growth,
    "momentum": _momentum_growth,
}


def mask_hash(masks: Mapping[str, Tensor]) -> int:
    """One number for all masks together, equal on every device: to compare processes, runs and resumes."""
    total = 0
    for name, mask in masks.items():
        positions = mask.reshape(-1).nonzero().squeeze(1)
        total ^= int(random_bits(stream(0, name), positions).sum().item()) if positions.numel() else 0
    return total
