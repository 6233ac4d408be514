"""Sparse training: how dense each layer is, which weights live, and when that changes.

The parts compose and each can be used alone:

* ``layer_densities`` / ``layer_counts`` spread a density over the layers (IGQ, ERK, ER, uniform);
* ``initial_masks`` draws or scores the first masks (also SNIP, GraSP, SynFlow, magnitude);
* ``drop_lowest`` and ``grow_highest`` are the two halves of every mask update, with exact counts;
* ``DropFractionSchedule`` says how much to drop, ``DensityController`` is Flying Bird+'s verdict;
* ``Masking`` holds the masks of a network in training and applies all of this.

Sources: "Sparsity Winning Twice" (Chen et al., ICLR 2022) for Flying Bird and Flying Bird+;
"Rigging the Lottery" (Evci et al., ICML 2020) for ERK and gradient growth; "Connectivity Matters"
(Vysogorets and Kempe, JMLR 2023) for the ideal gas quotas (IGQ).

In someone else's training loop::

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
import hashlib
import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DENSITY_METHODS = ("igq", "erk", "er", "uniform")
SCORED_STARTS = ("magnitude", "random_global", "snip", "grasp", "synflow")
SPARSE_INITS = DENSITY_METHODS + SCORED_STARTS
SCHEDULES = ("cosine", "linear", "constant")
_GRASP_TEMPERATURE = 200.0
_SYNFLOW_ROUNDS = 100

ImagesAndLabels = tuple[Tensor, Tensor]
# Weights by name, or which of a model's are meant: by their name, their layer and themselves.
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
            channel counts alone) or ``uniform``. For ``erk`` and ``er`` a layer that would pass 1
            is dense and the rest is solved again.

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
        return _erdos_renyi(
            sizes, {name: sum(s) / math.prod(s) for name, s in shapes.items()}, density
        )
    if method == "er":
        return _erdos_renyi(
            sizes, {name: (s[0] + s[1]) / (s[0] * s[1]) for name, s in shapes.items()}, density
        )
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
    and no layer is left without a weight, so that no network is cut in two by rounding.
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
            raise ValueError(
                f"density {density} leaves fewer weights than the network has layers ({len(sizes)})"
            )
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


def grow_highest(score: Tensor, mask: Tensor, n: int, *, tie_key: int | None = None) -> Tensor:
    """A new mask with the ``n`` dead positions of highest score added.

    Args:
        score, mask: as in ``drop_lowest``.
        n: how many to add, 0 to the number of dead positions.
        tie_key: ties are drawn with this key of ``stream``, alike on every device; without one they
            go to the lower index. Gradients in bfloat16 have few values, and the first of them by
            index would lie side by side.
    """
    return _switch(score, mask, n, lowest=False, tie_key=tie_key)


def _switch(
    score: Tensor, mask: Tensor, n: int, *, lowest: bool, tie_key: int | None = None
) -> Tensor:
    if score.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"score {tuple(score.shape)} and bool mask {tuple(mask.shape)} must have the same shape"
        )
    # Row-major order whatever the memory format, so that ties break alike for channels-last
    # weights.
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
    """Indices of the values that are surely among the ``n`` lowest (or highest), and of those that
    tie for the rest; both ascending."""
    values = values.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    chosen = values.topk(n, largest=not lowest, sorted=False).values
    threshold = chosen.amax() if lowest else chosen.amin()
    # topk breaks ties as it likes, so it only gives the threshold.
    beyond = (values < threshold if lowest else values > threshold).nonzero().squeeze(1)
    return beyond, (values == threshold).nonzero().squeeze(1)


# ---------------------------------------------------------------- schedules and verdicts


@dataclass(frozen=True)
class DropFractionSchedule:
    """The fraction of a layer's live weights dropped at a mask update after ``step`` optimizer
    steps.

    ``cosine`` and ``linear`` go from ``initial`` to ``minimum`` over ``total_steps`` and stay
    there; ``constant`` stays at ``initial``. The paper calls it the death rate.
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
    """What Flying Bird+ adds to one mask update, for all layers: ``prune`` further weights,
    ``grow`` more."""

    prune: bool = False
    grow: bool = False


