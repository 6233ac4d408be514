import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import ARCHITECTURES, build_model
from models.channels import narrow, plan_largest
from models.flops import layer_costs, paper_inference, paper_training, real_inference, real_training
from sparse_core import layer_counts, prunable
from tests import toy
from utils.storage.paths import RunPaths
from utils.storage.run_folder import read_epochs, read_summary


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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_real_count_equals_torchs_own_counter(arch):
    options = {"depth_factor": 10, "width_factor": 1} if arch == "wideresnet" else {"width": 0.125}
    model = build_model(arch, 10, **options).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert real_inference(layer_costs(model, (3, 32, 32))) == counter.get_total_flops()


def torchs_count(model, side=32):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "vgg16", "wideresnet"])
def test_real_count_of_narrow_networks_equals_torchs_own_counter(arch):
    options = {"depth_factor": 10, "width_factor": 1} if arch == "wideresnet" else {"width": 0.125}
    model = build_model(arch, 10, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.1, 1.0)
    plan, live, _ = plan_largest(model, (3, 32, 32), 0.5, 0.1, multiple=1)
    small = narrow(copy.deepcopy(model), plan.channels.kept(live))
    counted = real_inference(layer_costs(small, (3, 32, 32)))
    assert counted == torchs_count(small)
    assert 0.15 < counted / torchs_count(model) < 0.5


def test_the_paper_counts_output_channels_twice_for_convolutions_alone():
    costs = layer_costs(build_model("vgg16", 10), (3, 32, 32))
    convolutions = [cost for cost in costs if cost.convolution]
    assert len(costs) - len(convolutions) == 1
    assert paper_inference(costs) == sum(
        2 * c.weights * c.channels_out * c.positions for c in convolutions
    )


def test_training_follows_the_density_of_each_epoch(run_adv, tmp_path):
    """The real count adds up each epoch; the paper's takes the final network for all of them."""
    flags = (
        "--fbp --density 0.3 --update_frequency 1 --dynamic_epoch 1 --epochs 5 --decreasing_lr 2"
        " --train_step 2 --prune_ratio 1"
    )
    assert (
        run_adv(
            *toy.TOY_RUN, *flags.split(), "--update_threshold", 0.01, "--save_dir", tmp_path
        ).code
        == 0
    )
    (run,) = map(RunPaths, tmp_path.iterdir())
    rows, summary = read_epochs(run), read_summary(run)
    by_epoch = [row["inference_flops"] for row in rows]
    assert len(set(by_epoch)) > 1
    assert summary["flops"]["real"] == {
        "inference": by_epoch[-1],
        "training": 3 * 3 * 100 * sum(by_epoch),
    }
    assert (
        summary["flops"]["paper"]["training"]
        == 3 * 3 * 100 * 5 * summary["flops"]["paper"]["inference"]
    )
    assert summary["density"] == rows[-1]["density"]


def test_counting_leaves_the_network_as_it_was():
    model = toy.network()
    layer_costs(model, (3, 8, 8))
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert not model[0]._forward_hooks


class Mixed(nn.Module):
    """Tokens, attention, a transposed convolution, a shared layer with spectral norm and an unused
    layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.up = nn.Conv2d(3, 16, 4, 4), nn.ConvTranspose2d(16, 16, 3, stride=2)
        self.block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.shared = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16, bias=False))
        self.unused, self.head = nn.Linear(7, 7), nn.Linear(16, 5)

    def forward(self, x):
        tokens = self.block(self.up(self.patches(x)).flatten(2).transpose(1, 2))
        return self.head(self.shared(self.shared(tokens)).mean(dim=1))


def test_layers_of_every_kind_cost_what_torch_counts():
    model = Mixed().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model(torch.zeros(1, 3, 16, 16))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    # attention between tokens, and the spectral norm's own products
    products = ("bmm", "attention", "aten.mv", "aten.dot")
    theirs = sum(
        count
        for op, count in counter.get_flop_counts()["Global"].items()
        if not any(word in str(op) for word in products)
    )
    costs = layer_costs(model, (3, 16, 16))
    assert real_inference(costs) == theirs
    names = {cost.name for cost in costs}
    assert names == set(prunable(model)) - {"unused.weight"}
    assert "block.self_attn.in_proj_weight" in names


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_either_spectral_norm_costs_its_live_weights(norm):
    model = nn.Sequential(norm(nn.Linear(20, 20)))
    (name,) = prunable(model)
    assert real_inference(layer_costs(model, (20,)), {name: 80}) == 160


class Crossed(nn.Module):
    """Few queries attend to many keys, as in attention pooling; keys may have another width."""

    def __init__(self, wrap=lambda attention: attention, **options) -> None:
        super().__init__()
        self.attention = wrap(nn.MultiheadAttention(8, 2, batch_first=True, **options))

    def forward(self, x):
        return self.attention(query=x[..., :8][:, :2], key=x, value=x)[0]


@pytest.mark.parametrize("length", [7, 2, 5])
@pytest.mark.parametrize("width", [8, 12])
def test_attention_between_two_lengths_costs_what_torch_counts(length, width):
    torch.manual_seed(0)
    model = Crossed(kdim=width, vdim=width).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, width))
    theirs = sum(
        count
        for op, count in counter.get_flop_counts()["Global"].items()
        if "addmm" in str(op) or str(op) == "aten.mm"
    )
    costs = layer_costs(model, (length, width))
    assert real_inference(costs) == theirs == 2 * (2 * 64 * 2 + 2 * 8 * width * length)
    masks = {name: torch.rand(weight.shape) < 0.3 for name, weight in prunable(model).items()}
    if width == 8:
        asked, *known = (int(rows.sum()) for rows in masks["attention.in_proj_weight"].split(8))
    else:
        asked, *known = (int(masks[f"attention.{part}_proj_weight"].sum()) for part in "qkv")
    expected = 2 * (
        2 * (asked + int(masks["attention.out_proj.weight"].sum())) + length * sum(known)
    )
    assert real_inference(costs, masks) == expected
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    if width == 8 and length != 2:  # it matters which weights are live
        with pytest.raises(ValueError, match=rf"2 queries and {length} keys: give its mask"):
            real_inference(costs, counts)
    else:
        assert real_inference(costs, counts) == expected


def spectral(norm, leaf):
    def wrap(attention):
        norm(*((attention.out_proj,) if leaf == "out_proj" else (attention, leaf)))
        return attention

    return wrap


@pytest.mark.parametrize(
    ("norm", "leaf"),
    [
        (nn.utils.parametrizations.spectral_norm, "in_proj_weight"),
        (nn.utils.parametrizations.spectral_norm, "out_proj"),
        (nn.utils.spectral_norm, "in_proj_weight"),
    ],
)
def test_a_spectral_norm_on_an_attention_costs_its_live_weights(norm, leaf):
    model = Crossed(spectral(norm, leaf))
    costs = layer_costs(model, (2, 8))
    assert {cost.name for cost in costs} == set(prunable(model))
    assert real_inference(costs, dict.fromkeys(prunable(model), 10)) == 2 * 2 * 20


def test_a_network_that_is_one_layer_and_a_shared_weight_have_the_names_of_their_masks():
    assert real_inference(layer_costs(nn.Linear(5, 5), (5,)), {"weight": 3}) == 6
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    assert list(prunable(model)) == ["0.weight"]
    assert real_inference(layer_costs(model, (5,)), {"0.weight": 3}) == 12
