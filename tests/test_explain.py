import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from models.channels import narrow, plan_largest
from tests import toy
from utils.attacks import PGD
from utils.errors import InputError
from utils.evaluation.explain import (
    CamStage,
    cam_stage,
    explain,
    filter_normalized_direction,
    grad_cam,
    grid_coordinates,
    input_saliency,
    loss_surface,
    spread_images,
)
from utils.evaluation.explain_figures import landscape_figure, saliency_figure

NETWORKS = {
    "resnet18": {"width": 0.0625},
    "resnet50": {"width": 0.0625},
    "vgg16": {"width": 0.0625},
    "wideresnet": {"depth_factor": 10, "width_factor": 1},
}
LAST_STAGES = {
    "resnet18": ("layer4", 4),
    "resnet50": ("layer4", 4),
    "vgg16": ("features.42", 2),
    "wideresnet": ("block3", 8),
}
PICTURES = ["explain.json", "landscape.png", "saliency.png"]


def network(arch, **options):
    """A network in train mode, so that a changed mode shows, with statistics of some images."""
    model = build_model(arch, 3, **NETWORKS[arch], **options)
    channels = model.normalize.mean.numel()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(8, channels, 32, 32, generator=torch.Generator().manual_seed(0)))
    return model


def images(n=3, side=32, channels=3):
    return (
        torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(1)),
        torch.arange(n) % 3,
    )


@contextlib.contextmanager
def left_as_found(model):
    """Asserts that weights, statistics, gradients, ``requires_grad``, modes and hooks stay."""
    modules, parameters = list(model.modules()), list(model.parameters())
    parameters[0].requires_grad_(False)
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    modules[-1].eval()

    def seen():
        state = [(name, value.numpy().tobytes()) for name, value in model.state_dict().items()]
        gradients = [
            None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters
        ]
        hooks = sum(len(module._forward_hooks) for module in modules)
        return (
            state,
            gradients,
            [parameter.requires_grad for parameter in parameters],
            [module.training for module in modules],
            hooks,
        )

    before = seen()
    yield
    assert seen() == before


# ---------------------------------------------------------------- which images


def test_images_are_spread_over_the_classes_and_a_function_of_the_seed():
    split = toy.split(40, classes=4)
    six = spread_images(split, 6, seed=1)
    assert len(set(six.indices.tolist())) == 6
    assert sorted(six.y.bincount(minlength=4).tolist()) == [1, 1, 2, 2]
    assert set(six.y[:4].tolist()) == {0, 1, 2, 3}
    assert (
        (six.x * 255).round().to(torch.uint8).equal(split.images[six.indices].permute(0, 3, 1, 2))
    )
    assert six.y.equal(split.labels[six.indices])
    assert spread_images(split, 6, seed=1).indices.equal(six.indices)
    assert not spread_images(split, 6, seed=2).indices.equal(six.indices)


def test_only_rows_of_the_split_are_chosen_and_no_more_than_there_are():
    split = toy.split(40, classes=4).subset(torch.tensor([1, 5, 9, 2]))
    assert sorted(spread_images(split, 4, seed=1).indices.tolist()) == [1, 2, 5, 9]
    assert set(spread_images(split, 2, seed=1).y.tolist()) == {1, 2}
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"cannot choose {n} of 4"):
            spread_images(split, n, seed=1)


# ---------------------------------------------------------------- Grad-CAM and saliency


class Bright(nn.Module):
    """Two maps, the image and its negative. Class 0 weights the first, class 1 the second, and
    class 2 both negatively."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.MaxPool2d(1))
        self.classifier = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.features[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
            self.features[0].bias.copy_(torch.tensor([0.0, 1.0]))
            self.classifier.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 5.0], [-1.0, -1.0]]))

    def forward(self, x):
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def test_grad_cam_by_hand():
    x = torch.linspace(0.1, 0.8, 16).view(1, 1, 4, 4).repeat(3, 1, 1, 1)
    maps = grad_cam(Bright(), x, torch.tensor([0, 1, 2]))
    assert torch.allclose(maps[0], x[0, 0] / 0.8, atol=1e-6)
    assert torch.allclose(maps[1], (1 - x[0, 0]) / 0.9, atol=1e-6)
    assert maps[2].eq(0).all()


def test_saliency_by_hand():
    x = torch.linspace(0.1, 0.8, 16).view(1, 1, 4, 4).repeat(3, 1, 1, 1)
    saliency = input_saliency(Bright(), x, torch.tensor([0, 1, 2]))
    # weight over number of pixels; the third class sees the sum of both maps, which is constant
    expected = torch.tensor([3.0, 5.0, 0.0]) / 16
    assert torch.allclose(saliency, expected.view(3, 1, 1).expand(3, 4, 4), atol=1e-7)


def test_saliency_is_the_largest_of_the_channels():
    model, (x, y) = toy.network().eval(), toy.images(5)
    expected = torch.zeros(5, 8, 8)
    for i in range(5):
        pixels = x[i : i + 1].clone().requires_grad_()
        model(pixels)[0, y[i]].backward()
        expected[i] = pixels.grad[0].abs().amax(dim=0)
    assert torch.allclose(input_saliency(model, x, y), expected, atol=1e-7)


def enlarged(evidence, side=32):
    """A stage's map as ``grad_cam`` returns it; asserts that it shows some evidence."""
    evidence = F.interpolate(evidence.relu(), size=(side, side), mode="bilinear").squeeze(1)
    assert evidence.max() > 1e-4
    return evidence / evidence.amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)


