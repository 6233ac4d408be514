"""Structured channels: groups of channels that are pruned together, and narrow networks.

A residual stream, with every layer that writes or reads it, is one group; the inner channels of a
block are another. ``torch-pruning`` finds the groups, so this works for custom networks too. A
network without some of its channels is an ordinary narrow network.

    plan = plan_channels(model, image_shape, density=0.5)
    live = plan.channels.first(plan.counts, seed)       # the channels to keep
    small = narrow(copy.deepcopy(model), plan.channels.kept(live))
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.flops import LayerCost, layer_costs
from sparse_core import global_masks, grow_highest, stream, uniform

# By layer, the output and the input channels to keep; None keeps all.
Kept = Mapping[str, Sequence[Sequence[int] | None]]
_TOLERANCE = 1e-9  # relative, in float64


@dataclass(frozen=True)
class Channels:
    """A network's groups of channels; the channels are numbered one group after the other.

    Attributes:
        sizes: number of channels by group; a group is named after the first layer that writes it.
        owners: by tensor and dimension, the channel that each index belongs to; -1 for one that is
            always kept.
        readers: by weight, the dimension along which it reads channels.
        scales: names of the batch-norm scales, which have one entry per channel.
        whole: groups that cannot be divided, each with the reason.
    """

    sizes: Mapping[str, int]
    owners: Mapping[str, Mapping[int, Tensor]]
    readers: Mapping[str, int]
    scales: Sequence[str]
    whole: Mapping[str, str]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def by_group(self, values: Tensor) -> dict[str, Tensor]:
        """Views by group of a vector over all channels."""
        return dict(zip(self.sizes, values.split([*self.sizes.values()]), strict=True))

    def highest(self, scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> Tensor:
        """The ``counts`` channels of highest score in each group, as bool over all channels."""
        live = torch.zeros(self.total, dtype=torch.bool)
        for name, part in self.by_group(live).items():
            part.copy_(grow_highest(scores[name], part.clone(), counts[name]))
        return live

    def first(self, counts: Mapping[str, int], seed: int) -> Tensor:
        """``counts`` channels of each group, drawn by the seed, as bool over all channels."""
        scores = {
            name: uniform(stream(seed, "channels", name), torch.arange(size))
            for name, size in self.sizes.items()
        }
        return self.highest(scores, counts)

    def indices(self, name: str, live: Tensor) -> dict[int, Tensor]:
        """The indices of a tensor to keep, by dimension."""
        present = torch.cat([live, live.new_ones(1)])  # owner -1 is always kept
        return {
            dim: present[owner].nonzero().squeeze(1) for dim, owner in self.owners[name].items()
        }

    def positions(self, live: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Flat index in the full-size tensor of each element of the narrow network's tensors."""
        found = {}
        for name in self.owners:
            shape = shapes[name]
            numbers = torch.arange(math.prod(shape)).view(*shape)
            for dim, index in self.indices(name, live).items():
                numbers = numbers.index_select(dim, index)
            found[name] = numbers
        return found

    def kept(self, live: Tensor) -> dict[str, list[list[int] | None]]:
        """The channels to keep, for ``narrow``, of each layer that loses some."""
        found: dict[str, list[list[int] | None]] = {}
        for name in self.owners:
            layer, _, leaf = name.rpartition(".")
            if leaf != "weight" and f"{layer}.weight" in self.owners:
                continue
            sides: list[list[int] | None] = [None, None]
            for dim, index in self.indices(name, live).items():
                if len(index) < len(self.owners[name][dim]):
                    sides[int(self.readers.get(name) == dim)] = index.tolist()
            if sides != [None, None]:
                found[layer] = sides
        return found

    def inference_flops(self, costs: Sequence[LayerCost], counts: Mapping[str, int]) -> int:
        """Real inference FLOPs per image with ``counts`` channels in each group."""
        fractions = {
            number: counts[name] / size for number, (name, size) in enumerate(self.sizes.items())
        }
        group_of = torch.repeat_interleave(torch.tensor([*self.sizes.values()], dtype=torch.long))
        total = 0.0
        for cost in costs:
            weights = float(cost.weights)
            for owner in self.owners.get(cost.name, {}).values():
                owned = owner[owner >= 0]
                kept = sum(
                    fractions[number] * count
                    for number, count in enumerate(torch.bincount(group_of[owned]).tolist())
                    if count
                )
                weights *= (len(owner) - len(owned) + kept) / len(owner)
            # attention, whose weights are never divided, may project more keys than queries
            positions = sum(cost.by_third) / 3 if cost.by_third else cost.positions
            total += 2 * weights * positions
        return round(total)