@dataclass
class DensityController:
    """Flying Bird+'s two tests on how training goes (paper, section 3.2; SPEC 6).

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
            raise ValueError(
                "epoch_range counts epoch-to-epoch differences and is at least 1, not"
                f" {self.epoch_range}"
            )
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"the threshold is a fraction in (0, 1], not {self.threshold}")

    def observe(self, *, train_ra: float, val_ra: float, val_loss: float) -> None:
        """Take in one finished epoch: accuracies in percent, the mean robust loss on validation
        images."""
        self.gaps.append(float(train_ra) - float(val_ra))
        self.val_losses.append(float(val_loss))

    def decide(self, epoch: int) -> Verdict:
        """The verdict during ``epoch`` (from 0), which sees the epochs observed before it."""
        if epoch < self.start_epoch:
            return Verdict()
        rises = [after > before for before, after in _pairs(self.gaps[:epoch], self.epoch_range)]
        not_falls = [
            after >= before for before, after in _pairs(self.val_losses[:epoch], self.epoch_range)
        ]
        return Verdict(prune=self._reached(rises), grow=self._reached(not_falls))

    def _reached(self, held: Sequence[bool]) -> bool:
        return bool(held) and sum(held) / len(held) >= self.threshold


def _pairs(values: Sequence[float], most: int) -> list[tuple[float, float]]:
    """The last ``most`` pairs of neighbours."""
    return list(itertools.pairwise(values))[-most:]


# ---------------------------------------------------------------- first masks


_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of convolutions (also 1-d, 3-d and transposed), linear layers and attention's
    projections, by name.

    Biases, norms, embeddings and free parameters are never masked, whatever their shape; frozen
    weights (``requires_grad`` False) are left alone and do not count. A weight that several layers
    share counts once.

    Raises:
        ValueError: a layer whose weight is computed from others, as by ``weight_norm`` or
            ``torch.nn.utils.prune``, so that zeros in what is trained are not zeros in what is
            computed.
    """
    return _unfrozen(_chosen(model, None))


def _unfrozen(weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in weights.items() if weight.requires_grad}


def _chosen(model: nn.Module, choice: Choice | None) -> dict[str, nn.Parameter]:
    """The weights to mask and those that would be if they were not frozen, in the model's order: by
    its layers, or by a choice."""
    if choice is None:
        layers = [
            (name, module, leaf)
            for name, module in model.named_modules()
            for leaf in _weight_names(module)
        ]
        wanted = {id(_trained_weight(module, leaf, name)) for name, module, leaf in layers}
    elif isinstance(choice, Mapping):
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in choice.items():
            if own.get(name) is not parameter:
                raise ValueError(f"prunable names {name}, which is no parameter of this model")
            _refuse_unmaskable(model, name, parameter)
        wanted = {id(parameter) for parameter in choice.values()}
    else:
        asked = {
            name: p
            for name, p in model.named_parameters()
            if isinstance(p, nn.UninitializedParameter) or p.dim() > 1
        }
        chosen = {
            name: parameter
            for name, parameter in asked.items()
            if choice(name, _layer_of(model, name)[1], parameter)
        }
        return _chosen(model, chosen)
    return {
        name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted
    }


def _refuse_unmaskable(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    layer_name, layer, leaf = _layer_of(model, name)
    if _trained_weight(layer, leaf, layer_name) is not parameter:
        raise ValueError(
            f"{name} is one of the parts that {leaf} is computed from, so its zeros would be no"
            " zeros of that"
        )
    if parameter.dim() < 2:
        raise ValueError(
            f"{name} has the shape {tuple(parameter.shape)}; weights to mask have two dimensions or"
            " more"
        )


def _layer_of(model: nn.Module, name: str) -> tuple[str, nn.Module, str]:
    """The layer that a parameter belongs to, its name first, and under which name it computes with
    it."""
    path, _, leaf = name.rpartition(".")
    before, parametrized, part = f".{path}".rpartition(".parametrizations.")
    if parametrized:
        return before[1:], model.get_submodule(before[1:]), part.partition(".")[0]
    layer = model.get_submodule(path)
    # than parametrizations
    older = next(
        (leaf.removesuffix(end) for end in ("_orig", "_g", "_v") if leaf.endswith(end)), leaf
    )
    return path, layer, older if hasattr(layer, older) else leaf


def _weight_names(module: nn.Module) -> list[str]:
    # its last projection is a linear layer of its own
    if isinstance(module, nn.MultiheadAttention):
        return [leaf for leaf in _ATTENTION_WEIGHTS if getattr(module, leaf) is not None]
    return ["weight"] if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) else []


