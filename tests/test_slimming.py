import copy

import pytest
import torch
from torch import nn

from models import build_model
from models.flops import layer_costs, real_inference
from models.loading import full_size_state
from models.slimming import for_channels_first, kept_channels, mask_channels, slim
from tests import toy

NETWORKS = {
    "resnet18": {"width": 0.25},
    "resnet50": {"width": 0.125},
    "vgg16": {"width": 0.25},
    "wideresnet": {"depth_factor": 16, "width_factor": 2},
}


def network(arch):
    """Scales and shifts away from their start and statistics to go with them, so that a channel in
    a wrong place shows."""
    model = build_model(arch, 10, **NETWORKS[arch])
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.bias.data):
                value.copy_(torch.randn(value.shape, generator=generator))
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.rand(8, 3, 32, 32, generator=generator))
    return model


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2, 0.03])
@pytest.mark.parametrize("arch", NETWORKS)
def test_the_slim_network_computes_what_the_masked_one_does(arch, density):
    model = network(arch)
    kept, _ = kept_channels(model, density)
    small = slim(model, kept).eval()
    masked = copy.deepcopy(model).eval()
    mask_channels(masked, kept)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = masked(x)
        assert (small(x) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1.0)
    if density >= 0.5:  # below, little of an image comes through a random network
        assert expected.std(dim=0).max() > 0.01


@pytest.mark.parametrize("arch", NETWORKS)
def test_the_slim_network_is_smaller_and_trains(arch):
    model = network(arch)
    small = slim(model, kept_channels(model, 0.5)[0])
    assert real_inference(layer_costs(small, (3, 32, 32))) < 0.6 * real_inference(
        layer_costs(model, (3, 32, 32))
    )
    assert list(small.state_dict()) == list(model.state_dict())
    x, y = torch.rand(6, 3, 32, 32), torch.randint(0, 10, (6,))
    nn.functional.cross_entropy(small(x), y).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize("arch", NETWORKS)
def test_the_widths_alone_rebuild_the_network(arch):
    model = network(arch)
    kept, _ = kept_channels(model, 0.4)
    small = slim(model, kept).eval()
    again = slim(build_model(arch, 10, **NETWORKS[arch], seed=9), kept)
    again.load_state_dict(small.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), small(x))


def test_the_largest_scales_stay_and_the_full_network_is_left_alone():
    model = network("resnet18")
    before = copy.deepcopy(model.state_dict())
    kept, helped = kept_channels(model, 0.3)
    slim(model, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    scales = {
        name: m.weight.abs() for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)
    }
    stay = torch.cat([scales[name][channels] for name, channels in kept.items()])
    gone = torch.cat(
        [s[[c not in kept[name] for c in range(len(s))]] for name, s in scales.items()]
    )
    assert not helped
    assert len(stay) == round(0.3 * sum(len(s) for s in scales.values()))
    assert stay.min() >= gone.max()


@pytest.mark.parametrize(("floor", "stays"), [(0.0, 1), (0.1, 3), (0.3, 9)])
def test_a_layer_keeps_its_floor_and_the_others_give_for_it(floor, stays):
    model = network("resnet18")
    with torch.no_grad():
        model.layer2[0].bn2.weight.mul_(1e-6)
    kept, helped = kept_channels(model, 0.3, floor)
    scale = model.layer2[0].bn2.weight.abs()
    assert helped["layer2.0.bn2"] == 0
    assert kept["layer2.0.bn2"] == sorted(scale.topk(stays).indices.tolist())
    norms = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(map(len, kept.values())) == round(0.3 * sum(norms))
    slim(model, kept).eval()(torch.rand(1, 3, 32, 32))


def test_where_the_floor_does_not_bite_it_changes_nothing():
    model = network("vgg16")
    assert kept_channels(model, 0.5, 0.1) == kept_channels(model, 0.5)
    assert kept_channels(model, 0.5, 0.1)[1] == {}


def test_densities_and_floors_that_cannot_be_are_refused():
    model = network("resnet18")
    with pytest.raises(ValueError, match="fewer channels than the network has batch norms"):
        kept_channels(model, 1e-6)
    for floor in (-0.1, 0.6, float("nan")):
        with pytest.raises(ValueError, match="floor"):
            kept_channels(model, 0.5, floor)


def test_what_cannot_be_slimmed_is_refused():
    model = network("resnet18")
    kept, _ = kept_channels(model, 0.5)
    for wrong in ({}, {**kept, "bn": []}, {**kept, "bn": [0, 9999]}, {**kept, "bn": [1, 1]}):
        with pytest.raises(ValueError, match=r"batch norms|cannot keep"):
            slim(model, wrong)
    other = toy.network()
    with pytest.raises(ValueError, match="neither a ResNet"):
        slim(other, kept_channels(other, 0.5)[0])


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("arch", NETWORKS)
def test_in_full_size_the_slim_network_computes_the_same(arch, density):
    model = network(arch)
    kept, _ = kept_channels(model, density)
    small = slim(model, kept).eval()
    spec = {"arch": arch, "num_classes": 10, **NETWORKS[arch], "kept": kept}
    state = full_size_state(spec, small.state_dict())
    full = build_model(arch, 10, **NETWORKS[arch]).eval()
    full.load_state_dict(state)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = small(x)
        assert (full(x) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1.0)
    for name, value in small.state_dict().items():
        live = state[name] != (1 if name.endswith("running_var") else 0)
        assert int(live.sum()) <= value.numel()
        assert torch.equal(
            state[name][live].sort().values,
            value[value != (1 if name.endswith("running_var") else 0)].sort().values,
        )
    if density == 1.0:
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("arch", NETWORKS)
def test_picking_channels_first_is_the_same_arithmetic(arch):
    model = network(arch)
    small = slim(model, kept_channels(model, 0.5)[0]).eval()
    other = for_channels_first(small)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(other(x), small(x), rtol=1e-4, atol=1e-5)
    assert type(other) is type(small)
    assert list(other.state_dict()) == list(small.state_dict())
