"""Why a network answers as it does, and how flat its loss is: Grad-CAM, input saliency, the loss
around its weights.

Functions of networks, images and a seed. A network's weights, gradients, flags and modes are left
as found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch, Split, plain_batches
from models.modes import in_mode, without_parameter_gradients
from utils.attacks import PGD, attack_draws, pgd_attack
from utils.errors import InputError
from utils.seeding import permutation, stream, uniform

# over which the losses around a network are averaged; all where there are fewer
LANDSCAPE_IMAGES = 256
_NO_EVIDENCE = 1e-30  # far below any evidence and above what ``_ACTIVE`` adds up to
_ACTIVE = torch.finfo(torch.float32).tiny  # counts as zero, and yet a ReLU passes its gradient

Direction = Mapping[str, Tensor]  # of each parameter, by name


@dataclass(frozen=True)
class Explanation:
    """What was found out about a network.

    Attributes:
        indices, y: of the images looked at, in their data set, and their classes; int64 ``[N]`` on
            the CPU.
        clean, attacked: how the network sees them.
        stage: where Grad-CAM looked.
        losses: float64 ``[2, grid, grid]``, clean and robust, see ``loss_surface``; over
            ``loss_images`` images.
    """

    indices: Tensor
    y: Tensor
    clean: View
    attacked: View
    stage: CamStage
    losses: Tensor
    loss_images: int

    def figures(self, classes: Sequence[str]) -> dict[str, Any]:
        """All of it as plain values; ``classes`` are names."""
        clean, attacked = (
            self.clean.answers(self.y, classes),
            self.attacked.answers(self.y, classes),
        )
        rows = zip(self.indices.tolist(), self.y.tolist(), clean, attacked, strict=True)
        losses = dict(zip(("clean", "robust"), self.losses.tolist(), strict=True))
        return {
            "images": [
                {"index": index, "class": classes[y], "clean": before, "attacked": after}
                for index, y, before, after in rows
            ],
            "grad_cam": asdict(self.stage),
            "landscape": {
                "images": self.loss_images,
                "coordinates": grid_coordinates(self.losses.shape[1]).tolist(),
                **losses,
            },
        }


def explain(
    model: nn.Module,
    split: Split,
    attack: PGD,
    *,
    images: int,
    grid: int,
    seed: int,
    on_point: Callable[[], object] = lambda: None,
) -> Explanation:
    """Look at a network with some images of a split, clean and under an attack crafted once, with
    the starts of an evaluation.

    Args:
        images: how many are shown; at most the split has.
        grid: points a side of the loss surface; odd, at least 3.
        seed: of every draw.
        on_point: called after each of the ``grid ** 2`` points.
    """
    shown, averaged = (
        spread_images(split, images, seed),
        spread_images(split, min(LANDSCAPE_IMAGES, len(split)), seed),
    )
    clean = view(model, shown.x, shown.y)
    attacked = view(model, _attacked(model, shown, attack, seed), shown.y)
    directions = (
        filter_normalized_direction(model, seed, 1),
        filter_normalized_direction(model, seed, 2),
    )
    sets = [averaged.x, _attacked(model, averaged, attack, seed)]
    losses = loss_surface(model, sets, averaged.y, directions, grid, on_point)
    return Explanation(
        shown.indices.cpu(),
        shown.y.cpu(),
        clean,
        attacked,
        cam_stage(model, shown.x),
        losses,
        len(averaged.y),
    )


def _attacked(model: nn.Module, batch: Batch, attack: PGD, seed: int) -> Tensor:
    return pgd_attack(
        model,
        batch.x,
        batch.y,
        attack,
        draws=attack_draws(attack, batch.indices, batch.x.shape[1:], seed, "evaluate"),
    )


def spread_images(split: Split, n: int, seed: int) -> Batch:
    """``n`` images of a split, as many of each class as can be (one more of some): a pure function
    of ``seed``.

    Raises:
        ValueError: the split has fewer images.
    """
    if not 1 <= n <= len(split):
        raise ValueError(f"cannot choose {n} of {len(split)} images")
    indices = split.indices[
        permutation(len(split), stream(seed, "explain", "images"), split.device)
    ]
    members = F.one_hot(split.labels[indices])
    turn = ((members.cumsum(dim=0) - 1) * members).sum(dim=1)  # the how manieth of its class
    class_order = permutation(members.shape[1], stream(seed, "explain", "classes"), split.device)
    chosen = torch.argsort(
        turn * members.shape[1] + class_order[split.labels[indices]], stable=True
    )[:n]
    return next(plain_batches(split.subset(indices[chosen]), n))


# ---------------------------------------------------------------- at images


@dataclass(frozen=True)
class View:
    """Some images as the network sees them, on the CPU.

    Attributes:
        images: float32 ``[N, C, H, W]`` in [0, 1].
        probabilities: of each class, float32 ``[N, classes]``.
        cam, saliency: of the true class, float32 ``[N, H, W]``; see ``grad_cam`` and
            ``input_saliency``.
    """

    images: Tensor
    probabilities: Tensor
    cam: Tensor
    saliency: Tensor

    def answers(self, y: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
        """For each image the predicted class, its probability and the true one's; ``classes`` are
        names."""
        true = self.probabilities.gather(1, y[:, None]).squeeze(1).tolist()
        best = self.probabilities.max(dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist(), true, strict=True)
        return [
            {"prediction": classes[answer], "probability": p, "probability_of_class": of_class}
            for answer, p, of_class in rows
        ]


def view(model: nn.Module, x: Tensor, y: Tensor) -> View:
    """How the network sees images ``[N, C, H, W]`` in [0, 1] of the classes ``y``, int64
    ``[N]``."""
    with in_mode(model, False), torch.no_grad():
        probabilities = model(x).softmax(dim=1)
    return View(
        x.cpu(), probabilities.cpu(), grad_cam(model, x, y).cpu(), input_saliency(model, x, y).cpu()
    )


def grad_cam(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Where the network finds a class (Selvaraju et al., "Grad-CAM", 2017), at ``cam_stage``; by
    captum.

    Args:
        model: a network of this project; seen in eval mode.
        x: images ``[N, C, H, W]`` in [0, 1].
        classes: the class looked for in each, int64 ``[N]``.

    Returns:
        Float32 ``[N, H, W]``, bilinear from the stage's map: 1 at the image's highest point, 0
        where nothing speaks for the class.

    Raises:
        ValueError: a network whose stages are not known.
        InputError: captum is not installed.
    """
    stage = _stages(model)[cam_stage(model, x).name]
    with _gradients_of_images(model), _activated(stage):
        evidence = (
            captum_methods()
            .LayerGradCam(model, stage)
            .attribute(x.detach(), target=classes)
            .detach()
        )
    evidence = F.threshold(evidence, _NO_EVIDENCE, 0.0)
    evidence = F.interpolate(
        evidence, size=x.shape[2:], mode="bilinear", align_corners=False
    ).squeeze(1)
    return evidence / evidence.amax(dim=(1, 2), keepdim=True).clamp_min(_NO_EVIDENCE)