def _trained_weight(module: nn.Module, leaf: str, name: str) -> nn.Parameter:
    """The parameter behind a layer's weight: itself, or what a spectral norm divides, since there a
    zero stays one."""
    own = dict(module.named_parameters(recurse=False))
    name = name or type(module).__name__  # of a model that is one layer
    if isinstance(own.get(leaf), nn.UninitializedParameter):
        raise ValueError(
            f"{name} has no weight before its first batch; call the model once, and make the"
            " optimizer after that"
        )
    if leaf in own:
        return own[leaf]
    if hasattr(module, f"{leaf}_mask"):
        raise ValueError(
            f"{name} is masked by torch.nn.utils.prune already; torch.nn.utils.prune.remove(layer,"
            f" '{leaf}') makes that plain"
        )
    if f"{leaf}_orig" in own:  # the older spectral norm
        # of an attention, which does not call it
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            older = "older spectral_norm, which an attention never computes"
            raise ValueError(
                f"{name} has the {older}; take torch.nn.utils.parametrizations.spectral_norm"
            )
        return own[f"{leaf}_orig"]
    if f"{leaf}_g" in own:
        raise ValueError(
            f"{name} has a weight_norm, whose zeros are no zeros of its weight;"
            " torch.nn.utils.remove_weight_norm takes it off"
        )
    if nn.utils.parametrize.is_parametrized(module, leaf):
        parts: Any = module.parametrizations[leaf]  # type: ignore[index]
        kinds = [type(part).__name__ for part in parts]
        if kinds == ["_SpectralNorm"]:
            return parts.original
        computed = f"computed by {', '.join(kinds).strip('_')}, whose zeros are no zeros of it"
        raise ValueError(
            f"{name} has a weight {computed}; torch.nn.utils.parametrize.remove_parametrizations"
            " takes that off"
        )
    raise ValueError(f"{name} has a {leaf} that is no parameter, so it cannot be masked")


def _warn_of_frozen(weights: Mapping[str, nn.Parameter]) -> None:
    """Name what a caller may have expected to be masked."""
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        warnings.warn(
            f"frozen layers are left alone and do not count: {', '.join(frozen)}", stacklevel=3
        )


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
        model: left as it is; scores are computed on a copy.
        density: kept fraction in (0, 1].
        method: a density method (positions drawn at random within the layer's exact count), or a
            score over all layers together: ``magnitude``, ``random_global``, ``snip`` (Lee et al.,
            2019), ``grasp`` (Wang et al., 2020), ``synflow`` (Tanaka et al., 2020). Every score
            leaves each layer a weight and the last layer, the classifier, one for each output.
        seed: of the random positions, and of the draw among weights whose scores tie.
        batches: images and labels for ``snip`` and ``grasp`` (their gradients are summed over
            them); the image shape is also what ``synflow`` needs.
        prunable: which weights, as in ``Masking``.

    Raises:
        ValueError: unknown method, a density that is bad or too low for one weight a layer and one
            an output, no batches where the score needs them, scores that are all zero or not
            finite.
    """
    _check_density(density)
    weights = _unfrozen(_chosen(model, prunable))
    _refuse_nothing(weights)
    if method in DENSITY_METHODS:
        counts = layer_counts(
            {name: tuple(w.shape) for name, w in weights.items()}, density, method
        )
        return {
            name: grow_highest(
                _random_score(w, seed, "init", name),
                torch.zeros_like(w, dtype=torch.bool),
                counts[name],
            )
            for name, w in weights.items()
        }
    if method not in SCORED_STARTS:
        raise ValueError(f"unknown sparse start {method!r}; known: {', '.join(SPARSE_INITS)}")
    if method in ("snip", "grasp", "synflow") and not batches:
        raise ValueError(f"{method} needs batches of images and labels to score the weights")
    if method == "random_global":
        return _connected_masks(
            {name: _random_score(w, seed, "init", name) for name, w in weights.items()}, density
        )
    tie_key = stream(seed, "ties", method)
    if method == "synflow":
        return _synflow_masks(model, list(weights), density, batches[0][0][:1], tie_key)
    if method == "magnitude":
        scores = {name: w.detach().abs() for name, w in weights.items()}
    else:
        # dropout drops alike at each start
        with _global_draws(stream(seed, method), batches[0][0].device):
            scores = (_snip_scores if method == "snip" else _grasp_scores)(
                model, list(weights), batches
            )
    _refuse_useless(scores, method)
    return _connected_masks(scores, density, tie_key)


def _refuse_nothing(weights: Mapping[str, nn.Parameter]) -> None:
    if not weights:
        raise ValueError(
            "the network has no weights to mask: no trained convolution, linear layer or attention,"
            " or none is chosen"
        )


def _refuse_useless(scores: Mapping[str, Tensor], method: str) -> None:
    """A start by them would be one by chance, and say that it is not."""
    broken = [name for name, score in scores.items() if not bool(score.isfinite().all())]
    if broken:
        raise ValueError(
            f"{method} scores the weights of {', '.join(broken)} with what is not finite: look at"
            " weights and batches"
        )
    if not any(bool(score.any()) for score in scores.values()):
        raise ValueError(
            f"{method} scores every weight with zero: the loss on these batches, or the output,"
            " does not depend on them"
        )


def _connected_masks(
    scores: Mapping[str, Tensor], density: float, tie_key: int | None = None
) -> dict[str, Tensor]:
    """``global_masks`` that leave each layer its highest weight, and the last one, the classifier,
    that of each output.

    A layer that a start empties lets nothing through, so it never has a gradient to grow by.
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
        raise ValueError(
            f"density {density} leaves fewer weights than one a layer and one for each output of"
            f" {classifier}, {least}"
        )
    # Rows are views of it, which a channels-last tensor does not have.
    raised = {
        name: score.clone(memory_format=torch.contiguous_format) for name, score in scores.items()
    }
    for name, score in raised.items():
        rows = score.view(len(lacking[name]), -1)
        rows.scatter_(1, rows.argmax(dim=1, keepdim=True), float("inf"))
    return global_masks(raised, density, tie_key=tie_key)


def global_masks(
    scores: Mapping[str, Tensor], density: float, *, tie_key: int | None = None
) -> dict[str, Tensor]:
    """Keep the highest scores over all layers together, ``round(density * total)`` in all.

    Ties go to the earlier layer, or are drawn with ``tie_key`` as in ``grow_highest``.
    """
    _check_density(density)
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    live = round(density * flat.numel())
    if live < len(scores):
        raise ValueError(
            f"density {density} leaves fewer weights than the network has layers ({len(scores)})"
        )
    kept = grow_highest(flat, torch.zeros_like(flat, dtype=torch.bool), live, tie_key=tie_key)
    parts = kept.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def _random_score(weight: Tensor, seed: int, *names: int | str) -> Tensor:
    counter = torch.arange(weight.numel(), device=weight.device)
    return uniform(stream(seed, *names), counter).view(weight.shape)


def _copy(model: nn.Module) -> nn.Module:
    """A copy that may be scored; what a forward pass left in it is no leaf, like the older spectral
    norm's weight, and is detached."""
    left = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in left})


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    own = dict(model.named_parameters())
    return {name: own[name] for name in names}


