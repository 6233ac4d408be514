"""Sparse training: how dense each layer is, which weights are live, and when that changes.

The parts compose and each can be used alone:

* ``layer_densities`` / ``layer_counts`` spread a density over the layers (IGQ, ERK, ER, uniform);
* ``initial_masks`` draws or scores the first masks (also SNIP, GraSP, SynFlow, magnitude);
* ``drop_lowest`` and ``grow_highest`` are the two halves of every mask update, with exact counts;
* ``DropFractionSchedule`` says how much to drop, ``DensityController`` what Flying Bird+ adds;
* ``Masking`` holds the masks of a network in training and applies all of this.

Sources: "Sparsity Winning Twice" (Chen et al., ICLR 2022) for Flying Bird and Flying Bird+;
"Rigging the Lottery" (Evci et al., ICML 2020) for ERK and gradient growth; "Connectivity Matters"
(Vysogorets and Kempe, JMLR 2023) for the ideal gas quotas (IGQ).

In any training loop::

    config = MaskingConfig(density=0.1, total_steps=epochs * len(loader))
    masking = Masking(model, optimizer, config)
    for x, y in loader:
        optimizer.zero_grad()
        loss_function(model(x), y).backward()
        optimizer.step()
        masking.step()
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import math
import re
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__version__ = "0.2.0"
DENSITY_METHODS = ("igq", "erk", "er", "uniform")
SCORED_STARTS = ("magnitude", "random_global", "snip", "grasp", "synflow")
SPARSE_INITS = DENSITY_METHODS + SCORED_STARTS
SCHEDULES = ("cosine", "linear", "constant")
_GRASP_TEMPERATURE = 200.0
_SYNFLOW_ROUNDS = 100

ImagesAndLabels = tuple[Tensor, Tensor]
# Weights by name, or a predicate on a parameter's name, layer and value.
Choice = Mapping[str, nn.Parameter] | Callable[[str, nn.Module, nn.Parameter], bool]


# ---------------------------------------------------------------- densities by layer


def layer_densities(
    shapes: Mapping[str, Sequence[int]], density: float, method: str
) -> dict[str, float]:
    """Spread one density over layers.

    Args:
        shapes: weight shape by layer name, of two or more dimensions, the two channel counts first.
        density: kept fraction of all weights together, in (0, 1].
        method: ``igq`` (keep 1 / (F n + 1) of a layer of n weights, F by bisection), ``erk``
            (proportional to the sum over the product of the shape), ``er`` (the same from the two
            channel counts alone) or ``uniform``. For ``erk`` and ``er`` a layer whose density
            would exceed 1 is dense, and the rest is solved again.

    Returns:
        The kept fraction of each layer, in (0, 1]; weighted by size they average to ``density``.

    Raises:
        ValueError: a density outside (0, 1], an unknown method, no layers.
    """
    _check_density(density)
    if not shapes:
        raise ValueError("no layers to spread a density over")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if method not in DENSITY_METHODS:
        known = ", ".join(DENSITY_METHODS)
        raise ValueError(f"unknown density method {method!r}; known: {known}")
    if method == "uniform" or density == 1.0:
        return dict.fromkeys(shapes, density)
    if method == "igq":
        return _igq(sizes, density)
    dims = {name: s if method == "erk" else s[:2] for name, s in shapes.items()}
    weights = {name: sum(d) / math.prod(d) for name, d in dims.items()}
    return _erdos_renyi(sizes, weights, density)


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


def _erdos_renyi(
    sizes: Mapping[str, int], weights: Mapping[str, float], density: float
) -> dict[str, float]:
    dense: set[str] = set()
    while True:
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = budget / sum(sizes[name] * weights[name] for name in sizes if name not in dense)
        over = {name for name in sizes if name not in dense and scale * weights[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else scale * weights[name] for name in sizes}
        dense |= over


def layer_counts(
    shapes: Mapping[str, Sequence[int]], density: float, method: str
) -> dict[str, int]:
    """Live weights of each layer: ``layer_densities`` in whole weights.

    They sum to ``round(density * total)`` exactly (largest remainders, ties to the earlier layer),
    and each layer keeps at least one weight, so that rounding cannot cut a network in two. Raises
    ``ValueError`` as ``layer_densities``, and for a density that leaves fewer weights than layers.
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
            raise _too_few(density, f"the network has layers ({len(sizes)})")
        counts[largest] -= 1
        missing += 1
    return counts


def _check_density(density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is the kept fraction and must lie in (0, 1], not {density}")


def _too_few(density: float, needed: str) -> ValueError:
    return ValueError(f"density {density} leaves fewer weights than {needed}")


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


def grow_highest(score: Tensor, mask: Tensor, n: int, *, tie_key: int | None = None) -> Tensor:
    """A new mask with the ``n`` dead positions of highest score added.

    Args:
        score, mask: as in ``drop_lowest``.
        n: how many to add, 0 to the number of dead positions.
        tie_key: key from ``stream`` that breaks ties at random, the same on every device; without
            one they go to the lower index. Gradients in bfloat16 often tie, and ties by index would
            grow side by side.

    Raises ``ValueError`` for a bad ``n``.
    """
    return _switch(score, mask, n, lowest=False, tie_key=tie_key)


def _switch(
    score: Tensor, mask: Tensor, n: int, *, lowest: bool, tie_key: int | None = None
) -> Tensor:
    if score.shape != mask.shape or mask.dtype != torch.bool:
        shapes = f"score {tuple(score.shape)} and bool mask {tuple(mask.shape)}"
        raise ValueError(f"{shapes} must have the same shape")
    # Row-major whatever the memory format, so that ties break alike for channels-last weights.
    positions = (mask if lowest else ~mask).reshape(-1).nonzero().squeeze(1)
    if not 0 <= n <= positions.numel():
        raise ValueError(f"cannot choose {n} of {positions.numel()} positions")
    switched = mask.reshape(-1).clone()
    if n:
        beyond, tied = _extreme(score.reshape(-1)[positions], n, lowest)
        beyond, tied = positions[beyond], positions[tied]
        if tie_key is not None:
            tied = tied[random_bits(tie_key, tied).argsort(stable=True)]
        switched[torch.cat([beyond, tied[: n - beyond.numel()]])] = not lowest
    return switched.view(mask.shape)


def _extreme(values: Tensor, n: int, lowest: bool) -> tuple[Tensor, Tensor]:
    """Indices of the values certain to be among the ``n`` lowest (or highest), and of those that
    tie for the rest; both ascending."""
    values = values.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    chosen = values.topk(n, largest=not lowest, sorted=False).values
    threshold = chosen.amax() if lowest else chosen.amin()
    # topk breaks ties in no fixed order, so it only gives the threshold.
    beyond = (values < threshold if lowest else values > threshold).nonzero().squeeze(1)
    return beyond, (values == threshold).nonzero().squeeze(1)


# ---------------------------------------------------------------- schedules and verdicts


@dataclass(frozen=True)
class DropFractionSchedule:
    """The fraction of a layer's live weights that a mask update drops; the paper's death rate.

    ``cosine`` and ``linear`` go from ``initial`` to ``minimum`` over ``total_steps`` and stay
    there; ``constant`` stays at ``initial``.
    """

    initial: float
    total_steps: int
    kind: str = "cosine"
    minimum: float = 0.005

    def __post_init__(self) -> None:
        if not 0.0 < self.initial <= 1.0:
            raise ValueError(f"the drop fraction must lie in (0, 1], not {self.initial}")
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
    """What Flying Bird+ adds to a mask update: an extra prune, an extra growth, or both."""

    prune: bool = False
    grow: bool = False


@dataclass
class DensityController:
    """Flying Bird+'s two tests on how training goes (paper, section 3.2).

    ``prune``: (training accuracy - validation RA) rose in at least ``threshold`` of the last
    ``epoch_range`` epoch-to-epoch differences. ``grow``: the validation robust loss did not fall in
    at least that fraction. Fewer differences are used when fewer exist; none means no verdict.
    """

    epoch_range: int = 4
    threshold: float = 0.5
    start_epoch: int = 100
    gaps: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.epoch_range < 1:
            raise ValueError(f"epoch_range counts epochs and is at least 1, not {self.epoch_range}")
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"the threshold is a fraction in (0, 1], not {self.threshold}")

    def observe(self, *, train_ra: float, val_ra: float, val_loss: float) -> None:
        """Add a finished epoch: accuracies in percent, mean robust loss on validation images."""
        self.gaps.append(float(train_ra) - float(val_ra))
        self.val_losses.append(float(val_loss))

    def decide(self, epoch: int) -> Verdict:
        """The verdict during ``epoch`` (from 0), from the epochs observed before it."""
        if epoch < self.start_epoch:
            return Verdict()
        if any(map(math.isnan, [*self.gaps[:epoch], *self.val_losses[:epoch]])):
            raise ValueError("Flying Bird+ needs numbers from every epoch's validation, not NaN")
        rises = [after > before for before, after in self._recent(self.gaps[:epoch])]
        not_falls = [after >= before for before, after in self._recent(self.val_losses[:epoch])]
        return Verdict(prune=self._reached(rises), grow=self._reached(not_falls))

    def _recent(self, values: Sequence[float]) -> list[tuple[float, float]]:
        return list(itertools.pairwise(values))[-self.epoch_range :]

    def _reached(self, held: Sequence[bool]) -> bool:
        return bool(held) and sum(held) / len(held) >= self.threshold


