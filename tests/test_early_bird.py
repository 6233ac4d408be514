import json

import numpy as np
import pytest
import torch
from torch import nn

from utils.early_bird import EarlyBird, ticket_mask


class Watched(nn.Module):
    """Two convolutions and two batch norms whose weights the tests set."""

    def __init__(self, sizes=((16, 3), (24, 16))):
        super().__init__()
        self.c1, self.c2 = (nn.Conv2d(i, o, 3, bias=False) for o, i in sizes)
        self.b1, self.b2 = (nn.BatchNorm2d(o) for o, _ in sizes)
        self.linear = nn.Linear(4, 4)

    @torch.no_grad()
    def fill(self, **weights):
        for name, weight in weights.items():
            getattr(self, name).weight.copy_(torch.as_tensor(weight))


@pytest.mark.parametrize("kind", ["unstructured", "channel"])
@pytest.mark.parametrize("sequence", [0, 1, 2])
def test_distances_and_emergence_equal_the_oracle(kind, sequence, golden):
    case = json.loads((golden / "early_bird.json").read_text())[sequence]
    arrays = np.load(golden / "early_bird.npz")
    bird = EarlyBird(case["density"], case["epoch_keep"], case[f"tolerance_{kind}"], kind)
    model = Watched()
    for row in case["rows"]:
        model.fill(
            **{
                part: arrays[f"seq{sequence}_epoch{row['epoch']:02d}_{part}"]
                for part in ("c1", "c2", "b1", "b2")
            }
        )
        assert bird.observe(model) == row[f"{kind}_emerged"]
        if row[f"{kind}_distances"] is not None:
            assert bird.distances[-1][-4:] == pytest.approx(row[f"{kind}_distances"], abs=1e-6)


def test_defaults_are_the_papers():
    assert (
        EarlyBird(0.2).window,
        EarlyBird(0.2).tolerance,
        EarlyBird(0.2, kind="channel").tolerance,
    ) == (5, 0.08, 0.1)


def test_all_distances_are_kept():
    bird, model = EarlyBird(0.5, window=2), Watched()
    for _ in range(4):
        nn.init.normal_(model.c1.weight)
        bird.observe(model)
    assert [len(row) for row in bird.distances] == [0, 1, 2, 3]
    assert all(0 < distance < 1 for row in bird.distances for distance in row)


def test_a_window_of_one_has_its_ticket_at_once():
    assert EarlyBird(0.2, window=1).observe(Watched())


def test_a_mask_that_stays_emerges_when_the_window_is_full():
    bird, model = EarlyBird(0.2, window=3), Watched()
    assert [bird.observe(model) for _ in range(4)] == [False, False, True, True]


def test_the_mask_by_hand():
    model = Watched(((1, 1), (1, 1)))
    model.fill(c1=torch.arange(9.0).view(1, 1, 3, 3), c2=-torch.arange(9.0, 18.0).view(1, 1, 3, 3))
    # The sorted value at int(18 * 0.75) = 13 is 13; strictly above it are 14 to 17.
    assert ticket_mask(model, 0.25, "unstructured").nonzero().squeeze(1).tolist() == [
        14,
        15,
        16,
        17,
    ]


def test_state_goes_on_where_it_was():
    torch.manual_seed(0)
    whole, first, model = EarlyBird(0.3, window=3), EarlyBird(0.3, window=3), Watched()
    states = [[torch.randn_like(c.weight) for c in (model.c1, model.c2)] for _ in range(5)]
    second = EarlyBird(0.3, window=3)
    for number, (c1, c2) in enumerate(states):
        model.fill(c1=c1, c2=c2)
        whole.observe(model)
        (first if number < 3 else second).observe(model)
        if number == 2:
            second.load_state_dict(first.state_dict())
    assert second.distances == whole.distances


@pytest.mark.parametrize(
    "options", [{"density": 0.0}, {"window": 0}, {"tolerance": 1.5}, {"kind": "filter"}]
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match=r"density|window|tolerance|unknown"):
        EarlyBird(**{"density": 0.2, **options})


def test_a_network_without_what_is_watched_is_refused():
    with pytest.raises(ValueError, match="no channel ticket"):
        EarlyBird(0.2, kind="channel").observe(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("kind", ["unstructured", "channel"])
def test_a_network_that_diverged_has_no_ticket(kind):
    model = Watched()
    model.fill(c2=torch.full((24, 16, 3, 3), torch.nan), b1=torch.full((16,), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        EarlyBird(0.2, kind=kind).observe(model)