def last_map(model, x):
    """The input of the global average pooling, or of a VGG's last pooling."""
    x = model.normalize(x)
    if hasattr(model, "features"):
        return model.features[:-1](x)
    if hasattr(model, "layer1"):
        return model.bn(
            model.layer4(model.layer3(model.layer2(model.layer1(model.conv1(x)))))
        ).relu()
    return model.bn1(model.block3(model.block2(model.block1(model.conv1(x))))).relu()


@pytest.mark.parametrize("kept", [None, 0.5])
@pytest.mark.parametrize("arch", NETWORKS)
def test_grad_cam_at_the_last_stage_is_cam(arch, kept):
    """CAM (Zhou et al., 2016): the map weighted by the classifier's row of the class."""
    model, (x, y) = network(arch), images()
    if kept is not None:
        plan, live, _ = plan_largest(model, x.shape[1:], kept, floor=kept, multiple=1)
        model = narrow(model, plan.channels.kept(live))
    model.eval()
    *_, classifier = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        cam = (classifier.weight[y, :, None, None] * last_map(model, x)).sum(dim=1, keepdim=True)
    assert torch.allclose(grad_cam(model, x, y), enlarged(cam), atol=1e-5)


def test_grad_cam_at_a_stage_before_is_of_the_map_that_both_branches_read():
    model, (x, y) = network("resnet18").eval(), images(side=8)
    first, second = model.layer4
    with torch.no_grad():
        activation = first.bn1(
            model.layer3(model.layer2(model.layer1(model.conv1(model.normalize(x)))))
        ).relu()
    activation.requires_grad_()
    out = first.conv2(first.bn2(first.conv1(activation)).relu()) + first.shortcut(activation)
    logits = model.linear(model.bn(second(out)).relu().mean(dim=(2, 3)))
    (gradient,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), activation)
    evidence = (
        (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1, keepdim=True).detach()
    )
    assert torch.allclose(grad_cam(model, x, y), enlarged(evidence, side=8), atol=1e-4)


def test_a_map_without_activation_is_no_evidence():
    model, (x, y) = network("resnet18"), images()
    with torch.no_grad():
        model.bn.bias.fill_(-100.0)
        model.linear.weight.fill_(1.0)
    assert grad_cam(model, x, y).eq(0).all()


def test_without_captum_there_is_one_line(monkeypatch, run_explain, tmp_path):
    monkeypatch.setitem(sys.modules, "captum", None)
    for method in (grad_cam, input_saliency):
        with pytest.raises(InputError, match="pip install captum"):
            method(network("resnet18"), *images())
    outcome = run_explain(foreign(tmp_path / "good.pth.tar", 10), "--test_subset", 20, "--grid", 3)
    assert (
        outcome.code,
        outcome.out,
        outcome.err.count("\n"),
        "pip install captum" in outcome.err,
    ) == (2, "", 1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["good.pth.tar"]


@pytest.mark.parametrize("arch", NETWORKS)
def test_every_family_has_a_last_stage_and_is_left_as_found(arch):
    model, (x, y) = network(arch), images()
    name, side = LAST_STAGES[arch]
    with left_as_found(model):
        assert cam_stage(model, x) == CamStage(name, (side, side), ())
        maps, saliency = grad_cam(model, x, y), input_saliency(model, x, y)
    for found in (maps, saliency):
        assert found.shape == (3, 32, 32)
        assert not found.requires_grad
        assert found.min() >= 0
    assert all(peak in (0.0, 1.0) for peak in maps.amax(dim=(1, 2)).tolist())


def test_small_images_are_seen_at_the_last_stage_with_places():
    model = network("resnet18", mean=[0.3], std=[0.4])
    x, y = images(side=8, channels=1)
    assert cam_stage(model, x) == CamStage("layer3", (2, 2), ("layer4",))
    assert grad_cam(model, x, y).shape == (3, 8, 8)


def test_another_network_has_no_stages():
    with pytest.raises(ValueError, match="neither a ResNet"):
        grad_cam(toy.network(), *toy.images(2))


# ---------------------------------------------------------------- the loss landscape


def test_a_direction_has_the_norm_of_each_filter_and_keeps_masks():
    model = network("vgg16")  # convolutions with biases
    with torch.no_grad():
        model.features[3].weight[:, ::2] = 0.0
        model.features[0].weight[1] = 0.0
    direction = filter_normalized_direction(model, 1, 1)
    assert direction.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            assert torch.allclose(
                direction[name].flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1), rtol=1e-4
            )
            assert direction[name][weight == 0].eq(0).all()
            assert direction[name][weight != 0].ne(0).float().mean() > 0.99
        else:
            assert direction[name].eq(0).all()