# ---------------------------------------------------------------- prunable weights


_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolutions (1-d to 3-d, transposed), linear layers and attention's projections.

    Biases, norms, free parameters and embeddings are never masked, whatever their shape, except an
    embedding whose table is also the weight of a linear layer; frozen weights (``requires_grad``
    False) are left alone and do not count. A weight that several layers share counts once.

    Raises:
        ValueError: a layer whose weight is computed from others, as by ``weight_norm`` or
            ``torch.nn.utils.prune``: zeros in the trained tensor are not zeros of that weight.
    """
    return _unfrozen(_chosen(model, None))


def _unfrozen(weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in weights.items() if weight.requires_grad}


def _chosen(model: nn.Module, choice: Choice | None) -> dict[str, nn.Parameter]:
    """The weights to mask, frozen ones included, in the model's order."""
    if choice is None:
        wanted = [
            _trained_weight(module, leaf, name)
            for name, module in model.named_modules()
            for leaf in _weight_names(module)
        ]
    elif isinstance(choice, Mapping):
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in choice.items():
            if own.get(name) is not parameter:
                raise ValueError(f"prunable names {name}, which is not a parameter of this model")
            _refuse_unmaskable(model, name, parameter)
        wanted = list(choice.values())
    else:
        asked = [
            (name, p)
            for name, p in model.named_parameters(remove_duplicate=False)
            if isinstance(p, nn.UninitializedParameter) or p.dim() > 1
        ]
        return _chosen(model, {n: p for n, p in asked if choice(n, _layer_of(model, n)[1], p)})
    ids = {id(parameter) for parameter in wanted}
    return {name: p for name, p in model.named_parameters() if id(p) in ids}


def _refuse_unmaskable(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    layer_name, layer, leaf = _layer_of(model, name)
    if _trained_weight(layer, leaf, layer_name) is not parameter:
        raise ValueError(f"{leaf} is computed from {name}, so its zeros do not carry over")
    if parameter.dim() < 2:
        shape = tuple(parameter.shape)
        raise ValueError(f"{name} has the shape {shape}; weights to mask are at least 2-d")


def _layer_of(model: nn.Module, name: str) -> tuple[str, nn.Module, str]:
    """The name of a parameter's layer, the layer, and the attribute computed from the parameter."""
    path, _, leaf = name.rpartition(".")
    before, parametrized, part = f".{path}".rpartition(".parametrizations.")
    if parametrized:
        return before[1:], model.get_submodule(before[1:]), part.partition(".")[0]
    layer = model.get_submodule(path)
    ends = ("_orig", "_g", "_v")  # of torch's older norms and pruning
    plain = next((leaf.removesuffix(end) for end in ends if leaf.endswith(end)), leaf)
    is_weight = hasattr(layer, plain) and not isinstance(getattr(layer, plain), nn.Module)
    return path, layer, plain if is_weight else leaf


def _weight_names(module: nn.Module) -> list[str]:
    if isinstance(module, nn.MultiheadAttention):  # its out_proj is a linear layer itself
        return [leaf for leaf in _ATTENTION_WEIGHTS if getattr(module, leaf) is not None]
    return ["weight"] if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) else []


def _trained_weight(module: nn.Module, leaf: str, name: str) -> nn.Parameter:
    """The parameter behind a layer's weight: the weight itself, or what a spectral norm divides."""
    own = dict(module.named_parameters(recurse=False))
    if isinstance(own.get(leaf), nn.UninitializedParameter):
        advice = "call the model once, and make the optimizer after that"
        problem = f"no weight before its first batch; {advice}"
    elif leaf in own:
        return own[leaf]
    elif hasattr(module, f"{leaf}_mask"):
        advice = f"torch.nn.utils.prune.remove(layer, '{leaf}') makes that permanent"
        problem = f"a mask of torch.nn.utils.prune already; {advice}"
    elif f"{leaf}_orig" in own:  # older spectral norm; attention never runs its hook
        if not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return own[f"{leaf}_orig"]
        advice = "take torch.nn.utils.parametrizations.spectral_norm"
        problem = f"the older spectral_norm, which attention does not compute; {advice}"
    elif f"{leaf}_g" in own:
        advice = "torch.nn.utils.remove_weight_norm removes it"
        problem = f"a weight_norm, whose zeros are not zeros of its weight; {advice}"
    elif nn.utils.parametrize.is_parametrized(module, leaf):
        parts: Any = module.parametrizations[leaf]  # type: ignore[index]
        kinds = [type(part).__name__ for part in parts]
        if kinds == ["_SpectralNorm"]:
            return parts.original
        advice = "torch.nn.utils.parametrize.remove_parametrizations removes that"
        computed = f"computed by {', '.join(kinds).strip('_')}, whose zeros are not its zeros"
        problem = f"a weight {computed}; {advice}"
    else:
        problem = f"a {leaf} that is not a parameter, so it cannot be masked"
    raise ValueError(f"{name or type(module).__name__} has {problem}")  # a model may be one layer


def _refuse_computed(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Raise ``ValueError`` for a layer with its own ``forward`` that multiplies by values computed
    from its weight, e.g. standardized ones, whose zeros are not the weight's."""
    masked = {id(weight) for weight in weights.values()}
    for name, layer in model.named_modules():
        is_own = not type(layer).__module__.startswith("torch.")
        if not (is_own and isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear))):
            continue
        if id(layer._parameters.get("weight")) in masked and not _keeps_zeros(layer):
            what = f"{name or type(layer).__name__} does not multiply by its weight but by"
            raise ValueError(f"{what} values computed from it: its zeros do not carry over")


_PRODUCTS = re.compile(r"(linear|conv(_transpose)?[123]d|_*r?matmul_*|b?mm|(b?add)b?mm)")