def _snip_scores(
    model: nn.Module, names: Sequence[str], batches: Sequence[ImagesAndLabels]
) -> dict[str, Tensor]:
    """|w * dL/dw| with the loss summed over all batches."""
    model = _copy(model).train()
    weights = _named(model, names)
    for x, y in batches:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    # A layer that the loss does not reach has no gradient.
    return {
        name: (w.detach() * (torch.zeros_like(w) if w.grad is None else w.grad)).abs()
        for name, w in weights.items()
    }


def _grasp_scores(
    model: nn.Module, names: Sequence[str], batches: Sequence[ImagesAndLabels]
) -> dict[str, Tensor]:
    """w * (H g): how much gradient flow is lost with a weight (kept: the highest), logits divided
    by 200."""
    model = _copy(model).train()
    weights = _named(model, names)

    def gradients(x: Tensor, y: Tensor, create_graph: bool) -> Sequence[Tensor]:
        loss = F.cross_entropy(model(x) / _GRASP_TEMPERATURE, y, reduction="sum")
        return torch.autograd.grad(
            loss,
            list(weights.values()),
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )

    totals = [torch.zeros_like(w) for w in weights.values()]
    for x, y in batches:
        torch._foreach_add_(totals, list(gradients(x, y, create_graph=False)))
    products = [torch.zeros_like(w) for w in weights.values()]
    for x, y in batches:
        terms = [
            (g * t).sum() for g, t in zip(gradients(x, y, create_graph=True), totals, strict=True)
        ]
        torch._foreach_add_(
            products,
            list(
                torch.autograd.grad(
                    torch.stack(terms).sum(),
                    list(weights.values()),
                    allow_unused=True,
                    materialize_grads=True,
                )
            ),
        )
    return {name: w.detach() * hg for (name, w), hg in zip(weights.items(), products, strict=True)}


def _synflow_masks(
    model: nn.Module, names: Sequence[str], density: float, x: Tensor, tie_key: int
) -> dict[str, Tensor]:
    """100 rounds of keeping the highest |w * dR/dw|, R = the network's output on ones with all
    weights positive."""
    # float64: in a deep positive network the products span more than float32 holds.
    model = _copy(model).double().eval()
    weights = _named(model, names)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    ones = torch.ones_like(x, dtype=torch.float64)
    normalize = getattr(model, "normalize", None)
    if normalize is not None:  # so that the first convolution sees ones
        ones = ones * normalize.std.view(1, -1, 1, 1) + normalize.mean.view(1, -1, 1, 1)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for done in range(1, _SYNFLOW_ROUNDS + 1):
        gradients = torch.autograd.grad(
            model(ones).sum(), list(weights.values()), allow_unused=True, materialize_grads=True
        )
        scores = {
            name: (w.detach() * g).abs()
            for (name, w), g in zip(weights.items(), gradients, strict=True)
        }
        if done == 1:
            _refuse_useless(scores, "synflow")
        # A weight that is lost stays so: below those that score zero.
        scores = {name: score.masked_fill(~masks[name], -1.0) for name, score in scores.items()}
        masks = _connected_masks(scores, density ** (done / _SYNFLOW_ROUNDS), tie_key)
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
        growth: one of ``GROWTHS``: ``random``, ``gradient`` (largest |gradient| of the last batch)
            or ``momentum``.
        drop_fraction, drop_schedule: of a layer's live weights, dropped and regrown at one update.
        update_frequency: optimizer steps between updates; ``second_frequency`` once past half of
            ``total_steps``.
        adaptive: Flying Bird+, whose density follows the verdicts of a ``DensityController`` made
            of ``start_epoch``, ``epoch_range`` and ``update_threshold``.
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
            raise ValueError(
                f"unknown sparse start {self.sparse_init!r}; known: {', '.join(SPARSE_INITS)}"
            )
        if self.growth not in GROWTHS:
            raise ValueError(f"unknown growth {self.growth!r}; known: {', '.join(GROWTHS)}")
        if self.update_frequency < 1 or (
            self.second_frequency is not None and self.second_frequency < 1
        ):
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
    frequency = (
        config.second_frequency if late and config.second_frequency else config.update_frequency
    )
    return step % frequency == 0