def test_directions_are_functions_of_the_seed():
    model = network("resnet18")
    one, again = filter_normalized_direction(model, 1, 1), filter_normalized_direction(model, 1, 1)
    name = "layer1.0.conv1.weight"
    assert all(one[n].equal(again[n]) for n in one)
    for other in (
        filter_normalized_direction(model, 1, 2),
        filter_normalized_direction(model, 2, 1),
    ):
        cosine = F.cosine_similarity(one[name].flatten(), other[name].flatten(), dim=0)
        assert abs(cosine) < 0.35
    assert not one[name].equal(one["layer1.0.conv2.weight"])


def test_coordinates_have_their_zero_in_the_middle():
    assert grid_coordinates(3).tolist() == [-1.0, 0.0, 1.0]
    assert grid_coordinates(15)[7] == 0
    assert grid_coordinates(15)[[0, -1]].tolist() == [-1.0, 1.0]
    for grid in (1, 4):
        with pytest.raises(ValueError, match="odd"):
            grid_coordinates(grid)


def test_the_surface_is_the_loss_at_moved_weights_and_the_network_is_left_as_found():
    model, (x, y) = network("resnet18"), images(6)
    directions = filter_normalized_direction(model, 1, 1), filter_normalized_direction(model, 1, 2)
    points = []
    with left_as_found(model):
        losses = loss_surface(model, [x, 1 - x], y, directions, 3, lambda: points.append(1))
    assert (losses.shape, losses.dtype, len(points)) == ((2, 3, 3), torch.float64, 9)
    model.eval()
    with torch.no_grad():
        assert losses[:, 1, 1].tolist() == [
            F.cross_entropy(model(pixels), y).item() for pixels in (x, 1 - x)
        ]
        for name, parameter in model.named_parameters():
            parameter += directions[0][name] - directions[1][name]
        assert losses[0, 2, 0].item() == pytest.approx(
            F.cross_entropy(model(x), y).item(), rel=1e-4
        )


def test_weights_come_back_from_a_stop_half_way():
    model, (x, y) = network("resnet18"), images()
    directions = filter_normalized_direction(model, 1, 1), filter_normalized_direction(model, 1, 2)

    def stop():
        raise KeyboardInterrupt

    with left_as_found(model), pytest.raises(KeyboardInterrupt):
        loss_surface(model, [x], y, directions, 3, stop)


# ---------------------------------------------------------------- the whole explanation


@pytest.mark.parametrize("arch", ["vgg16", "wideresnet"])
def test_the_pictures_of_a_network(arch):
    model = network(arch)
    split = toy.split(12, side=32)
    with left_as_found(model):
        found = explain(model, split, PGD(8 / 255, 2 / 255, 2), images=2, grid=3, seed=1)
    classes = ["ant", "bee", "cow"]
    assert (found.attacked.images - found.clean.images).abs().max() <= 8 / 255 + 1e-6
    assert found.loss_images == 12
    picture = saliency_figure(found, classes, "PGD-2", "title")
    assert len(picture.axes) == 3 * 7
    assert [axes.get_ylabel() for axes in picture.axes[7::7]] == [classes[y] for y in found.y]
    answer = found.figures(classes)["images"][1]["attacked"]
    shown = picture.axes[14 + 4]
    assert shown.get_title() == f"predicted {answer['prediction']} ({answer['probability']:.2f})"
    titles = [axes.get_title() for axes in landscape_figure(found, "PGD-2", "title").axes]
    assert titles[:3] == [
        "clean loss",
        "robust loss (PGD-2), crafted at the centre",
        "cuts through the network",
    ]