# ---------------------------------------------------------------- numbers of channels


def channel_counts(sizes: Mapping[str, int], density: float, multiple: int) -> dict[str, int]:
    """Number of kept channels by group: the full size or the nonzero multiple of ``multiple`` below
    it, whichever is closest to ``density``."""
    counts = {}
    for name, size in sizes.items():
        choices = [size, *range(multiple, size, multiple)] if density < 1 else [size]
        counts[name] = min(choices, key=lambda n: (abs(n - density * size), n))
    return counts


def density_for_flops(
    channels: Channels, costs: Sequence[LayerCost], fraction: float, multiple: int
) -> float:
    """The channel density whose real inference FLOPs come nearest to ``fraction`` of the full
    network's, by bisection.

    Raises:
        ValueError: even the smallest network takes more.
    """
    full = channels.inference_flops(costs, channels.sizes)

    def taken(density: float) -> float:
        counts = channel_counts(channels.sizes, density, multiple)
        return channels.inference_flops(costs, counts) / full

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if taken(middle) > fraction else (middle, high)
    if low == 0.0 and taken(0.0) > fraction:
        raise ValueError(
            f"no density takes {fraction:g} of the FLOPs: with one multiple of {multiple} channels"
            f" per group the network takes {taken(0.0):.3f}"
        )
    return min((low, high), key=lambda density: abs(taken(density) - fraction))


@dataclass(frozen=True)
class ChannelPlan:
    """How many channels of each group a network keeps, at least initially.

    Attributes:
        channels: the network's groups.
        costs: layer costs of the full-size network.
        counts: number of kept channels by group.
        multiple: divides the counts, except those of groups left whole.
        unranked: groups left whole because they have no batch norm whose scale ranks their
            channels.
    """

    channels: Channels
    costs: Sequence[LayerCost]
    counts: Mapping[str, int]
    multiple: int
    unranked: Sequence[str] = ()

    def notes(self) -> list[str]:
        """Messages about the resulting density and the groups left whole."""
        sizes = self.channels.sizes
        kept, total = sum(self.counts.values()), self.channels.total
        full = self.channels.inference_flops(self.costs, sizes)
        cost = self.channels.inference_flops(self.costs, self.counts) / full
        small = [name for name, size in sizes.items() if size < self.multiple]
        found = [
            f"keeps {kept} of {total} channels in {len(sizes)} groups ({kept / total:.4f}), in"
            f" multiples of {self.multiple}; {cost:.3f} of the full network's FLOPs"
        ]
        if small:
            found.append(
                f"smaller than --channel_multiple {self.multiple} and so left whole:"
                f" {', '.join(small)}"
            )
        if self.unranked:
            found.append(
                f"without a batch norm to rank them and so left whole: {', '.join(self.unranked)}"
            )
        if self.channels.whole:
            why = "; ".join(f"{name} ({reason})" for name, reason in self.channels.whole.items())
            found.append(f"groups of channels that cannot be divided: {why}")
        return found