class _Multiplied(TorchFunctionMode):
    """Notes, of each tensor shaped like ``weight`` (or its transpose) that a layer multiplies by,
    whether it is zero where the weight is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        zero = weight == 0
        self.zeros = (zero, zero.mT) if zero.dim() == 2 else (zero,)
        self.found: list[bool] = []

    def __torch_function__(
        self, function: Any, types: Any, given: Any = (), named: Any = None
    ) -> Any:
        if _PRODUCTS.fullmatch(getattr(function, "__name__", "")):
            for part in (*given, *(named or {}).values()):
                for zero in self.zeros:
                    if isinstance(part, Tensor) and part.shape == zero.shape:
                        self.found.append(not bool((part.detach()[zero] != 0).any()))
        return function(*given, **(named or {}))


@torch.no_grad()
def _keeps_zeros(layer: Any) -> bool:
    """Whether a layer multiplies by zero where its weight is zero: True as well if it cannot be
    called by itself, or multiplies in another way."""
    if layer.weight.is_meta:
        return True
    try:
        probe = copy.deepcopy(layer)
        probe.eval()
        weight = probe.weight
        drawn = _random_score(weight, 0, "probe") + 0.5
        weight.copy_(drawn.masked_fill(_random_score(weight, 0, "zeros") < 0.5, 0.0))
        images = [2, probe.in_features] if isinstance(probe, nn.Linear) else [2, probe.in_channels]
        if not isinstance(probe, nn.Linear):
            sides = zip(probe.kernel_size, probe.dilation, strict=True)
            images += [2 * dilation * (side - 1) + 1 for side, dilation in sides]
        with _Multiplied(weight.clone()) as seen, _global_draws(0, weight.device):
            type(probe).forward(probe, weight.new_ones(images))  # without hooks
    except Exception:  # takes other inputs than its base class
        return True
    return any(seen.found) or not seen.found


# ---------------------------------------------------------------- first masks


def initial_masks(
    model: nn.Module,
    density: float,
    method: str = "igq",
    *,
    seed: int = 1,
    batches: Sequence[ImagesAndLabels] = (),
    prunable: Choice | None = None,
) -> dict[str, Tensor]:
    """First masks (name -> bool, True is live) with ``round(density * total)`` live weights in all.

    Args:
        model: not changed; scores are computed on a copy.
        density: kept fraction in (0, 1].
        method: a density method (positions drawn at random within the layer's exact count), or a
            score over all layers together: ``magnitude``, ``random_global``, ``snip`` (Lee et al.,
            2019), ``grasp`` (Wang et al., 2020), ``synflow`` (Tanaka et al., 2020). Scored masks
            keep at least one weight per layer, and one per output in the last (the classifier).
        seed: of the random positions, and of the draw among weights whose scores tie.
        batches: images ``[N, C, H, W]`` and labels ``[N]``; ``snip`` and ``grasp`` sum gradients
            over them, ``synflow`` needs only the image shape.
        prunable: which weights, as in ``Masking``.

    Raises:
        ValueError: an unknown method, a density that is bad or too low for that, missing batches,
            no weights to mask, scores that are all zero or not finite.
    """
    _check_density(density)
    weights = _unfrozen(_chosen(model, prunable))
    _refuse_unfit(weights)
    _refuse_computed(model, weights)
    if method in DENSITY_METHODS:
        counts = layer_counts({n: tuple(w.shape) for n, w in weights.items()}, density, method)
        scores = {name: _random_score(w, seed, "init", name) for name, w in weights.items()}
        empty = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in weights.items()}
        return {name: grow_highest(scores[name], empty[name], counts[name]) for name in weights}
    if method not in SCORED_STARTS:
        raise ValueError(f"unknown sparse start {method!r}; known: {', '.join(SPARSE_INITS)}")
    if method in ("snip", "grasp", "synflow") and not batches:
        raise ValueError(f"{method} needs batches of images and labels to score the weights")
    if method == "random_global":
        scores = {name: _random_score(w, seed, "init", name) for name, w in weights.items()}
        return _connected_masks(scores, density)
    tie_key = stream(seed, "ties", method)
    if method == "synflow":
        return _synflow_masks(model, list(weights), density, batches[0][0][:1], tie_key)
    if method == "magnitude":
        scores = {name: w.detach().abs() for name, w in weights.items()}
    else:
        score = _snip_scores if method == "snip" else _grasp_scores
        with _global_draws(stream(seed, method), batches[0][0].device):  # for dropout
            scores = score(model, list(weights), batches)
    _refuse_useless(scores, method)
    return _connected_masks(scores, density, tie_key)


def _refuse_unfit(weights: Mapping[str, nn.Parameter]) -> None:
    if not weights:
        kinds = "no trained convolution, linear layer or attention, or none is chosen"
        raise ValueError(f"the network has no weights to mask: {kinds}")
    sharded = [name for name, weight in weights.items() if hasattr(weight, "device_mesh")]
    if sharded:
        what = "is split over processes (fully_shard), where masks would need all of it"
        raise ValueError(f"{sharded[0]} {what}; DistributedDataParallel works")


def _refuse_useless(scores: Mapping[str, Tensor], method: str) -> None:
    """Raise ``ValueError`` for scores that would silently give arbitrary masks."""
    broken = [name for name, score in scores.items() if not bool(score.isfinite().all())]
    if broken:
        what = f"scores the weights of {', '.join(broken)} with values that are not finite"
        raise ValueError(f"{method} {what}: check the weights and the batches")
    if not any(bool(score.any()) for score in scores.values()):
        why = "the loss on these batches, or the output, does not depend on them"
        raise ValueError(f"{method} scores every weight with zero: {why}")


def _connected_masks(
    scores: Mapping[str, Tensor], density: float, tie_key: int | None = None
) -> dict[str, Tensor]:
    """``global_masks`` that keep each layer's highest weight, and in the last layer (the
    classifier) the highest of each output.

    A layer that starts empty lets nothing through, so it never gets a gradient to grow by.
    """
    masks = global_masks(scores, density, tie_key=tie_key)
    *_, classifier = scores
    lacking = {
        name: ~mask.flatten(1).any(dim=1) if name == classifier else ~mask.any().view(1)
        for name, mask in masks.items()
    }
    if not any(bool(rows.any()) for rows in lacking.values()):
        return masks
    least = len(scores) - 1 + len(lacking[classifier])
    if round(density * sum(score.numel() for score in scores.values())) < least:
        raise _too_few(density, f"one a layer and one for each output of {classifier}, {least}")
    # The rows are views, which need a contiguous tensor, not a channels-last one.
    plain = torch.contiguous_format
    raised = {name: score.clone(memory_format=plain) for name, score in scores.items()}
    for name, score in raised.items():
        rows = score.view(len(lacking[name]), -1)
        rows.scatter_(1, rows.argmax(dim=1, keepdim=True), float("inf"))
    return global_masks(raised, density, tie_key=tie_key)


def global_masks(
    scores: Mapping[str, Tensor], density: float, *, tie_key: int | None = None
) -> dict[str, Tensor]:
    """Keep the highest scores over all layers together, ``round(density * total)`` in all.

    Ties go to the earlier layer, or are drawn with ``tie_key`` as in ``grow_highest``. Raises
    ``ValueError`` for a bad density, and for one that leaves fewer weights than layers.
    """
    _check_density(density)
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    live = round(density * flat.numel())
    if live < len(scores):
        raise _too_few(density, f"the network has layers ({len(scores)})")
    kept = grow_highest(flat, torch.zeros_like(flat, dtype=torch.bool), live, tie_key=tie_key)
    parts = kept.split([score.numel() for score in scores.values()])
    shapes = [score.shape for score in scores.values()]
    return {n: part.view(shape) for n, part, shape in zip(scores, parts, shapes, strict=True)}


def _random_score(weight: Tensor, seed: int, *names: int | str) -> Tensor:
    counter = torch.arange(weight.numel(), device=weight.device)
    return uniform(stream(seed, *names), counter).view(weight.shape)


def _copied(
    model: nn.Module, names: Sequence[str], x: Tensor
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the model to score, and its weights ``names``; raises ``ValueError`` if the copy
    computes with weights of the original for the images ``x``."""
    # A forward pass may leave tensors with a history, as the older spectral norm does; deepcopy
    # refuses those, so they are detached.
    left = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    copied = copy.deepcopy(model, {id(value): value.detach().clone() for value in left})
    copied.eval()
    if depends_on(copied(x), model):
        problem = "a copy of the network computes with the original's weights, as its functions"
        raise ValueError(f"{problem} hold on to them (a lambda over self?), so it cannot be scored")
    own = dict(copied.named_parameters())
    return copied, {name: own[name] for name in names}


