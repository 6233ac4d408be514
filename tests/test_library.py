"""The example of the library in somebody else's training loop."""

import ast
import inspect

import library
import pytest

from utils.attacks import PGD
from utils.evaluate import evaluate


def test_a_foreign_loop_trains_sparse_and_learns():
    train, test = library.photograph_patches()
    assert len(train) == 3 * len(test)
    model = library.small_network()
    masking = library.train_sparse(model, library.shuffled(train), epochs=4)
    total = sum(mask.numel() for mask in masking.masks.values())
    assert sum(masking.live_counts().values()) == round(0.1 * total)
    assert all(bool((masking.weights[name][~mask] == 0).all()) for name, mask in masking.masks.items())
    assert masking.explored_fraction() > 0.1
    assert evaluate(model, test).accuracy > 80
    assert evaluate(model, test, library.ATTACK).accuracy > 60
    assert evaluate(model, test, PGD(4 / 255, 2 / 255, 2)).accuracy > 60


def test_the_loop_is_short():
    (function,) = ast.parse(inspect.getsource(library.train_sparse)).body
    lines = {node.lineno for statement in function.body[1:] for node in ast.walk(statement) if hasattr(node, "lineno")}
    assert len(lines) < 15


def test_the_example_runs_to_its_end(capsys, monkeypatch):
    first, second = library.photograph_patches()
    monkeypatch.setattr(library, "photograph_patches", lambda: (first.subset(first.indices[:128]), second))
    library.main()
    flying, robust = capsys.readouterr().out.splitlines()
    assert flying.startswith("Flying Bird: density 0.1000")
    assert robust.startswith("Robust Bird: ticket after ")
    assert pytest.approx(50, abs=50.1) == float(robust.rsplit(maxsplit=1)[-1])