def input_saliency(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """How much each pixel moves the logit of ``classes``: the gradient's size, the largest of the
    channels, float32 ``[N, H, W]``.

    Arguments as for ``grad_cam`` (Simonyan, Vedaldi and Zisserman, "Deep Inside Convolutional
    Networks", 2014); by captum.
    """
    with _gradients_of_images(model):
        gradient = (
            captum_methods()
            .Saliency(model)
            .attribute(x.detach().clone().requires_grad_(), target=classes)
        )
    return gradient.detach().amax(dim=1)


def captum_methods() -> Any:
    """The module ``captum.attr``; raises ``InputError`` where captum is not installed."""
    try:
        from captum import attr
    except ImportError as error:
        raise InputError(
            f"Grad-CAM and saliency need captum ({error}); pip install captum"
        ) from error
    return attr


@dataclass(frozen=True)
class CamStage:
    """Where Grad-CAM looks: a stage's ``name``, the ``size`` of its map, and the deeper stages
    whose map is a single line or point."""

    name: str
    size: tuple[int, int]
    too_small: tuple[str, ...]


def cam_stage(model: nn.Module, x: Tensor) -> CamStage:
    """The last convolutional stage whose map of images ``x`` has at least 2x2 points: a smaller one
    has no places to compare."""
    with in_mode(model, False), torch.no_grad(), _recorded(_stages(model)) as maps:
        model(x[:1])
    name, names = _deepest_with_area(maps), list(maps)
    height, width = maps[name].shape[2:]
    return CamStage(name, (height, width), tuple(names[names.index(name) + 1 :]))


def _stages(model: nn.Module) -> dict[str, nn.Module]:
    """Which module gives a stage's feature map, by the stage's name and in order.

    A VGG's stages are its last ReLUs before each pool. In the pre-activation ResNets it is the norm
    that reads the stage's sum, whose
    ReLU is a function and no module: see ``_activated``.
    """
    if isinstance(layers := getattr(model, "features", None), nn.Sequential):
        followed = zip(layers, list(layers)[1:], strict=False)
        return {
            f"features.{i}": layer
            for i, (layer, following) in enumerate(followed)
            if isinstance(following, nn.MaxPool2d)
        }
    if hasattr(model, "layer1"):
        readers = {
            "layer1": "layer2.0.bn1",
            "layer2": "layer3.0.bn1",
            "layer3": "layer4.0.bn1",
            "layer4": "bn",
        }
    elif hasattr(model, "block1"):
        readers = {"block1": "block2.layer.0.bn1", "block2": "block3.layer.0.bn1", "block3": "bn1"}
    else:
        raise ValueError(
            f"{type(model).__name__} is neither a ResNet, a VGG nor a wide ResNet of this project"
        )
    return {stage: model.get_submodule(norm) for stage, norm in readers.items()}


def _deepest_with_area(maps: Mapping[str, Tensor]) -> str:
    return [name for name, features in maps.items() if min(features.shape[2:]) >= 2][-1]


@contextlib.contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The outputs of modules, by name, once the network has run within."""
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, given, output: outputs.__setitem__(name, output)

    hooks = [module.register_forward_hook(recorder(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _activated(stage: nn.Module) -> Iterator[None]:
    """The module's output is the map after its ReLU, for hooks that come later; the network
    computes what it did."""

    def activate(module: nn.Module, given: object, output: Tensor) -> Tensor:
        # Not zero: the ReLU that follows a norm would pass no gradient to what lies there, and
        # Grad-CAM averages over the whole map.
        return output.clamp_min(_ACTIVE)

    hook = stage.register_forward_hook(activate)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _gradients_of_images(model: nn.Module) -> Iterator[None]:
    """Eval mode, and gradients of images alone."""
    with in_mode(model, False), without_parameter_gradients(model), torch.enable_grad():
        yield


# ---------------------------------------------------------------- around the weights


def filter_normalized_direction(model: nn.Module, seed: int, number: int) -> dict[str, Tensor]:
    """A random direction in weight space on the scale of each filter (Li et al., "Visualizing the
    Loss Landscape of Neural Nets", 2018).

    Without that scale a network would look flatter merely because its weights, which batch norm
    undoes, are larger.

    Args:
        model: not changed.
        seed, number: the Gaussian draws are a pure function of both and of the parameter's name.

    Returns:
        For each parameter a tensor like it. Each filter of a convolution, and each row of a linear
        layer, has the norm of the network's own; zero are biases, batch norms, and masked (zero)
        weights, so that a sparse network keeps its masks.
    """
    return {
        name: _filter_normalized(p.detach(), stream(seed, "landscape", number, name))
        for name, p in model.named_parameters()
    }


def _filter_normalized(weight: Tensor, key: int) -> Tensor:
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    draws = uniform(key, torch.arange(weight.numel(), device=weight.device)).view(weight.shape)
    direction = torch.special.ndtri(draws).masked_fill(weight == 0, 0.0)
    own, drawn = (
        torch.linalg.vector_norm(t.flatten(1), dim=1).view(-1, *[1] * (t.ndim - 1))
        for t in (weight, direction)
    )
    return direction * (own / drawn.clamp_min(torch.finfo(weight.dtype).tiny))


def grid_coordinates(grid: int) -> Tensor:
    """``grid`` (odd) even steps over [-1, 1], exactly zero in the middle; float64."""
    if grid < 3 or grid % 2 == 0:
        raise ValueError(
            f"a grid with a centre has an odd number of points, at least 3, and not {grid}"
        )
    return torch.arange(1 - grid, grid, 2, dtype=torch.float64) / (grid - 1)


def loss_surface(
    model: nn.Module,
    image_sets: Sequence[Tensor],
    y: Tensor,
    directions: tuple[Direction, Direction],
    grid: int,
    on_point: Callable[[], object] = lambda: None,
) -> Tensor:
    """Mean cross-entropy around a network, in eval mode with its stored batch-norm statistics.

    Args:
        model: its weights move along the way, and are restored to the bit.
        image_sets: each ``[N, C, H, W]`` in [0, 1], of the same classes.
        y: the classes, int64 ``[N]``.
        directions: two of ``filter_normalized_direction``.
        grid: points a side, see ``grid_coordinates``.
        on_point: called after each of the ``grid ** 2`` points.

    Returns:
        Float64 ``[len(image_sets), grid, grid]``: entry ``[s, i, j]`` is set s's loss at coordinate
        i of the first direction and coordinate j of the second.
    """
    coordinates = grid_coordinates(grid).tolist()
    losses = torch.empty(len(image_sets), grid, grid, dtype=torch.float64)
    with in_mode(model, False), torch.no_grad(), _weights_put_back(model) as weights:
        for i, first in enumerate(coordinates):
            for j, second in enumerate(coordinates):
                for name, parameter in model.named_parameters():
                    # From the copy each time, so that no rounding adds up and the centre is the
                    # network itself.
                    parameter.copy_(
                        weights[name] + first * directions[0][name] + second * directions[1][name]
                    )
                losses[:, i, j] = torch.stack(
                    [F.cross_entropy(model(images), y) for images in image_sets]
                )
                on_point()
    return losses


@contextlib.contextmanager
def _weights_put_back(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Copies of the parameters, by name, from which they are restored in the end."""
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        yield weights
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