def plan_channels(
    model: nn.Module,
    image_shape: Sequence[int],
    density: float,
    flops: float | None = None,
    multiple: int | None = None,
) -> ChannelPlan:
    """Find a network's groups and choose how many channels of each it keeps initially.

    Args:
        model: the full-size network.
        image_shape: ``[C, H, W]``.
        density: kept fraction of each group, in (0, 1].
        flops: kept fraction of the real inference FLOPs; replaces ``density`` if given.
        multiple: divides the counts; by default 16, or 8 if a group has fewer than 64 channels.

    Raises:
        ValueError: no group can be divided, one would keep less than half a multiple, or all stay
            whole.
    """
    channels = find_channels(model, image_shape)
    sizes, costs = channels.sizes, layer_costs(model, image_shape)
    multiple = _multiple(sizes, multiple)
    if flops is not None:
        density = density_for_flops(channels, costs, flops, multiple)
    for name, size in sizes.items():
        if flops is None and size >= multiple and density * size < multiple / 2:
            raise ValueError(
                f"--density {density:g} keeps {density * size:.3g} of the {size} channels of"
                f" {name}, less than half of a --channel_multiple of {multiple}"
            )
    counts = channel_counts(sizes, density, multiple)
    asked = f"--density {density:g}" if flops is None else f"--flops {flops:g}"
    if counts == sizes:
        raise ValueError(
            f"{asked} keeps all channels when rounded to a --channel_multiple of {multiple}"
        )
    return ChannelPlan(channels, costs, counts, multiple)


def _multiple(sizes: Mapping[str, int], asked: int | None) -> int:
    multiple = (16 if min(sizes.values()) >= 64 else 8) if asked is None else asked
    if all(size <= multiple for size in sizes.values()):
        raise ValueError(
            f"a --channel_multiple of {multiple} divides none of the groups, of which the largest"
            f" has {max(sizes.values())} channels"
        )
    return multiple


def plan_largest(
    model: nn.Module,
    image_shape: Sequence[int],
    density: float,
    floor: float = 0.0,
    multiple: int | None = None,
) -> tuple[ChannelPlan, Tensor, dict[str, int]]:
    """Choose the channels with the largest batch-norm scales over all groups together (Liu et al.,
    "Network Slimming", 2017); a channel that several norms read is ranked by their mean.

    Scales at different depths are not quite comparable: early in training, the whole last group,
    which the classifier reads, may rank below everything else. So each group keeps at least its
    ``floor``, at the expense of the others.

    Args:
        density: kept fraction of all channels, in (0, 1].
        floor: minimum kept fraction of each group, in [0, density].
        model, image_shape, multiple: as in ``plan_channels``; floors are rounded, too.

    Returns:
        The plan; the kept channels as bool over all; and for each group raised to its floor, how
        many it would have kept otherwise. A group without norms stays whole.

    Raises:
        ValueError: no group can be divided or has norms, or the density is below the floor or
            leaves fewer channels than there are groups.
    """
    if not 0 <= floor <= density:
        raise ValueError(
            f"the floor {floor:g} is a fraction of each group's channels and at most the density"
            f" {density:g}"
        )
    channels = find_channels(model, image_shape)
    multiple = _multiple(channels.sizes, multiple)
    scores = _mean_scales(model, channels)
    ranked = {name: score for name, score in scores.items() if not bool(score.isnan().any())}
    if not ranked:
        raise ValueError("none of its channels has a batch norm whose scale could rank it")
    if round(density * sum(score.numel() for score in ranked.values())) < len(ranked):
        raise ValueError(
            f"density {density:g} leaves the network fewer channels than it has groups"
            f" ({len(ranked)})"
        )
    plain = {name: int(mask.sum()) for name, mask in global_masks(ranked, density).items()}
    floors = {name: max(1, math.floor(floor * score.numel())) for name, score in ranked.items()}
    raised = {
        name: score.masked_fill(
            grow_highest(score, torch.zeros_like(score, dtype=torch.bool), floors[name]), torch.inf
        )
        for name, score in ranked.items()
    }
    counts = dict(channels.sizes)
    for name, mask in global_masks(raised, density).items():
        size, share = counts[name], int(mask.sum()) / counts[name]
        counts |= channel_counts({name: size}, share, multiple)
    unranked = [name for name in channels.sizes if name not in ranked]
    plan = ChannelPlan(channels, layer_costs(model, image_shape), counts, multiple, unranked)
    live = channels.highest(scores, counts)
    return plan, live, {name: n for name, n in plain.items() if n < floors[name]}


def usual_floor(density: float) -> float:
    """The default floor: a tenth of a group, or half the density if that is less, so that the
    ranking still matters at low densities."""
    return min(0.1, density / 2)


