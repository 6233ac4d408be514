import numpy as np
import pytest
import torch

from utils.seeding import permutation, random_bits, seeded, stream, uniform


def splitmix64(key: int, counter: int) -> int:
    """The generator in Python's unbounded integers."""
    mask = (1 << 64) - 1
    z = (counter * 0x9E3779B97F4A7C15 + key) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("key", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_bits_equal_the_published_generator(key):
    counter = torch.tensor([0, 1, 2, 10**12])
    expected = [splitmix64(key & ((1 << 64) - 1), int(c)) for c in counter]
    assert [int(bits) & ((1 << 64) - 1) for bits in random_bits(key, counter)] == expected


def test_first_output_of_splitmix64_seeded_with_zero():
    assert int(random_bits(0, torch.tensor([1]))[0]) & ((1 << 64) - 1) == 0xE220A8397B1DCDAF


def test_uniform_lies_strictly_inside_and_is_flat():
    draws = uniform(stream(3, "x"), torch.arange(200_000))
    assert 0 < draws.min() < draws.max() < 1
    counts = torch.histc(draws, bins=20, min=0, max=1)
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, one in a thousand


def test_largest_draw_is_below_one(monkeypatch):
    monkeypatch.setattr(
        "sparse_core.random_bits", lambda key, counter: torch.full_like(counter, -1)
    )
    assert uniform(0, torch.arange(3)).tolist() == [1 - 2.0**-24] * 3


def test_streams_differ_by_every_part():
    keys = {
        stream(1, "a", 0),
        stream(2, "a", 0),
        stream(1, "b", 0),
        stream(1, "a", 1),
        stream(1, "a"),
    }
    assert len(keys) == 5


def test_permutation_is_one_and_a_pure_function():
    order = permutation(1000, stream(1, "order", 4))
    assert sorted(order.tolist()) == list(range(1000))
    assert torch.equal(order, permutation(1000, stream(1, "order", 4)))
    assert not torch.equal(order, permutation(1000, stream(1, "order", 5)))
    assert abs(np.corrcoef(order.numpy(), np.arange(1000))[0, 1]) < 0.1


def test_seeded_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        torch.rand(10)
    assert torch.equal(torch.rand(3), expected)


def test_seeded_touches_the_default_cpu_generator_alone(monkeypatch):
    """``torch.manual_seed`` would reseed every GPU of the host program."""

    def refuse(*args, **kwargs):
        raise AssertionError("other generators are touched")

    before = torch.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    with seeded(7):
        first = torch.rand(3)
    with seeded(7):
        again = torch.rand(3)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