_MOMENTA = ("momentum_buffer", "exp_avg")  # as torch's optimizers name them
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


class _Memory:
    """What an optimizer, and those that it wraps, remember of the weights: momentum would bring
    masked weights back."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
    ) -> None:
        self._optimizers = list(_optimizers(optimizer, set()))
        self._model = model
        self._weights = weights

    def refuse_other(self) -> None:
        """An optimizer of a copy of the network, say, or of a part of it."""
        trained = {id(parameter) for group in self._groups() for parameter in group["params"]}
        for name, weight in self._weights.items():
            if id(weight) not in trained:
                raise ValueError(
                    f"the optimizer does not hold {name}: make it of this model's parameters, after"
                    " the model is complete"
                )

    def refuse_without_momentum(self) -> None:
        """Known before the first step, when the state is empty still; of a foreign optimizer only
        once it has made a step."""
        without = {
            id(p)
            for optimizer, group in self._pairs()
            if _has_momentum(optimizer, group) is False
            for p in group["params"]
        }
        promised = self._promised()
        for name, weight in self._weights.items():
            if id(weight) in without - promised:
                raise ValueError(f"{_MOMENTUM_NEEDED}; that of {name} has none")

    def refuse_hidden(self) -> None:
        """Tensors like a weight that no state says to be of one: they cannot be masked."""
        like = {tuple(weight.shape): name for name, weight in self._weights.items()}
        trained = [
            parameter
            for group in getattr(self._optimizers[0], "param_groups", [])
            for parameter in group["params"]
        ]
        parameters = [*self._model.parameters(), *trained]
        known = {id(p) for p in parameters} | {id(p.grad) for p in parameters if p.grad is not None}
        states = {id(getattr(optimizer, "state", None)) for optimizer in self._optimizers}
        for optimizer in self._optimizers:
            for tensor in _hidden(
                getattr(optimizer, "__dict__", {}),
                known,
                {id(weight) for weight in self._weights.values()},
                states,
            ):
                if tuple(tensor.shape) in like:
                    kind, name = type(optimizer).__name__, like[tuple(tensor.shape)]
                    where = f"tensors of the shape of {name} outside of state[weight]"
                    raise ValueError(
                        f"{kind} keeps {where}, where they cannot be masked; take an optimizer that"
                        " keeps them there"
                    )

    def of(self, name: str) -> list[Tensor]:
        """Every tensor of the state that is shaped like the weight."""
        weight = self._weights[name]
        found = [
            tensor
            for state in self._states(weight)
            for tensor in _tensors(state)
            if tensor.shape == weight.shape
        ]
        for tensor in found:
            if not tensor.is_floating_point():  # its zero need not mean zero
                raise ValueError(
                    f"the optimizer keeps its state of {name} in {tensor.dtype}, which cannot be"
                    " masked; take one in floats"
                )
        return found

    def momentum(self, name: str) -> Tensor | None:
        """The momentum of a weight; None before the first step that uses it.

        Raises:
            ValueError: an optimizer without momentum, or with one that is not shaped like the
                weight.
        """
        weight = self._weights[name]
        states = [state for state in self._states(weight) if state]
        momentum = next(
            (
                state[key]
                for state in states
                for key in _MOMENTA
                if isinstance(state.get(key), Tensor)
            ),
            None,
        )
        # sums and averages of squares, as of Adagrad and RMSprop, have no direction
        if momentum is None:
            if states or id(weight) not in self._promised():
                raise ValueError(f"{_MOMENTUM_NEEDED}; that of {name} has none")
        elif momentum.shape != weight.shape or not momentum.is_floating_point():
            kept = f"{momentum.dtype} {tuple(momentum.shape)}"
            raise ValueError(
                f"momentum growth needs a momentum shaped like {name}, in floats; the optimizer"
                f" keeps {kept}"
            )
        return momentum

    def _promised(self) -> set[int]:
        return {
            id(p)
            for optimizer, group in self._pairs()
            if _has_momentum(optimizer, group)
            for p in group["params"]
        }

    def _pairs(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        return (
            (optimizer, group)
            for optimizer in self._optimizers
            for group in getattr(optimizer, "param_groups", [])
        )

    def _groups(self) -> Iterator[dict[str, Any]]:
        return (group for _, group in self._pairs())

    def _states(self, weight: Tensor) -> list[Mapping[str, Any]]:
        return [getattr(optimizer, "state", {}).get(weight, {}) for optimizer in self._optimizers]


def _has_momentum(optimizer: Any, group: Mapping[str, Any]) -> bool | None:
    """Whether an optimizer will keep a momentum of a group's parameters; None of an unknown one."""
    if "momentum" in group:
        return bool(group["momentum"])
    if "betas" in group:
        return True
    return False if isinstance(optimizer, _NO_MOMENTUM) else None