@torch.no_grad()
def _mean_scales(model: nn.Module, channels: Channels) -> dict[str, Tensor]:
    """Mean |scale| of the norms that each channel passes through, by group; NaN without any."""
    sums, norms = torch.zeros(2, channels.total, dtype=torch.float64)
    for name in channels.scales:
        owner = channels.owners[name][0]
        scale = model.get_parameter(name).abs().double().cpu()
        sums.index_add_(0, owner[owner >= 0], scale[owner >= 0])
        norms.index_add_(0, owner[owner >= 0], torch.ones_like(scale)[owner >= 0])
    return channels.by_group(sums / norms)


# ---------------------------------------------------------------- narrow networks


@torch.no_grad()
def narrow(model: nn.Module, kept: Kept) -> nn.Module:
    """Remove channels from a network in place and return it; ``ValueError`` for layers or channels
    that it does not have. Names in its state dict are unchanged."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, sides in kept.items():
        module = modules.get(name, nn.Identity())
        dims = _dimensions(module)
        if dims is None:
            raise ValueError(f"the network has no layer {name!r} whose channels can be removed")
        for side, indices in zip(dims, sides, strict=True):
            if indices is not None:
                _keep(module, name, side, indices)
        _set_sizes(module)
    return model


@torch.no_grad()
def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set tensors of a network by name, in place or, if the shape differs, as new tensors."""
    state = model.state_dict(keep_vars=True)
    for name, value in values.items():
        if state[name].shape == value.shape:
            state[name].copy_(value)
            continue
        layer, _, leaf = name.rpartition(".")
        module, old = model.get_submodule(layer), state[name]
        like = torch.channels_last if value.dim() == 4 else torch.contiguous_format
        # not ``contiguous``, which keeps the strides of dimensions of size 1: kernels, and so
        # rounding, would differ from those of a freshly built network
        new = torch.empty(value.shape, dtype=old.dtype, device=old.device, memory_format=like)
        new.copy_(value)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, leaf, new)
    for layer in {name.rpartition(".")[0] for name in values}:
        _set_sizes(model.get_submodule(layer))


def _keep(module: nn.Module, name: str, side: Mapping[str, int], indices: Sequence[int]) -> None:
    sizes = {getattr(module, leaf).shape[dim] for leaf, dim in side.items()}
    ascends = [*indices] == sorted(set(indices))
    if len(sizes) != 1 or not indices or not ascends or not {*indices} <= {*range(*sizes)}:
        raise ValueError(f"{name} cannot keep these channels")
    for leaf, dim in side.items():
        value = getattr(module, leaf)
        taken = value.index_select(dim, torch.tensor(indices, device=value.device))
        if isinstance(value, nn.Parameter):
            taken = nn.Parameter(taken, requires_grad=value.requires_grad)
        setattr(module, leaf, taken)


