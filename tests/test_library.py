"""The example that uses the library in somebody else's training loop."""

import ast
import inspect

import library

from utils.attacks import PGD
from utils.evaluation.scores import evaluate


def test_a_foreign_loop_trains_sparse_and_learns():
    train, test = library.photograph_patches()
    assert len(train) == 3 * len(test)
    model = library.small_network()
    masking = library.train_sparse(model, library.shuffled(train), epochs=4)
    total = sum(mask.numel() for mask in masking.masks.values())
    assert sum(masking.live_counts().values()) == round(0.1 * total)
    assert all(
        bool((masking.weights[name][~mask] == 0).all()) for name, mask in masking.masks.items()
    )
    assert masking.explored_fraction() > 0.1
    assert evaluate(model, test).accuracy > 80
    assert evaluate(model, test, library.ATTACK).accuracy > 60
    assert evaluate(model, test, PGD(4 / 255, 2 / 255, 2)).accuracy > 60


def test_the_loop_is_short():
    (function,) = ast.parse(inspect.getsource(library.train_sparse)).body
    lines = {
        node.lineno
        for statement in function.body[1:]
        for node in ast.walk(statement)
        if hasattr(node, "lineno")
    }
    assert len(lines) <= 16


def test_the_example_runs_to_its_end(capsys, monkeypatch):
    """It prints the figures of the networks it trained; they beat the larger class's 50.8 %."""
    first, second = library.photograph_patches()
    networks = []
    monkeypatch.setattr(
        library, "photograph_patches", lambda: (first.subset(first.indices[:128]), second)
    )
    monkeypatch.setattr(
        library,
        "small_network",
        lambda small=library.small_network: networks.append(small()) or networks[-1],
    )
    library.main()
    flying, robust = capsys.readouterr().out.splitlines()
    assert flying.startswith("Flying Bird: density 0.1000")
    assert robust.startswith("Robust Bird: ticket after 3 epochs, ")
    for line, network in zip((flying, robust), networks, strict=True):
        sa, ra = (
            evaluate(network, second).accuracy,
            evaluate(network, second, library.ATTACK).accuracy,
        )
        assert line.endswith(f", SA {sa:.1f}, RA {ra:.1f}")
        assert 60 < ra <= sa
