import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from sparse_core import layer_counts, prunable
from tests import toy
from utils.flops import layer_costs, paper_inference, paper_training, real_inference, real_training


def test_by_hand():
    costs = layer_costs(toy.network(), (3, 8, 8))
    assert [(c.name, c.weights, c.channels_out, c.positions, c.convolution) for c in costs] == [
        ("0.weight", 108, 4, 64, True),
        ("5.weight", 192, 3, 1, False),
    ]
    assert real_inference(costs) == 2 * 108 * 64 + 2 * 192
    assert real_inference(costs, {"0.weight": 10, "5.weight": 20}) == 2 * 10 * 64 + 2 * 20
    assert paper_inference(costs) == 2 * 108 * 4 * 64


def test_training_counts():
    assert real_training([100, 50], images=10, attack_steps=10) == 3 * 11 * 10 * 150
    assert paper_training(100, images=10, attack_steps=10, epochs=2) == 3 * 11 * 10 * 2 * 100


def test_the_papers_cells():
    model = build_model("resnet18", 10)
    costs = layer_costs(model, (3, 32, 32))
    dense = paper_inference(costs)
    assert dense / 1e9 == pytest.approx(260.072, abs=5e-4)
    assert paper_training(dense, 45_000, 10, 200) / 1e17 == pytest.approx(772.41, abs=5e-3)
    live = layer_counts({name: tuple(w.shape) for name, w in prunable(model).items()}, 0.2, "igq")
    assert paper_inference(costs, live) / 1e9 == pytest.approx(80.603, abs=5e-4)
    assert real_inference(costs) / 1e9 == pytest.approx(1.11, abs=5e-3)
    assert real_inference(costs, live) / real_inference(costs) == pytest.approx(0.516, abs=5e-4)


@pytest.mark.parametrize("arch", ["resnet18", "vgg11", "wideresnet"])
def test_real_count_equals_torchs_own_counter(arch):
    options = {"depth_factor": 10, "width_factor": 1} if arch == "wideresnet" else {"width": 0.125}
    model = build_model(arch, 10, **options).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert real_inference(layer_costs(model, (3, 32, 32))) == counter.get_total_flops()


def test_counting_leaves_the_network_as_it_was():
    model = toy.network()
    layer_costs(model, (3, 8, 8))
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert not model[0]._forward_hooks