def _optimizers(held: Any, seen: set[int]) -> Iterator[Any]:
    """An optimizer and those that it wraps: in its attributes, or in lists and dicts there."""
    first = not seen
    if id(held) in seen or isinstance(held, Tensor):
        return
    seen.add(id(held))
    if first or hasattr(held, "param_groups"):
        yield held
        held = getattr(held, "__dict__", {})
    for part in _parts(held):
        yield from _optimizers(part, seen)


def _parts(held: Any) -> Iterable[Any]:
    if isinstance(held, Mapping):
        return held.values()
    return held if isinstance(held, (list, tuple, deque)) else ()


def _tensors(held: Any) -> Iterator[Tensor]:
    for part in _parts(held):
        if isinstance(part, Tensor):
            yield part
        else:
            yield from _tensors(part)


def _hidden(held: Any, known: set[int], masked: set[int], states: set[int]) -> Iterator[Tensor]:
    """Tensors in the attributes of an optimizer but those of the model and what is of one
    parameter, in a state if that is masked."""
    if isinstance(held, Tensor):
        if id(held) not in known:
            yield held
    else:
        reached = known if id(held) in states else known - masked
        keys = held if isinstance(held, Mapping) else itertools.repeat(None)
        for key, part in zip(keys, _parts(held), strict=False):
            if not (isinstance(key, Tensor) and id(key) in reached):
                yield from _hidden(part, known, masked, states)


def _warn_of_idle_updates(config: MaskingConfig) -> None:
    if not config.fixed and not any(
        update_is_due(config, step) for step in range(1, config.total_steps + 1)
    ):
        frequency = f"update_frequency={config.update_frequency}"
        advice = "a smaller one moves the masks, fixed=True says that they shall stay"
        # The line named is the one that makes the Masking.
        warnings.warn(
            f"with {frequency} no mask update falls into {config.total_steps} steps; {advice}",
            stacklevel=3,
        )