def depends_on(output: Any, model: nn.Module) -> bool:
    """Whether ``output`` was computed with trained parameters of ``model``."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not isinstance(output, Tensor) or not output.requires_grad or not trained:
        return False
    gradients = torch.autograd.grad(output.sum(), trained, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


def _gradients(
    output: Tensor, weights: Mapping[str, Tensor], create_graph: bool = False
) -> list[Tensor]:
    """Gradients of a scalar; zeros for weights that it does not depend on."""
    inputs = list(weights.values())
    grad = functools.partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
    return list(grad(output, inputs, create_graph=create_graph))


def _summed_gradients(outputs: Iterable[Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
    totals = [torch.zeros_like(w) for w in weights.values()]
    for output in outputs:
        torch._foreach_add_(totals, _gradients(output, weights))
    return totals


def _snip_scores(
    model: nn.Module, names: Sequence[str], batches: Sequence[ImagesAndLabels]
) -> dict[str, Tensor]:
    """|w * dL/dw| with the loss summed over all batches."""
    model, weights = _copied(model, names, batches[0][0])
    model.train()
    losses = (F.cross_entropy(model(x), y, reduction="sum") for x, y in batches)
    gradients = _summed_gradients(losses, weights)
    return {n: (w.detach() * g).abs() for (n, w), g in zip(weights.items(), gradients, strict=True)}


def _grasp_scores(
    model: nn.Module, names: Sequence[str], batches: Sequence[ImagesAndLabels]
) -> dict[str, Tensor]:
    """w * (H g), the gradient flow lost with a weight (highest kept); logits are divided by 200."""
    model, weights = _copied(model, names, batches[0][0])
    model.train()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x) / _GRASP_TEMPERATURE, y, reduction="sum")

    totals = _summed_gradients((loss(x, y) for x, y in batches), weights)

    def flow(x: Tensor, y: Tensor) -> Tensor:
        gradients = _gradients(loss(x, y), weights, create_graph=True)
        return torch.stack([(g * t).sum() for g, t in zip(gradients, totals, strict=True)]).sum()

    products = _summed_gradients((flow(x, y) for x, y in batches), weights)
    return {name: w.detach() * hg for (name, w), hg in zip(weights.items(), products, strict=True)}


def _synflow_masks(
    model: nn.Module, names: Sequence[str], density: float, x: Tensor, tie_key: int
) -> dict[str, Tensor]:
    """100 rounds of keeping the highest |w * dR/dw|; R is the summed output for an input of ones,
    with all weights made positive."""
    ones = torch.ones_like(x, dtype=next(model.parameters()).dtype)
    model, _ = _copied(model, names, ones)
    # float64: in a deep positive network the products span more than float32 holds.
    own = dict(model.double().named_parameters())
    weights = {name: own[name] for name in names}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    ones = torch.ones_like(x, dtype=torch.float64)
    normalize = getattr(model, "normalize", None)
    if normalize is not None:  # so that the first convolution sees ones
        ones = ones * normalize.std.view(1, -1, 1, 1) + normalize.mean.view(1, -1, 1, 1)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for done in range(1, _SYNFLOW_ROUNDS + 1):
        gradients = zip(weights.items(), _gradients(model(ones).sum(), weights), strict=True)
        scores = {name: (w.detach() * g).abs() for (name, w), g in gradients}
        if done == 1:
            _refuse_useless(scores, "synflow")
        # A removed weight stays removed: it ranks below those that score zero.
        scores = {name: score.masked_fill(~masks[name], -1.0) for name, score in scores.items()}
        masks = _connected_masks(scores, density ** (done / _SYNFLOW_ROUNDS), tie_key)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])
    return masks


# ---------------------------------------------------------------- the optimizer's state


_MOMENTA = ("momentum_buffer", "exp_avg")  # as torch's optimizers name them
# Averages that only scale a step. They cannot revive a dead weight, and a layer whose step is
# scaled as a whole, or by rows, needs those of dead weights.
_SCALES = (
    *("exp_avg_sq", "max_exp_avg_sq", "exp_inf"),  # the Adam family
    *("square_avg", "grad_avg"),  # RMSprop; the second is subtracted from the first
    *("acc_delta", "sum", "row_var", "col_var", "variance"),  # Adadelta, Adagrad, Adafactor
)
_ELEMENTWISE = (*_MOMENTA, *_SCALES, "ax", "z", "slow_buffer", "exp_avg_slow")
_MOMENTUM_NEEDED = (
    "momentum growth needs an optimizer with momentum: SGD or RMSprop with momentum=, or one of the"
    " Adam family"
)
_NO_MOMENTUM = (
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.ASGD,
    torch.optim.LBFGS,
    torch.optim.Rprop,
)


class _OptimizerState:
    """The state that an optimizer, and those that it wraps, keep of the weights. It is masked too:
    momentum would bring masked weights back."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
    ) -> None:
        self._optimizers = _with_wrapped(optimizer)
        self._model = model
        self._weights = weights

    def refuse_other(self) -> None:
        """Raise ``ValueError`` if the optimizer lacks a weight, e.g. if it is of a copy, or keeps a
        state that masks would spoil."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError("LBFGS keeps one history of all weights, which cannot be masked")
            if isinstance(optimizer, torch.optim.Rprop):
                raise ValueError("Rprop keeps a step size of each weight, which masks would reset")
        trained = {id(parameter) for _, group in self._groups() for parameter in group["params"]}
        for name, weight in self._weights.items():
            if id(weight) not in trained:
                advice = "make it of this model's parameters, after the model is complete"
                raise ValueError(f"the optimizer does not hold {name}: {advice}")

    def call_after_step(self, call: Callable[..., None]) -> list[Any]:
        """Have the optimizers call after each step; returns handles that end it."""
        able = [o for o in self._optimizers if hasattr(o, "_optimizer_step_post_hooks")]
        return [optimizer.register_step_post_hook(call) for optimizer in able]

    def refuse_without_momentum(self) -> None:
        """Raise ``ValueError`` if the optimizer will keep no momentum; unknown ones pass."""
        for name, weight in self._weights.items():
            if self._keeps_momentum(weight) is False:
                raise ValueError(f"{_MOMENTUM_NEEDED}; that of {name} has none")

    def refuse_hidden(self) -> None:
        """Raise ``ValueError`` for weight-shaped tensors outside of ``state[weight]``."""
        like = {tuple(weight.shape): name for name, weight in self._weights.items()}
        masked = {id(weight) for weight in self._weights.values()}
        trained = (parameter for _, group in self._groups() for parameter in group["params"])
        parameters = [*self._model.parameters(), *trained]
        known = {id(p) for p in parameters} | {id(p.grad) for p in parameters if p.grad is not None}
        states = {id(getattr(optimizer, "state", None)) for optimizer in self._optimizers}
        for optimizer in self._optimizers:
            for held in getattr(optimizer, "__dict__", {}).values():
                # Only ``state`` is masked, so other mappings are searched under masked weights too.
                passed = known if id(held) in states else known - masked
                for part in _leaves(held, passed):
                    if isinstance(part, Tensor) and id(part) not in known:
                        _refuse_like(part, like, optimizer)

    def warn_of_square(self) -> None:
        """Warn of a state that is masked like momentum, although it may be a matrix that multiplies
        the gradient of a square weight."""
        for optimizer in self._optimizers:
            if type(optimizer).__module__.startswith("torch."):
                continue
            for name, weight in self._weights.items():
                state = _named(getattr(optimizer, "state", {}).get(weight, {}))
                keys = [key for key in state if key not in _ELEMENTWISE]
                parts = [key for key in keys for part in _leaves(state[key]) if _fits(part, weight)]
                if weight.dim() == 2 and weight.shape[0] == weight.shape[1] and parts:
                    kept = ", ".join(map(str, dict.fromkeys(parts)))
                    what = f"{type(optimizer).__name__} keeps {kept} of {name}"
                    why = "shaped like it and so masked like momentum, which ruins a preconditioner"
                    warnings.warn(f"{what}, {why}", stacklevel=4)
                    return

    def of(self, name: str) -> list[Tensor]:
        """The state's tensors shaped like the weight that could revive dead weights; raises
        ``ValueError`` for integer ones."""
        weight = self._weights[name]
        parts = [
            part
            for state in self._states(weight)
            for key, held in _named(state).items()
            if key not in _SCALES
            for part in _leaves(held)
        ]
        found = [part for part in parts if _fits(part, weight)]
        for tensor in found:
            if not tensor.is_floating_point():  # quantized: the code 0 need not mean 0
                kept = f"its state of {name} in {tensor.dtype}, which cannot be masked"
                raise ValueError(f"the optimizer keeps {kept}; take one that keeps floats")
        return found

    def momentum(self, name: str) -> Tensor | None:
        """The momentum of a weight; None before the first step that uses it.

        Raises:
            ValueError: an optimizer without momentum, or whose momentum is not shaped like the
                weight.
        """
        weight = self._weights[name]
        states = [state for state in self._states(weight) if state]
        # Sums of squares, as of Adagrad and RMSprop, have no direction.
        momenta = [state[key] for state in states for key in _MOMENTA if key in state]
        momentum = next((held for held in momenta if isinstance(held, Tensor)), None)
        if momentum is None:
            if states or not self._keeps_momentum(weight):
                raise ValueError(f"{_MOMENTUM_NEEDED}; that of {name} has none")
        elif momentum.shape != weight.shape or not momentum.is_floating_point():
            needed = f"a momentum shaped like {name}, in floats"
            kept = f"{momentum.dtype} {tuple(momentum.shape)}"
            raise ValueError(f"momentum growth needs {needed}; the optimizer keeps {kept}")
        return momentum

    def _keeps_momentum(self, weight: Tensor) -> bool | None:
        """Whether one of the optimizers will keep momentum; None if none of them is known."""
        answers = {
            _keeps_momentum(optimizer, group)
            for optimizer, group in self._groups()
            if any(parameter is weight for parameter in group["params"])
        }
        return next((answer for answer in (True, False) if answer in answers), None)

    def _groups(self) -> list[tuple[Any, dict[str, Any]]]:
        return [(o, group) for o in self._optimizers for group in getattr(o, "param_groups", [])]

    def _states(self, weight: Tensor) -> list[Mapping[str, Any]]:
        return [getattr(optimizer, "state", {}).get(weight, {}) for optimizer in self._optimizers]


def _keeps_momentum(optimizer: Any, group: Mapping[str, Any]) -> bool | None:
    if "momentum" in group:
        return bool(group["momentum"])
    if "betas" in group:
        return True
    return False if isinstance(optimizer, _NO_MOMENTUM) else None


def _named(state: Any) -> Mapping[Any, Any]:
    return state if isinstance(state, Mapping) else {"state": state}


def _fits(part: Any, weight: Tensor) -> bool:
    return isinstance(part, Tensor) and part.shape == weight.shape


def _refuse_like(part: Tensor, like: Mapping[tuple[int, ...], str], optimizer: Any) -> None:
    name = like.get(tuple(part.shape))
    if name is not None:
        where = f"tensors of the shape of {name} outside of state[weight]"
        problem = f"{type(optimizer).__name__} keeps {where}, where they cannot be masked"
        raise ValueError(f"{problem}; take an optimizer that keeps them there")


def _with_wrapped(optimizer: Any) -> list[Any]:
    """An optimizer and those that it wraps: in its attributes, or in lists and dicts there."""
    found = [optimizer]
    for outer in found:  # found grows in the loop
        for part in _leaves(getattr(outer, "__dict__", {})):
            if hasattr(part, "param_groups") and all(part is not known for known in found):
                found.append(part)
    return found


def _leaves(held: Any, passed: Collection[int] = ()) -> Iterator[Any]:
    """The leaves of nested containers, except under keys whose ids are in ``passed``."""
    if isinstance(held, Mapping):
        parts: Iterable[Any] = [part for key, part in held.items() if id(key) not in passed]
    elif isinstance(held, (list, tuple, deque)):
        parts = held
    else:
        yield held
        return
    for part in parts:
        yield from _leaves(part, passed)


# ---------------------------------------------------------------- masks in training


@dataclass(frozen=True)
class MaskingConfig:
    """How a network is kept sparse while it trains. Defaults are the paper's.

    Attributes:
        density: kept fraction of the prunable weights at the start, in (0, 1].
        total_steps: optimizer steps of the whole run; the drop fraction's schedule spans them.
        sparse_init: one of ``SPARSE_INITS``.
        fixed: keep the first masks (static sparsity).
        growth: one of ``GROWTHS``: ``random``, ``gradient`` (largest |gradient| of the last batch)
            or ``momentum``.
        drop_fraction, drop_schedule: initial fraction of a layer's live weights that an update
            drops and regrows, and how it falls (one of ``SCHEDULES``).
        update_frequency: optimizer steps between updates; ``second_frequency`` replaces it
            after half of ``total_steps``.
        adaptive: Flying Bird+, whose density follows the verdicts of a ``DensityController`` with
            ``start_epoch``, ``epoch_range`` and ``update_threshold``.
        prune_ratio, growth_ratio: sizes of Flying Bird+'s extra prune and extra growth.
        seed: of random positions and of draws among ties.
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
        for what, value, known in [
            ("sparse start", self.sparse_init, SPARSE_INITS),
            ("growth", self.growth, GROWTHS),
        ]:
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")
        counts = (self.total_steps, self.update_frequency, self.second_frequency or 1)
        if any(int(count) != count for count in counts):
            raise ValueError(f"numbers of steps must be whole: {', '.join(map(str, counts))}")
        if min(counts[1:]) < 1 or self.second_frequency == 0:
            raise ValueError("update frequencies count optimizer steps and are at least 1")
        if self.prune_ratio < 0 or self.growth_ratio < 0:
            raise ValueError("prune_ratio and growth_ratio must not be negative")
        if self.adaptive and self.fixed:
            raise ValueError("fixed masks cannot adapt their density")