def _set_sizes(module: Any) -> None:
    """Update a layer's size attributes from its tensors."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = module.get_buffer("running_mean").numel()
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = module.weight.shape[:2]
    else:
        # one channel is left in a single group, and may grow again
        depthwise = module.is_depthwise = getattr(module, "is_depthwise", module.groups > 1)
        module.out_channels, module.in_channels = module.weight.shape[:2]
        if depthwise:
            module.in_channels = module.groups = module.out_channels


def _dimensions(module: nn.Module) -> tuple[dict[str, int], dict[str, int]] | None:
    """By tensor of a layer, the dimension of its output channels, and that of its input channels;
    None for a layer that cannot be divided."""
    own = {**module._parameters, **module._buffers}
    present = {name for name, value in own.items() if value is not None}
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and "running_mean" in present:
        names = {"weight", "bias", "running_mean", "running_var"} & present
        return dict.fromkeys(sorted(names), 0), {}
    if "weight" not in present:  # computed from other tensors, as by a spectral norm
        return None
    bias = {"bias": 0} if "bias" in present else {}
    if isinstance(module, nn.Linear):
        return {"weight": 0, **bias}, {"weight": 1}
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None
    if module.groups == 1:
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        return {"weight": int(transposed), **bias}, {"weight": int(not transposed)}
    if module.groups == module.in_channels == module.out_channels:
        return {"weight": 0, **bias}, {}
    return None


# ---------------------------------------------------------------- groups


def find_channels(model: nn.Module, image_shape: Sequence[int]) -> Channels:
    """Find a network's groups for images ``[C, H, W]`` by ``torch-pruning``, and verify them.

    A group is left whole if the library fails, if one of its layers is not a convolution, linear
    layer or batch norm, or if removing its channels is not equivalent to zeroing the weights that
    read them.

    Raises:
        ValueError: no group can be divided.
    """
    groups, whole = _groups(model, image_shape)

    def is_exact(some: Mapping[str, _Group]) -> bool:
        return _is_exact(model, _channels(model, some, whole), image_shape)

    if groups and not is_exact(groups):
        sound = {name: group for name, group in groups.items() if is_exact({name: group})}
        reason = "the network cannot do without some of them"
        whole |= dict.fromkeys(groups.keys() - sound.keys(), reason)
        groups = sound if sound and is_exact(sound) else {}
    if not groups:
        why = "; ".join(f"{name}: {reason}" for name, reason in whole.items())
        raise ValueError(f"no group of its channels can be divided ({why or 'it has none'})")
    return _channels(model, groups, whole)


class _Group:
    """Which indices of which tensors belong to each channel of one group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.written: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self.read: dict[tuple[str, int], list[tuple[int, int]]] = {}


def _groups(
    model: nn.Module, image_shape: Sequence[int]
) -> tuple[dict[str, _Group], dict[str, str]]:
    """Groups by the first layer that writes them, and reasons for those that stay whole."""
    try:  # a second to import, and loading a narrow network does not need it
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "groups of channels are found by torch-pruning: pip install torch-pruning"
        ) from error

    traced = copy.deepcopy(model).cpu().float().eval()
    names = {id(module): name for name, module in traced.named_modules()}
    # two images, since some networks squeeze a batch of one
    image = torch.full((2, *image_shape), 0.5)
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(traced, image, verbose=False)
    except Exception as error:  # the library can raise any error
        what = f"{type(error).__name__}: {error}"[:200]
        raise ValueError(f"torch-pruning cannot trace this network ({what})") from error
    seen: set[tuple[str, int]] = set()
    claimed: set[tuple[str, int, int]] = set()
    groups: dict[str, _Group] = {}
    whole: dict[str, str] = {}
    for name, layer in traced.named_modules():
        dims = _dimensions(layer)
        if not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        if dims is None:
            whole[name] = f"{type(layer).__name__} with groups or computed weights"
            continue
        if (f"{name}.weight", dims[0]["weight"]) in seen:
            continue
        size = layer.weight.shape[dims[0]["weight"]]
        try:
            pruner = graph.get_pruner_of_module(layer)
            members = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(size)))
            group = _group_of(members, names, size)
            claims = _claims(traced, group)
            if claims & claimed:
                raise ValueError("another group has some of its channels")
        except Exception as error:  # the library can raise any error
            whole[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        seen |= group.written.keys()
        if group.read:  # no layer reads the logits
            groups[name] = group
            claimed |= claims
    return groups, whole


def _claims(model: nn.Module, group: _Group) -> set[tuple[str, int, int]]:
    """The tensors, dimensions and indices of a group; raises ``ValueError`` where removing one of
    its channels would change others or weights that must not change."""
    own = dict(model.named_parameters(remove_duplicate=False))
    state, uses = model.state_dict(keep_vars=True), Counter(map(id, own.values()))
    found: set[tuple[str, int, int]] = set()
    for (name, dim), pairs in [*group.written.items(), *group.read.items()]:
        if name in own and uses[id(own[name])] > 1:
            raise ValueError(f"{name} is shared with another layer")
        if name in own and not own[name].requires_grad:
            raise ValueError(f"{name} is frozen")
        roots: dict[int, int] = {}
        for root, index in pairs:
            if not 0 <= index < state[name].shape[dim]:
                raise ValueError(f"torch-pruning finds channel {index} of {name}, which has fewer")
            if roots.setdefault(index, root) != root:
                raise ValueError(f"its channels meet in {name}")
            found.add((name, dim, index))
    return found


def _group_of(members: Iterable[Any], names: Mapping[int, str], size: int) -> _Group:
    group = _Group(size)
    for member in members:
        module, handler = member.dep.target.module, member.dep.handler
        if id(module) not in names:
            if isinstance(module, nn.Parameter):
                raise ValueError("a free parameter is coupled with it")
            continue  # additions, concatenations and the like
        dims = _dimensions(module)
        if dims is None:
            if next(module.parameters(), None) is None:
                continue  # activations
            raise ValueError(f"{names[id(module)]} is a {type(module).__name__}")
        reads = handler.__name__ == "prune_in_channels" and bool(dims[1])
        where = group.read if reads else group.written
        pairs = list(zip(member.root_idxs, member.idxs, strict=True))
        for leaf, dim in dims[int(reads)].items():
            where.setdefault((f"{names[id(module)]}.{leaf}", dim), []).extend(pairs)
    return group


def _channels(model: nn.Module, groups: Mapping[str, _Group], whole: Mapping[str, str]) -> Channels:
    state = model.state_dict(keep_vars=True)
    owners: dict[str, dict[int, Tensor]] = {}
    readers: dict[str, int] = {}
    start = 0
    for group in groups.values():
        for part in (group.written, group.read):
            for (name, dim), pairs in part.items():
                length = state[name].shape[dim]
                owner = owners.setdefault(name, {}).setdefault(dim, torch.full((length,), -1))
                channel, index = torch.tensor(sorted(set(pairs))).unbind(1)
                owner[index] = start + channel
                if part is group.read:
                    readers[name] = dim
        start += group.size
    scales = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in owners
    ]
    sizes = {name: group.size for name, group in groups.items()}
    # in the order of the state dict, so that iterating over them has a fixed order
    ordered = {name: owners[name] for name in state if name in owners}
    return Channels(sizes, ordered, readers, scales, dict(whole))


