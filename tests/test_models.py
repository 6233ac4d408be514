import json
import subprocess
import sys

import pytest
import torch

from models import ARCHITECTURES, build_model, check_image_size


@pytest.mark.parametrize("arch", ["resnet18", "vgg16", "wideresnet"])
def test_state_dict_equals_the_oracle(arch, golden):
    expected = json.loads((golden / "state_dict_shapes.json").read_text())[arch]
    state = build_model(arch, 10).state_dict()
    assert [[name, list(value.shape)] for name, value in state.items()] == expected


def small(arch, **options):
    if arch == "wideresnet":
        return build_model(arch, 7, depth_factor=10, width_factor=1, **options)
    return build_model(arch, 7, width=0.0625, **options)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_family_takes_32_and_64(arch, side):
    assert small(arch, image_size=side).eval()(torch.rand(2, 3, side, side)).shape == (2, 7)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_resnets_take_8_and_one_channel(arch):
    model = small(arch, mean=[0.3], std=[0.4], image_size=8)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(("arch", "side"), [("vgg16", 8), ("vgg11", 16), ("resnet18", 4)])
def test_a_network_that_cannot_take_a_size_says_so_by_name(arch, side):
    with pytest.raises(ValueError, match=f"{arch} cannot take {side}x{side}"):
        check_image_size(arch, side)


def test_aliases_and_unknown_names():
    assert (
        build_model("vgg16_bn", 3, width=0.1).state_dict().keys()
        == build_model("vgg16", 3, width=0.1).state_dict().keys()
    )
    with pytest.raises(ValueError, match="unknown architecture"):
        build_model("resnet19", 10)


@pytest.mark.parametrize(
    ("width", "share"), [(0.223, 0.05), (0.316, 0.10), (0.448, 0.20), (0.775, 0.60), (0.895, 0.80)]
)
def test_small_dense_widths_keep_the_share_of_weights_they_stand_for(width, share):
    def count(model):
        return sum(p.numel() for p in model.parameters())

    assert count(build_model("resnet18", 10, width=width)) / count(
        build_model("resnet18", 10)
    ) == pytest.approx(share, rel=0.03)


@pytest.mark.parametrize("channels", [(4, 8), (15, 30), (16, 32)])
def test_a_strided_pointwise_convolution_is_the_plain_one(channels):
    from models.resnet import conv1x1

    ours, plain = conv1x1(*channels, stride=2), torch.nn.Conv2d(*channels, 1, stride=2, bias=False)
    plain.load_state_dict(ours.state_dict())
    x = torch.rand(4, channels[0], 9, 9)
    assert torch.allclose(ours(x), plain(x), atol=1e-6)


def test_narrow_networks_train_on_odd_batches_in_channels_last():
    """Plain strided 1x1 convolutions corrupt the heap here (torch 2.13 on a CPU with AVX-512); see
    models/resnet.py."""
    script = (
        "import torch; from models import build_model\nmodel = build_model('resnet18', 10,"
        " width=0.0625).to(memory_format=torch.channels_last)\nfor batch in (15, 9, 127):\n    for"
        " _ in range(5):\n        model(torch.rand(batch, 3, 32,"
        " 32).to(memory_format=torch.channels_last)).sum().backward()\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_normalization_is_inside():
    model = build_model("resnet18", 10, width=0.0625, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    seen = []
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(torch.full((1, 3, 32, 32), 0.7))
    assert torch.allclose(seen[0][0, :, 0, 0], torch.tensor([0.6 / 0.5, 0.5 / 0.6, 0.4 / 0.7]))


def test_initial_weights_are_a_pure_function_of_the_seed():
    torch.manual_seed(0)
    first = build_model("resnet18", 10, width=0.0625, seed=3)
    torch.manual_seed(99)
    again, other = (build_model("resnet18", 10, width=0.0625, seed=seed) for seed in (3, 4))
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize("options", [{"depth_factor": 33}, {"width_factor": 0}, {"width": 0.5}])
def test_wide_resnet_refuses_what_it_cannot_be(options):
    with pytest.raises(ValueError, match=r"wide ResNet|wideresnet"):
        build_model("wideresnet", 10, **options)
