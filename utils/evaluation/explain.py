"""Explains predictions by Grad-CAM and input saliency, and maps the loss around the weights.

All functions leave the network's weights, gradients, ``requires_grad`` flags and modes as found.
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

# images over which the loss surface is averaged; all if a split has fewer
LANDSCAPE_IMAGES = 256
_NO_EVIDENCE = 1e-30  # far below real evidence, above what ``_ACTIVE`` adds up to
_ACTIVE = torch.finfo(torch.float32).tiny  # practically zero, yet a ReLU passes its gradient

Direction = Mapping[str, Tensor]  # one tensor per parameter, by name


@dataclass(frozen=True)
class Explanation:
    """Explanations of a network's predictions and the loss around its weights.

    Attributes:
        indices, y: indices of the explained images in their data set, and their classes; int64
            ``[N]`` on the CPU.
        clean, attacked: predictions and explanations for the clean and the adversarial images.
        stage: the stage that Grad-CAM used.
        losses: float64 ``[2, grid, grid]``, clean and robust loss averaged over ``loss_images``
            images; see ``loss_surface``.
    """

    indices: Tensor
    y: Tensor
    clean: View
    attacked: View
    stage: CamStage
    losses: Tensor
    loss_images: int

    def figures(self, classes: Sequence[str]) -> dict[str, Any]:
        """The results as JSON values; ``classes`` are the class names."""
        clean, attacked = (v.answers(self.y, classes) for v in (self.clean, self.attacked))
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
    """Explain a network on images of a split, clean and attacked; the attack is crafted once, with
    the random starts of an evaluation.

    Args:
        images: number of images shown; at most the size of the split.
        grid: points per side of the loss surface; odd, at least 3.
        seed: of all random draws.
        on_point: called after each of the ``grid ** 2`` points.
    """
    shown = spread_images(split, images, seed)
    averaged = spread_images(split, min(LANDSCAPE_IMAGES, len(split)), seed)
    clean = view(model, shown.x, shown.y)
    attacked = view(model, _attacked(model, shown, attack, seed), shown.y)
    one, two = (filter_normalized_direction(model, seed, number) for number in (1, 2))
    sets = [averaged.x, _attacked(model, averaged, attack, seed)]
    losses = loss_surface(model, sets, averaged.y, (one, two), grid, on_point)
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
    """``n`` images of a split, spread as evenly as possible over the classes; a pure function of
    the split and ``seed``.

    Raises:
        ValueError: ``n`` is below 1 or above the size of the split.
    """
    if not 1 <= n <= len(split):
        raise ValueError(f"cannot choose {n} of {len(split)} images")
    indices = split.indices[
        permutation(len(split), stream(seed, "explain", "images"), split.device)
    ]
    members = F.one_hot(split.labels[indices])
    turn = ((members.cumsum(dim=0) - 1) * members).sum(dim=1)  # rank of the image within its class
    class_order = permutation(members.shape[1], stream(seed, "explain", "classes"), split.device)
    chosen = torch.argsort(
        turn * members.shape[1] + class_order[split.labels[indices]], stable=True
    )[:n]
    return next(plain_batches(split.subset(indices[chosen]), n))


# ---------------------------------------------------------------- predictions explained


@dataclass(frozen=True)
class View:
    """A network's predictions on some images and their explanations, on the CPU.

    Attributes:
        images: float32 ``[N, C, H, W]`` in [0, 1].
        probabilities: softmax outputs, float32 ``[N, classes]``.
        cam, saliency: maps for the true class, float32 ``[N, H, W]``; see ``grad_cam`` and
            ``input_saliency``.
    """

    images: Tensor
    probabilities: Tensor
    cam: Tensor
    saliency: Tensor

    def answers(self, y: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
        """For each image, the predicted class, its probability and that of the true class;
        ``classes`` are the class names."""
        true = self.probabilities.gather(1, y[:, None]).squeeze(1).tolist()
        best = self.probabilities.max(dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist(), true, strict=True)
        return [
            {"prediction": classes[answer], "probability": p, "probability_of_class": of_class}
            for answer, p, of_class in rows
        ]


def view(model: nn.Module, x: Tensor, y: Tensor) -> View:
    """Predict and explain images ``[N, C, H, W]`` in [0, 1] with labels ``y``, int64 ``[N]``."""
    with in_mode(model, False), torch.no_grad():
        probabilities = model(x).softmax(dim=1)
    return View(
        x.cpu(), probabilities.cpu(), grad_cam(model, x, y).cpu(), input_saliency(model, x, y).cpu()
    )


def grad_cam(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., 2017) of a class at the stage ``cam_stage`` picks, by captum.

    Args:
        model: a network of this project; run in eval mode.
        x: images ``[N, C, H, W]`` in [0, 1].
        classes: the class to locate in each image, int64 ``[N]``.

    Returns:
        Float32 ``[N, H, W]``, upsampled bilinearly from the stage's map and scaled so that each
        image's maximum is 1; 0 where there is no evidence for the class.

    Raises:
        ValueError: the stages of the network are not known.
        InputError: captum is not installed.
    """
    stage = _stages(model)[cam_stage(model, x).name]
    cam = captum_methods().LayerGradCam(model, stage)
    # The ReLU, for captum's hook and without a change to the logits. Clamped above zero: Grad-CAM
    # averages gradients over the whole map, and where a value is zero the ReLU that follows would
    # pass none.
    hook = stage.register_forward_hook(lambda module, given, output: output.clamp_min(_ACTIVE))
    with _gradients_of_images(model), hook:
        evidence = cam.attribute(x.detach(), target=classes).detach()
    evidence = F.threshold(evidence, _NO_EVIDENCE, 0.0)
    evidence = F.interpolate(evidence, x.shape[2:], mode="bilinear").squeeze(1)
    return evidence / evidence.amax(dim=(1, 2), keepdim=True).clamp_min(_NO_EVIDENCE)