@torch.no_grad()
def _is_exact(model: nn.Module, channels: Channels, image_shape: Sequence[int]) -> bool:
    """Whether removing channels gives the same output as zeroing the weights that read them: every
    other channel, and random ones, since halves could hide that channels are coupled."""
    full = copy.deepcopy(model).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    for value in (*full.parameters(), *full.buffers()):
        if value.is_floating_point():  # initial values (1 and 0 of norms) could hide a mistake
            value.mul_(0.5 + torch.rand(value.shape, generator=generator, dtype=value.dtype))
            value.add_(0.01 * torch.rand(value.shape, generator=generator, dtype=value.dtype))
    x = torch.rand(2, *image_shape, generator=generator, dtype=torch.float64)
    sizes = channels.sizes
    tried = [torch.cat([torch.arange(size) % 2 == 0 for size in sizes.values()])]
    for seed, share in enumerate((0.3, 0.7)):
        counts = {name: math.ceil(share * size) for name, size in sizes.items()}
        tried.append(channels.first(counts, seed))
    for live in tried:
        try:
            small = narrow(copy.deepcopy(full), channels.kept(live))
            silenced = copy.deepcopy(full)
            silence(silenced, channels, ~live)
            expected, found = silenced(x), small(x)
        except Exception:  # whatever a forward pass with other sizes may raise
            return False
        if not isinstance(expected, Tensor) or expected.shape != found.shape:
            return False
        if not (expected - found).abs().max() <= _TOLERANCE * expected.abs().max():  # nor NaN
            return False
    return True


@torch.no_grad()
def silence(model: nn.Module, channels: Channels, silent: Tensor) -> None:
    """Zero in place all weights of a full-size network that read the ``silent`` channels."""
    state = model.state_dict(keep_vars=True)
    absent = torch.cat([silent, silent.new_zeros(1)])
    for name, dim in channels.readers.items():
        index = absent[channels.owners[name][dim]].nonzero().squeeze(1)
        state[name].index_fill_(dim, index.to(state[name].device), 0.0)