class Masking:
    """Keeps a network sparse: masks, their updates, and what is needed to resume them.

    The network stays plain: dense tensors whose dead weights are zero, so ``param.grad`` is the
    dense gradient that growth needs. ``masks`` maps names to bool tensors shaped like ``weights``,
    the prunable ones.

    Args:
        model: its prunable weights (``prunable``) are masked in place at once.
        optimizer: every tensor like a weight in its state (momentum) is masked too, also where it
            wraps another.
        config: see ``MaskingConfig``.
        masks: the first masks, instead of ``config.sparse_init`` (a Robust Bird ticket, say).
        batches: images and labels, for starts that score weights by data.
        prunable: which weights, if not those of the function of this name: a mapping of the model's
            own names to parameters, or a function ``(name, layer, parameter) -> bool``, asked of
            every parameter with two dimensions or more, where ``layer`` is the module that computes
            with it. Frozen ones are left alone.

    Raises:
        ValueError: masks that do not fit the network, an optimizer that does not train it or has no
            momentum for ``momentum`` growth, weights that are computed from others or have one
            dimension, or a start without the batches it needs; while training, an optimizer that
            keeps tensors like a weight where they cannot be masked.

    Warns where masks that are not ``fixed`` would never change in ``total_steps``, of frozen
    layers, and, once by name, of layers without a live weight.
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
    ) -> None:
        self.config = config
        self.steps = 0
        self._put_off = False  # an update that fell on gradients or momentum without use
        self.events: list[dict[str, Any]] = []
        self.controller = DensityController(
            config.epoch_range, config.update_threshold, config.start_epoch
        )
        self.schedule = DropFractionSchedule(
            config.drop_fraction, config.total_steps, config.drop_schedule
        )
        chosen = _chosen(model, prunable)
        self.weights = _unfrozen(chosen)
        self._optimizer = optimizer
        self._memory = _Memory(optimizer, model, self.weights)
        self._said_dead: set[str] = set()
        _refuse_nothing(self.weights)
        _warn_of_frozen(chosen)
        self._memory.refuse_other()
        if config.growth == "momentum" and not config.fixed:
            self._memory.refuse_without_momentum()
        _warn_of_idle_updates(config)
        if masks is None:
            masks = initial_masks(
                model,
                config.density,
                config.sparse_init,
                seed=config.seed,
                batches=batches,
                prunable=self.weights,
            )
        self.masks: dict[str, Tensor] = {}
        self._explored: dict[str, Tensor] = {}
        self._set_masks(masks)
        self._explored = {name: mask.clone() for name, mask in self.masks.items()}
        self._warn_of_dead(self.live_counts())
        self.apply()

    # ---- every step

    def step(self) -> None:
        """Call after each ``optimizer.step()``, gradients still in place: masks again, and updates
        when due."""
        self.steps += 1
        if self.steps == 1:
            self._memory.refuse_hidden()
        if not self.update_due():
            self.apply()
        elif self.config.growth in _GROUNDS and not self._grounds_tell():
            self._put_off = True
            self.apply()
        else:
            self._put_off = False
            self.update_topology()

    def update_due(self) -> bool:
        """Whether the masks change after the step that was just counted."""
        return self._put_off or update_is_due(self.config, self.steps)

    def _grounds_tell(self) -> bool:
        """Whether the gradients, or the momentum, say where to grow: finite, and not all zero, as
        after a step that a scaler skipped.

        They are all zero, too, for as long as an empty layer lets nothing through: then the draw
        among ties decides.
        """
        grounds = self._grounds()
        if not grounds and self.config.growth == "momentum":  # no step was made yet
            return False
        # of NaN that is NaN
        largest = torch.stack([ground.abs().amax() for ground in self._required(grounds)])
        emptied = torch.stack([~mask.any() for mask in self.masks.values()]).any()
        return bool(largest.isfinite().all() & ((largest > 0).any() | emptied))

    def _grounds(self) -> list[Tensor]:
        found = [_GROUNDS[self.config.growth](self, name) for name in self.weights]
        return [ground for ground in found if ground is not None]

    def _required(self, grounds: list[Tensor]) -> list[Tensor]:
        if grounds:
            return grounds
        if self.config.growth == "momentum":
            raise ValueError(
                "momentum growth needs a step of the optimizer before the masks are updated"
            )
        raise ValueError(
            "gradient growth needs the gradients of the last batch: update masks before zero_grad()"
        )

    @torch.no_grad()
    def apply(self) -> None:
        """Set dead weights and their momentum to zero, in place."""
        for name, weight in self.weights.items():
            for tensor in (weight, *self.moments(name)):
                # not times 0, which an infinite gradient would make NaN
                tensor.masked_fill_(self._dead[name], 0.0)

    def moments(self, name: str) -> Iterable[Tensor]:
        """What the optimizer, or one that it wraps, remembers of a layer, each tensor shaped like
        its weight: the momentum of SGD."""
        return self._memory.of(name)

    # ---- every update

    @torch.no_grad()
    def update_topology(self) -> None:
        """Drop and grow in every layer that is not fully dense, once, by the schedule and the
        verdict now.

        Called by ``step`` when due. Needs the gradients of the last batch for ``gradient`` growth
        and the optimizer's momentum, not yet masked, for ``momentum`` growth. Where scores tie, the
        seed draws.

        A layer without a live weight has none to drop, so none would ever grow: it grows one, and
        the layer with the most live weights, one that is not fully dense if there is one, grows one
        less. The number of all together stays exact.
        """
        self._memory.refuse_hidden()
        if self.config.growth in _GROUNDS:
            self._required(self._grounds())  # without any, nothing would move
        verdict = self.controller.decide(self.epoch) if self.config.adaptive else Verdict()
        fraction = self.schedule.at(self.steps)
        live_counts = self.live_counts()  # one wait for the device
        self._warn_of_dead(live_counts)
        changes = {
            name: self._change(name, live, fraction, verdict) for name, live in live_counts.items()
        }
        self._revive(changes, live_counts)
        updated = {name: self._update_layer(name, *change) for name, change in changes.items()}
        # old masks first: what grows starts at zero; a weight dropped and regrown at once keeps its
        # value
        self.apply()
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
        """Not by the gradient or momentum of a layer that was not used, which keeps its mask."""
        return (
            self.config.growth not in _GROUNDS
            or _GROUNDS[self.config.growth](self, name) is not None
        )

    def _revive(self, changes: dict[str, tuple[int, int]], live_counts: Mapping[str, int]) -> None:
        """Let each layer that is left without a live weight grow one, and the layer with the most
        give it."""
        after = {
            name: live_counts[name] - dropped + grown
            for name, (dropped, grown) in changes.items()
            if self._can_grow(name)
        }
        for name in [name for name, live in after.items() if live == 0]:
            giver = max(
                after,
                key=lambda name: (
                    after[name] > 1,
                    live_counts[name] < self.masks[name].numel(),
                    after[name],
                ),
            )
            if after[giver] < 2:
                return
            dropped, grown = changes[giver]
            changes[giver] = (dropped, grown - 1) if grown else (dropped + 1, 0)
            changes[name] = (0, 1)
            after[giver], after[name] = after[giver] - 1, 1

    def _update_layer(self, name: str, n_drop: int, n_grow: int) -> Tensor:
        mask, weight, config = self.masks[name], self.weights[name], self.config
        if n_drop == n_grow == 0:
            return mask
        # Random growth has drawn already: its few ties may go by index.
        tie_key = (
            None if config.growth == "random" else stream(config.seed, "ties", self.steps, name)
        )
        return grow_highest(
            GROWTHS[config.growth](self, name),
            drop_lowest(weight.abs(), mask, n_drop),
            n_grow,
            tie_key=tie_key,
        )

    def _warn_of_dead(self, live_counts: Mapping[str, int]) -> None:
        dead = [
            name for name, live in live_counts.items() if live == 0 and name not in self._said_dead
        ]
        self._said_dead |= set(dead)
        if dead:
            what = (
                "fixed masks leave it so"
                if self.config.fixed
                else "a mask update lets each grow one"
            )
            warnings.warn(
                f"layers without a live weight let nothing through, {what}: {', '.join(dead)}",
                stacklevel=3,
            )

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
        """Take in a finished epoch (accuracies in percent, mean validation robust loss); once an
        epoch."""
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
        """Everything that changes in training, as tensors and plain values; copies, so it can be
        kept."""
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
        """Take back a ``state_dict``; raises ``ValueError`` if it is of another network. Masks are
        applied at once."""
        self._set_masks(state["masks"])
        self._explored = {
            name: state["explored"][name].to(mask.device).clone()
            for name, mask in self.masks.items()
        }
        self.steps = int(state["steps"])
        self._put_off = bool(state.get("put_off", False))
        self.controller.gaps = [float(gap) for gap in state["gaps"]]
        self.controller.val_losses = [float(loss) for loss in state["val_losses"]]
        self.events = [dict(event) for event in state["events"]]
        self._warn_of_dead(self.live_counts())
        self.apply()


def _random_growth(masking: Masking, name: str) -> Tensor:
    return _random_score(masking.weights[name], masking.config.seed, "grow", masking.steps, name)


def _gradient(masking: Masking, name: str) -> Tensor | None:
    return masking.weights[name].grad


def _momentum(masking: Masking, name: str) -> Tensor | None:
    return masking._memory.momentum(name)


# What these growths go by, None of a layer that was not used.
_GROUNDS: dict[str, Callable[[Masking, str], Tensor | None]] = {
    "gradient": _gradient,
    "momentum": _momentum,
}


def _gradient_growth(masking: Masking, name: str) -> Tensor:
    gradient = _gradient(masking, name)
    if gradient is None:
        raise ValueError(
            f"gradient growth needs the gradient of {name}: update masks before zero_grad()"
        )
    return gradient.abs()


def _momentum_growth(masking: Masking, name: str) -> Tensor:
    momentum = _momentum(masking, name)
    if momentum is None:
        raise ValueError(
            f"momentum growth needs the momentum of {name}: update masks after a step of the"
            " optimizer"
        )
    return momentum.abs()


# Scores shaped like a layer's weight, by the masking and the layer's name; the highest among the
# dead positions grow.
GROWTHS: dict[str, Callable[[Masking, str], Tensor]] = {
    "random": _random_growth,
    "gradient": _gradient_growth,
    "momentum": _momentum_growth,
}


def mask_hash(masks: Mapping[str, Tensor]) -> int:
    """One number for all masks together, equal on every device: to compare processes, runs and
    resumes."""
    total = 0
    for name, mask in masks.items():
        positions = mask.reshape(-1).nonzero().squeeze(1)
        total ^= (
            int(random_bits(stream(0, name), positions).sum().item()) if positions.numel() else 0
        )
    return total


# ---------------------------------------------------------------- keyed draws

# A counter-based generator, the splitmix64 finalizer of Steele, Lea and Flood ("Fast splittable
# pseudorandom number generators",
# OOPSLA 2014), in torch's wrapping int64 arithmetic: the same key and counter give the same bits on
# every device.
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
    # 23 bits and a half: with 24 the largest draw would round to 1.
    return (_shift_right(random_bits(key, counter), 41).to(torch.float32) + 0.5) * 2.0**-23


@contextlib.contextmanager
def _global_draws(key: int, device: torch.device) -> Iterator[None]:
    """Give code that draws by torch's global generators states by a key; afterwards they are as
    they were found."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # before it there are none
        generators.append(
            torch.cuda.default_generators[
                torch.cuda.current_device() if device.index is None else device.index
            ]
        )
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(key)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    # torch's >> copies the sign bit; a logical shift clears what it brought in.
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