def input_saliency(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Absolute gradient of the logit of ``classes``, maximum over channels; float32 ``[N, H, W]``.

    Takes the arguments of ``grad_cam``; by captum (Simonyan, Vedaldi and Zisserman, "Deep Inside
    Convolutional Networks", 2014). Raises ``InputError`` if captum is not installed.
    """
    saliency = captum_methods().Saliency(model)
    with _gradients_of_images(model):
        gradient = saliency.attribute(x.detach().clone().requires_grad_(), target=classes)
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
    """The stage that Grad-CAM uses: its ``name``, the (height, width) of its map, and the deeper
    stages, whose maps are ``too_small``: a single line or point."""

    name: str
    size: tuple[int, int]
    too_small: tuple[str, ...]


def cam_stage(model: nn.Module, x: Tensor) -> CamStage:
    """The deepest convolutional stage whose map of images ``x`` has at least 2x2 points; a smaller
    map cannot locate anything."""
    sizes: dict[str, tuple[int, int]] = {}
    with in_mode(model, False), torch.no_grad(), contextlib.ExitStack() as hooks:
        for name, module in _stages(model).items():

            def record(_: nn.Module, given: object, output: Tensor, name: str = name) -> None:
                sizes[name] = (output.shape[2], output.shape[3])

            hooks.enter_context(module.register_forward_hook(record))
        model(x[:1])
    *_, deepest = [name for name, size in sizes.items() if min(size) >= 2]
    names = list(sizes)
    return CamStage(deepest, sizes[deepest], tuple(names[names.index(deepest) + 1 :]))


def _stages(model: nn.Module) -> dict[str, nn.Module]:
    """The module whose output is each stage's feature map, by the stage's name, in order.

    In a VGG it is the last ReLU before each pool. In a pre-activation ResNet it is the batch norm
    that reads the stage's sum; its ReLU is a function, not a module, so ``grad_cam`` applies it.
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


@contextlib.contextmanager
def _gradients_of_images(model: nn.Module) -> Iterator[None]:
    """Eval mode, with gradients for the images only."""
    with in_mode(model, False), without_parameter_gradients(model), torch.enable_grad():
        yield


# ---------------------------------------------------------------- loss around the weights


def filter_normalized_direction(model: nn.Module, seed: int, number: int) -> dict[str, Tensor]:
    """A random direction in weight space, scaled to each filter's norm (Li et al., "Visualizing the
    Loss Landscape of Neural Nets", 2018).

    Without the scaling, larger weights would make a network look flatter, although batch norm
    cancels their scale.

    Args:
        seed, number: the Gaussian draws are a pure function of both and of the parameter's name.

    Returns:
        A tensor like each parameter, by name. Each convolution filter and each row of a linear
        layer has the norm of the network's own. Entries for biases, batch norms and masked (zero)
        weights are zero, so a sparse network keeps its masks.
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
    """Float64 ``[grid]``, evenly spaced over [-1, 1] with an exact zero in the middle; raises
    ``ValueError`` unless ``grid`` is odd and at least 3."""
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
    """Mean cross-entropy on a plane through a network's weights, in eval mode.

    Args:
        image_sets: each ``[N, C, H, W]`` in [0, 1], of the same classes.
        y: the classes, int64 ``[N]``.
        directions: two results of ``filter_normalized_direction``.
        grid: points per side; see ``grid_coordinates``.
        on_point: called after each of the ``grid ** 2`` points.

    Returns:
        Float64 ``[len(image_sets), grid, grid]``: entry ``[s, i, j]`` is set s's loss at coordinate
        i of the first direction and coordinate j of the second.
    """
    coordinates = grid_coordinates(grid).tolist()
    losses = torch.empty(len(image_sets), grid, grid, dtype=torch.float64)
    own = dict(model.named_parameters())
    with in_mode(model, False), torch.no_grad():
        for i, first in enumerate(coordinates):
            for j, second in enumerate(coordinates):
                moved = {
                    name: weight + first * directions[0][name] + second * directions[1][name]
                    for name, weight in own.items()
                }
                logits = [torch.func.functional_call(model, moved, (x,)) for x in image_sets]
                losses[:, i, j] = torch.stack([F.cross_entropy(found, y) for found in logits])
                on_point()
    return losses