def test_an_attack_of_no_size_and_a_flat_loss_can_be_drawn():
    model = network("resnet18")
    with torch.no_grad():
        model.linear.weight.zero_()
    found = explain(model, toy.split(12, side=16), PGD(0.0, 0.0, 0), images=1, grid=3, seed=1)
    assert found.losses.eq(found.losses[0, 0, 0]).all()
    assert found.clean.cam.eq(0).all()
    for figure in (
        saliency_figure(found, ["a", "b", "c"], "PGD-0", ""),
        landscape_figure(found, "PGD-0", ""),
    ):
        figure.draw_without_rendering()


@pytest.fixture
def run_explain(monkeypatch, capsys):
    return toy.Command("scripts.explain", monkeypatch, capsys)


@pytest.fixture
def checkpoint(finished, tmp_path) -> Path:
    return finished(*toy.TOY_RUN, to=tmp_path / "runs") / "model_RA_best.pth.tar"


def test_the_script_explains_a_checkpoint(checkpoint):
    options = "--explain_images 3 --grid 3 --test_step 2".split()
    result = subprocess.run(
        [sys.executable, "scripts/explain.py", str(checkpoint), *options],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    folder = checkpoint.parent / "explain"
    assert str(folder) in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == PICTURES
    for name in PICTURES[1:]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "explain.json").read_text())
    assert content["checkpoint"] == str(checkpoint)
    assert content["settings"]["test_step"] == 2
    assert content["grad_cam"] == {"name": "layer3", "size": [2, 2], "too_small": ["layer4"]}
    assert len(content["images"]) == len({image["class"] for image in content["images"]}) == 3
    assert {"versions", "revision", "device", "hardware"} <= content.keys()
    landscape = content["landscape"]
    assert (landscape["images"], landscape["coordinates"]) == (60, [-1.0, 0.0, 1.0])
    assert [len(row) for row in landscape["robust"]] == [3, 3, 3]
    assert landscape["robust"][1][1] > landscape["clean"][1][1]


def test_the_script_explains_a_network_without_some_channels(run_eb, run_explain, tmp_path):
    flags = [
        *toy.TOY_BIRD,
        *toy.EASY_TICKET,
        "--pruning",
        "channel",
        "--density",
        "0.5",
        "--save_dir",
        tmp_path / "runs",
    ]
    assert run_eb(*flags).code == 0
    narrow_one = next((tmp_path / "runs").glob("*/model_RA_best.pth.tar"))
    outcome = run_explain(
        "--grid", 3, narrow_one, "--out", tmp_path / "new" / "pictures", "--explain-images", 2
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "new" / "pictures").iterdir()) == PICTURES


def foreign(path: Path, classes: int, weight: float | None = None) -> Path:
    """Save a checkpoint without settings, of a network for grey images; ``weight`` replaces its
    first weight."""
    spec = {
        "arch": "resnet18",
        "num_classes": classes,
        "mean": [0.0],
        "std": [1.0],
        "width": 0.0625,
        "image_size": 8,
    }
    state = build_model(**spec).state_dict()
    if weight is not None:
        state["conv1.weight"][0, 0, 0, 0] = weight
    torch.save(
        {"state_dict": state, "network": {**spec, "depth_factor": 34, "width_factor": 10}}, path
    )
    return path


def test_bad_input_is_one_line_and_nothing_is_written(run_explain, tmp_path):
    good, wrong = foreign(tmp_path / "good.pth.tar", 10), foreign(tmp_path / "wrong.pth.tar", 3)
    blocked = tmp_path / "file"
    blocked.write_text("")
    cases = {
        "no such checkpoint": [tmp_path / "missing.pth.tar"],
        "the checkpoint comes first": ["--test_step", 3, good],
        "has 3 classes but the data has 10": [wrong],
        "cannot write into": [good, "--out", blocked / "inside"],
        "there are 20 test images": [good, "--test_subset", 20, "--explain_images", 21],
        "from 1 to 100": [good, "--explain_images", 0],
        "at least 3, not 1": [good, "--grid", 1],
        "must be odd": [good, "--grid", 4],
        "--restarts has no effect": [good, "--restarts", 2],
        "--pretrained has no effect": [good, "--pretrained", wrong],
        "unknown argument --gird": [good, "--gird", 3],
        "--epochs has no effect": [good, "--epochs", 3],
        "invalid int value": [good, "--grid", "large"],
    }
    before = sorted(tmp_path.rglob("*"))
    for message, arguments in cases.items():
        outcome = run_explain(*arguments)
        assert (outcome.code, outcome.out) == (2, ""), message
        assert message in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_network_of_no_finite_loss_is_refused(run_explain, tmp_path):
    outcome = run_explain(
        foreign(tmp_path / "broken.pth.tar", 10, weight=float("nan")),
        "--grid",
        3,
        "--test_subset",
        20,
    )
    assert outcome.code == 2
    assert "not finite" in outcome.err
    assert not list((tmp_path / "explain").iterdir())