def update_is_due(config: MaskingConfig, step: int) -> bool:
    """Whether a mask update is due after ``step`` optimizer steps (from 1)."""
    if config.fixed:
        return False
    second = config.second_frequency if 2 * step > config.total_steps else None
    return step % (second or config.update_frequency) == 0


class Course:
    """The course of masks in training, of weights or of channels: steps, epochs and updates."""

    def __init__(self, config: MaskingConfig) -> None:
        self.config = config
        self.steps = 0
        self.events: list[dict[str, Any]] = []
        self.controller = DensityController(
            config.epoch_range, config.update_threshold, config.start_epoch
        )
        self.schedule = DropFractionSchedule(
            config.drop_fraction, config.total_steps, config.drop_schedule
        )

    def update_due(self) -> bool:
        """Whether a mask update is due after the step just counted."""
        return update_is_due(self.config, self.steps)

    @property
    def epoch(self) -> int:
        """The current epoch from 0: the number of epochs observed."""
        return len(self.controller.gaps)

    def observe(self, *, train_ra: float, val_ra: float, val_loss: float) -> None:
        """Add a finished epoch: accuracies in percent, mean robust loss on validation images."""
        self.controller.observe(train_ra=train_ra, val_ra=val_ra, val_loss=val_loss)

    def verdict(self) -> Verdict:
        """What an update now adds, in this epoch."""
        return self.controller.decide(self.epoch) if self.config.adaptive else Verdict()

    def _add_event(self, verdict: Verdict, density: float) -> None:
        now = {"step": self.steps, "epoch": self.epoch}
        rates = {"drop_fraction": self.schedule.at(self.steps), **vars(verdict), "density": density}
        self.events.append(now | rates)

    def _course(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "gaps": list(self.controller.gaps),
            "val_losses": list(self.controller.val_losses),
            "events": [dict(event) for event in self.events],
        }

    def _load_course(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.controller.gaps = [float(gap) for gap in state["gaps"]]
        self.controller.val_losses = [float(loss) for loss in state["val_losses"]]
        self.events = [dict(event) for event in state["events"]]


class Masking(Course):
    """Keeps a network sparse: holds, updates, saves and restores its masks.

    The network stays plain: dense tensors whose dead weights are zero, so ``param.grad`` is the
    dense gradient that growth needs. ``masks`` maps names to bool tensors shaped like ``weights``,
    the prunable ones.

    Args:
        model: its prunable weights (``prunable``) are masked in place at once.
        optimizer: momentum, every weight-shaped tensor in its state that does not only scale steps,
            is masked too, also in that of optimizers it wraps.
        config: see ``MaskingConfig``.
        masks: the first masks, instead of ``config.sparse_init``, e.g. a Robust Bird ticket.
        batches: images and labels, for first masks that score weights on data.
        prunable: which weights to mask, instead of those of the function ``prunable``: a mapping of
            the model's own names to parameters, or a function ``(name, layer, parameter) -> bool``
            called for every parameter of two or more dimensions, where ``layer`` is the module that
            computes with it. Frozen ones are left alone.
        compare: whether the processes of ``torch.distributed`` compare their masks at the first
            step and after each update; False for processes that train different networks.

    Raises:
        ValueError: masks that do not fit the network, an optimizer that does not train it or has no
            momentum for ``momentum`` growth, weights that are computed from others or have one
            dimension, or first masks without the batches they need; while training, an optimizer
            that keeps weight-shaped tensors where they cannot be masked, weights that were
            replaced, or masks that differ between processes.

    Warns if masks that are not ``fixed`` would never change in ``total_steps``, about frozen
    layers, recurrent ones and many other weights left dense, weights that other masks have pruned,
    and once about each layer without a live weight; while training, if masks or the optimizer are
    stepped in the wrong order, if updates find no gradients or momentum, and about layers that were
    added or thawed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: MaskingConfig,
        *,
        masks: Mapping[str, Tensor] | None = None,
        batches: Sequence[ImagesAndLabels] = (),
        prunable: Choice | None = None,
        compare: bool = True,
    ) -> None:
        super().__init__(config)
        chosen = _chosen(model, prunable)
        self.weights = weights = _unfrozen(chosen)
        self._state = _OptimizerState(optimizer, model, weights)
        self._model, self._chooses = model, prunable is None
        self._compares = compare
        self._is_checked = False  # by the first step after this or after loading a state
        self._postponed = False  # a due update found no usable gradients or momentum
        self._has_warned = False  # of such updates
        self._known_dead: set[str] = set()
        _refuse_unfit(weights)
        frozen = [name for name in chosen if name not in weights]
        if frozen:  # which a caller may expect to be masked
            named = ", ".join(frozen)
            warnings.warn(f"frozen layers are left alone and do not count: {named}", stacklevel=2)
        if prunable is None:
            _warn_of_unmasked(model, weights)
        self._state.refuse_other()
        if config.growth == "momentum" and not config.fixed:
            self._state.refuse_without_momentum()
        if masks is None:
            masks = initial_masks(
                model,
                config.density,
                config.sparse_init,
                seed=config.seed,
                batches=batches,
                prunable=weights,
            )
        else:
            _refuse_computed(model, weights)
        self._set_masks(masks)
        self._explored = {name: mask.clone() for name, mask in self.masks.items()}
        counts = self.live_counts()
        _warn_of_idle_updates(
            config, is_full=sum(counts.values()) == sum(map(torch.numel, masks.values()))
        )
        self._warn_of_dead(counts)
        self._warn_of_other_masks(counts)
        self.apply()
        self._has_stepped: list[Any] = []  # filled by the optimizer's first step
        self._hooks = self._state.call_after_step(functools.partial(_note, self._has_stepped))

    # ---- every step

    def step(self) -> None:
        """Apply the masks, and update them when due; call after each ``optimizer.step()``, before
        gradients are cleared."""
        self.steps += 1
        if not self._is_checked:
            self._is_checked = True
            self._check_model()
            self._state.refuse_hidden()
            self._state.warn_of_square()
            self._warn_of_order()
            self._refuse_other_processes()
        due, was_postponed = self.update_due(), self._postponed
        self._postponed = due and self.config.growth in _SIGNALS and not self._signals_are_useful()
        if self._postponed and was_postponed and super().update_due():
            self._warn_of_postponed()
        if due and not self._postponed:
            self.update_topology()
        else:
            self.apply()

    def update_due(self) -> bool:
        """Whether a mask update is due after the step just counted; a postponed one stays due."""
        return self._postponed or super().update_due()

    def _signals_are_useful(self) -> bool:
        """Whether gradients or momentum are finite, and not zero at all dead weights; after a step
        that a gradient scaler skipped they are not.

        Zeros are useful, too, while an empty layer lets nothing through: then the draw among ties
        decides.
        """
        signals = self._signals()
        if not signals and self.config.growth == "momentum":  # no step was made yet
            return False
        self._required(signals)
        finite = torch.stack([signal.isfinite().all() for signal in signals.values()]).all()
        dead = [(signal, self._dead[name]) for name, signal in signals.items()]
        moves = torch.stack([((signal != 0) & where).any() for signal, where in dead]).any()
        emptied = torch.stack([~mask.any() for mask in self.masks.values()]).any()
        full = torch.stack([mask.all() for mask in self.masks.values()]).all()
        return bool(finite & (moves | emptied | full))

    def _signals(self) -> dict[str, Tensor]:
        found = {name: _SIGNALS[self.config.growth](self, name) for name in self.weights}
        signals = {name: signal for name, signal in found.items() if signal is not None}
        if sparse := [name for name, signal in signals.items() if signal.is_sparse]:
            raise ValueError(f"{', '.join(sparse)}: sparse gradients cannot say which weights grow")
        return signals

    def _required(self, signals: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not signals:
            needed = {
                "gradient": "the gradients of the last batch: update masks before zero_grad()",
                "momentum": "a step of the optimizer before the masks are updated",
            }[self.config.growth]
            raise ValueError(f"{self.config.growth} growth needs {needed}")
        return signals

    @torch.no_grad()
    def apply(self) -> None:
        """Set dead weights and their momentum to zero, in place."""
        for name, weight in self.weights.items():
            for tensor in (weight, *self.moments(name)):
                # Not multiplied by 0, which would turn an infinite value into NaN.
                tensor.masked_fill_(self._dead[name], 0.0)

    def moments(self, name: str) -> Iterable[Tensor]:
        """The tensors shaped like a layer's weight in the state of the optimizer and of those it
        wraps, e.g. SGD's momentum; averages that only scale steps are left out."""
        return self._state.of(name)

    # ---- every update

    @torch.no_grad()
    def update_topology(self) -> None:
        """Drop and grow in every layer that is not fully dense, by the current schedule and
        verdict.

        Called by ``step`` when due. Needs the gradients of the last batch for ``gradient`` growth
        and the optimizer's momentum, not yet masked, for ``momentum`` growth. Where scores tie, the
        seed draws.

        A layer without live weights has none to drop, so it would never grow any. It grows one, and
        the layer with the most live weights (one that is not fully dense, if there is one) gives
        one up, so the total stays exact.
        """
        self._check_model()
        self._state.refuse_hidden()
        if self.config.growth in _SIGNALS:
            self._required(self._signals())  # raises if no layer has one: nothing would move
        verdict, fraction = self.verdict(), self.schedule.at(self.steps)
        counts = self.live_counts()  # waits for the device once
        self._warn_of_dead(counts)
        changes = {name: self._change(name, counts[name], fraction, verdict) for name in counts}
        self._revive(changes, counts)
        updated = {name: self._update_layer(name, *change) for name, change in changes.items()}
        # The old masks first: grown weights start at zero, and a weight dropped and regrown at once
        # keeps its value.
        self.apply()
        self._set_masks(updated)
        for name, mask in self.masks.items():
            self._explored[name] |= mask
        self.apply()
        self._add_event(verdict, self.density())
        self._refuse_other_processes()

    def _change(self, name: str, live: int, fraction: float, verdict: Verdict) -> tuple[int, int]:
        """How many weights a layer drops and then grows."""
        size = self.masks[name].numel()
        if live == size or not self._can_grow(name):
            return 0, 0
        n_drop = min(live, math.ceil(fraction * live))
        n_prune = math.ceil(fraction * self.config.prune_ratio * live) if verdict.prune else 0
        n_grow = int(n_drop * (1 + self.config.growth_ratio)) if verdict.grow else n_drop
        n_dropped = min(live, n_drop + n_prune)
        return n_dropped, min(n_grow, size - live + n_dropped)

    def _can_grow(self, name: str) -> bool:
        """False for a frozen or unused layer, which has no gradient or momentum to grow by and
        keeps its mask."""
        if not self.weights[name].requires_grad:
            return False
        signal = _SIGNALS.get(self.config.growth)
        if signal is not None:
            return signal(self, name) is not None
        # Random growth also works after zero_grad(), when no layer has a gradient.
        gradients = {other: weight.grad for other, weight in self.weights.items()}
        return gradients[name] is not None or all(g is None for g in gradients.values())

    def _revive(self, changes: dict[str, tuple[int, int]], counts: Mapping[str, int]) -> None:
        """Let each layer left without a live weight grow one, which the layer with the most live
        weights gives up."""
        after = {
            name: counts[name] - dropped + grown
            for name, (dropped, grown) in changes.items()
            if self._can_grow(name)
        }

        def rank(name: str) -> tuple[bool, bool, int]:
            return after[name] > 1, counts[name] < self.masks[name].numel(), after[name]

        for name in [name for name, live in after.items() if live == 0]:
            giver = max(after, key=rank)
            if after[giver] < 2:
                return
            dropped, grown = changes[giver]
            changes[giver] = (dropped, grown - 1) if grown else (dropped + 1, 0)
            changes[name] = (0, 1)
            after[giver], after[name] = after[giver] - 1, 1

    def _update_layer(self, name: str, n_drop: int, n_grow: int) -> Tensor:
        mask, growth, seed = self.masks[name], self.config.growth, self.config.seed
        if n_drop == n_grow == 0:
            return mask
        # The scores of random growth are draws themselves: their few ties may go by index.
        tie_key = None if growth == "random" else stream(seed, "ties", self.steps, name)
        kept = drop_lowest(self.weights[name].abs(), mask, n_drop)
        return grow_highest(GROWTHS[growth](self, name), kept, n_grow, tie_key=tie_key)

    def _warn_of_dead(self, counts: Mapping[str, int]) -> None:
        dead = [n for n, live in counts.items() if live == 0 and n not in self._known_dead]
        self._known_dead |= set(dead)
        if dead:
            fixed = self.config.fixed
            then = "fixed masks leave it so" if fixed else "a mask update lets each grow one"
            what = f"layers without a live weight let nothing through, {then}: {', '.join(dead)}"
            warnings.warn(what, stacklevel=3)

    def _warn_of_other_masks(self, counts: Mapping[str, int]) -> None:
        """Masks put on weights that others have pruned would leave few of both."""
        for name, weight in self.weights.items():
            if weight.is_meta:  # it has no values
                return
            nonzero = weight.detach() != 0
            kept = int((nonzero & self.masks[name]).sum())
            if 2 * kept < min(counts[name], int(nonzero.sum())):
                what = f"{name} is sparse already, and these masks keep {kept} of its weights"
                advice = "load a checkpoint after making the Masking, or give its masks="
                warnings.warn(f"{what}: {advice}", stacklevel=3)
                return

    def _check_model(self) -> None:
        """The model may have changed: replaced weights are refused, others are warned of, once."""
        own = dict(self._model.named_parameters(remove_duplicate=False))
        for name, weight in self.weights.items():
            if own.get(name) is not weight:
                problem = f"{name} of the model is no longer the parameter that is masked"
                raise ValueError(f"{problem}: replace parameters before making the Masking")
        if not self._chooses:
            return
        masked = {id(weight) for weight in self.weights.values()}
        layers = [(n, m, leaf) for n, m in self._model.named_modules() for leaf in _weight_names(m)]
        free = [
            f"{name}.{leaf}".lstrip(".")
            for name, layer, leaf in layers
            if (weight := layer._parameters.get(leaf)) is not None
            and weight.requires_grad
            and id(weight) not in masked
        ]
        if free:
            self._chooses = False
            what = f"{', '.join(free)} appeared or thawed after the Masking was made and stay dense"
            warnings.warn(f"{what}: make a new one to mask them", stacklevel=4)

    def _refuse_other_processes(self) -> None:
        """Raise ``ValueError`` if another process has other masks: gradients that processes share
        would train different networks."""
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self._compares and shared and torch.distributed.get_world_size() > 1):
            return
        on_gpu = torch.distributed.get_backend() == "nccl"
        device = next(iter(self.weights.values())).device if on_gpu else "cpu"
        mine = torch.tensor([mask_hash(self.masks)], device=device)
        found = [torch.zeros_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(found, mine)
        if len({int(other) for other in found}) > 1:
            needed = "each needs the same weights, seed, first batches and observed figures"
            advice = "compare=False if they train different networks"
            raise ValueError(f"masks differ between processes: {needed}; {advice}")

    def _warn_of_order(self) -> None:
        """The first step shows whether the optimizer has stepped before the masks."""
        gradients = [w.grad for w in self.weights.values() if w.grad is not None]
        is_unknown = not self._hooks  # of an optimizer that does not say when it steps
        self._remove_hooks()
        if is_unknown or self._has_stepped or not gradients:
            return
        if all(bool(g.isfinite().all()) for g in gradients) and any(map(Tensor.any, gradients)):
            order = "masking.step() belongs after optimizer.step(), which has not been called"
            warnings.warn(order, stacklevel=3)

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _warn_of_postponed(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            growth = self.config.growth
            what = f"no mask update since step {self.events[-1]['step'] if self.events else 0}"
            why = f"{growth} growth finds only zeros at dead weights, or values not finite"
            advice = "call masking.step() before zero_grad(), and do not mask gradients"
            warnings.warn(f"{what}: {why}; {advice}", stacklevel=3)

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        if {name: mask.shape for name, mask in masks.items()} != shapes:
            raise ValueError("the masks do not fit the network: names or shapes differ")
        # On the weights' device and in their memory layout, so that applying masks is one pass.
        self.masks = {
            name: torch.empty_like(weight, dtype=torch.bool, requires_grad=False).copy_(masks[name])
            for name, weight in self.weights.items()
        }
        self._dead = {name: ~mask for name, mask in self.masks.items()}

    # ---- queries, state

    def density(self) -> float:
        """Live fraction of all prunable weights."""
        return sum(self.live_counts().values()) / sum(mask.numel() for mask in self.masks.values())

    def live_counts(self) -> dict[str, int]:
        """Live weights of each layer."""
        counts = torch.stack([mask.sum() for mask in self.masks.values()]).tolist()
        return dict(zip(self.masks, counts, strict=True))

    def explored_fraction(self) -> float:
        """Fraction of the prunable weights that have ever been live."""
        explored = torch.stack([seen.sum() for seen in self._explored.values()]).sum().item()
        return explored / sum(seen.numel() for seen in self._explored.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes in training, as tensors and plain values, all copied; raises
        ``ValueError`` if the model no longer has the masked weights."""
        self._check_model()
        postponed = {"put_off": True} if self._postponed else {}
        return postponed | {
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "explored": {name: seen.clone() for name, seen in self._explored.items()},
            **self._course(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a ``state_dict`` and apply its masks; raises ``ValueError`` for one of another
        network."""
        self._set_masks(state["masks"])
        explored = state["explored"]
        self._explored = {n: explored[n].to(mask.device).clone() for n, mask in self.masks.items()}
        self._load_course(state)
        self._remove_hooks()  # the first step was made before it was saved
        self._is_checked = False
        self._postponed = bool(state.get("put_off", False))
        self._warn_of_dead(self.live_counts())
        self.apply()


_MUCH = 0.1  # unmasked weights that the user is told of, as a fraction of the masked ones


def _note(noted: list[Any], *given: Any) -> None:
    noted.append(True)


def _warn_of_unmasked(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    kinds = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
    left = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    embeddings = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    known = {id(p) for p in (*weights.values(), *(e.weight for e in embeddings))}
    free = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.dim() > 1
        and id(parameter) not in known
        and name.rpartition(".")[0] not in left
    }
    if sum(free.values()) > _MUCH * sum(weight.numel() for weight in weights.values()):
        left += free
    if left:
        what = f"only convolutions, linear layers and attention are masked, not {', '.join(left)}"
        warnings.warn(f"{what}; prunable= chooses weights", stacklevel=3)


def _warn_of_idle_updates(config: MaskingConfig, *, is_full: bool) -> None:
    steps = range(1, int(config.total_steps) + 1)
    if is_full and not config.fixed:
        warnings.warn("every weight is live, so no mask will ever change", stacklevel=3)
    elif not config.fixed and not any(update_is_due(config, step) for step in steps):
        problem = f"update_frequency={config.update_frequency} no mask update falls into"
        advice = "a smaller one moves the masks, fixed=True keeps them on purpose"
        # stacklevel: the warning names the line that creates the Masking.
        warnings.warn(f"with {problem} {config.total_steps} steps; {advice}", stacklevel=3)
    elif config.drop_schedule == "constant" and update_is_due(config, int(config.total_steps)):
        what = f"an update follows the last of total_steps={config.total_steps}"
        warnings.warn(
            f"{what}, and what it grows stays zero; a few steps more avoid this, and a schedule"
            " that falls makes it small",
            stacklevel=3,
        )


def _random_growth(masking: Masking, name: str) -> Tensor:
    return _random_score(masking.weights[name], masking.config.seed, "grow", masking.steps, name)


def _signal_growth(masking: Masking, name: str) -> Tensor:
    signal = _SIGNALS[masking.config.growth](masking, name)
    return masking._required({} if signal is None else {name: signal})[name].abs()


# The tensor that a growth rule ranks by, shaped like a layer's weight; None for an unused layer.
_SIGNALS: dict[str, Callable[[Masking, str], Tensor | None]] = {
    "gradient": lambda masking, name: masking.weights[name].grad,
    "momentum": lambda masking, name: masking._state.momentum(name),
}

# Growth rules: (masking, layer name) -> scores shaped like the layer's weight; the dead positions
# of highest score grow.
GROWTHS: dict[str, Callable[[Masking, str], Tensor]] = {
    "random": _random_growth,
    "gradient": _signal_growth,
    "momentum": _signal_growth,
}


def mask_hash(masks: Mapping[str, Tensor]) -> int:
    """One number for all masks together, the same on every device, to compare processes, runs and
    resumed runs."""
    total = 0
    for name, mask in masks.items():
        positions = mask.reshape(-1).nonzero().squeeze(1)
        total ^= int(random_bits(stream(0, name), positions).sum().item())
    return total


# ---------------------------------------------------------------- keyed draws

# A counter-based generator, the splitmix64 finalizer of Steele, Lea and Flood ("Fast splittable
# pseudorandom number generators", OOPSLA 2014), in torch's wrapping int64 arithmetic: the same key
# and counter give the same bits on every device.
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def stream(seed: int, *names: int | str) -> int:
    """A signed 64-bit key for one purpose, e.g. ``stream(seed, "order", epoch)``."""
    text = "/".join(str(part) for part in (seed, *names))
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def random_bits(key: int | Tensor, counter: Tensor) -> Tensor:
    """64 random bits for each ``counter`` (int64); ``key`` is a number or an int64 tensor that
    broadcasts."""
    bits = counter * _signed(_GOLDEN) + key
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX2)
    return bits ^ _shift_right(bits, 31)


def uniform(key: int | Tensor, counter: Tensor) -> Tensor:
    """Float32 draws strictly between 0 and 1, shaped like ``counter`` broadcast with ``key``."""
    # 23 bits plus a half: with 24 bits the largest draw would round to 1.
    return (_shift_right(random_bits(key, counter), 41).to(torch.float32) + 0.5) * 2.0**-23


@contextlib.contextmanager
def _global_draws(key: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators with a key, and restore their states afterwards."""
    gpus = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[n] for n in gpus),
        ):
            generator.manual_seed(key)
        yield


def _shift_right(bits: Tensor, by: int) -> Tensor:
    # torch's >> copies the sign bit; a logical shift clears the copies.
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
