"""The trained models in results/models reproduce their figures on 200 fixed test images.

``python -m tests.test_released`` measures them again and writes ``results/models/figures.json``.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import study_table
import torch

import hubconf
from models import load_model
from tests import toy
from utils.attacks import PGD, pgd_attack
from utils.evaluation.scores import Score
from utils.execution.forward import Forward
from utils.execution.hardware import full_precision
from utils.storage.checkpoint import load_checkpoint
from utils.training import collapse
from utils.training.collapse import CollapseError, CollapseGuard

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "results" / "models"
# 20 test images (JPEG) of each CIFAR-10 class, averaged down to 16x16
IMAGES = ROOT / "tests" / "golden" / "cifar10_16x16.npz"
NAMES = sorted(path.name for path in MODELS.iterdir() if path.is_dir())


def measured(model):
    """Clean and PGD-10 accuracy (linf 8/255, no random start) in percent."""
    with np.load(IMAGES) as stored:
        x = torch.from_numpy(stored["images"]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(stored["labels"])
    attack = PGD(8 / 255, 2 / 255, 10, random_start=False)
    with full_precision():
        adversarial = pgd_attack(model, x, y, attack)
        with torch.no_grad():
            answers = {"clean": model(x).argmax(1), "pgd10": model(adversarial).argmax(1)}
    return {name: 100 * (answer == y).float().mean().item() for name, answer in answers.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_released_model_repeats_its_figures(name):
    stored = json.loads((MODELS / "figures.json").read_text())[name]
    model = load_model(MODELS / name)
    # on another machine, one image may fall on the other side of the boundary
    assert measured(model) == pytest.approx(stored, abs=0.51)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(hubconf.load(name)(images), model(images))


def test_the_models_are_small_and_described():
    sizes = [path.stat().st_size for path in MODELS.glob("*/model.pt")]
    assert len(sizes) == len(NAMES) >= 5
    assert max(sizes) <= 4e6
    assert sum(sizes) <= 20e6
    page = (MODELS / "README.md").read_text()
    figures = json.loads((MODELS / "figures.json").read_text())
    for name in NAMES:
        card = (MODELS / name / "README.md").read_text()
        assert "robust accuracy" in card
        row = next(line for line in page.splitlines() if line.startswith(f"| [{name}]"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[3:5] == [f"{figures[name][kind]:.1f}" for kind in ("clean", "pgd10")]
        evaluated = MODELS / name / "autoattack.json"
        if evaluated.exists():
            evaluation = json.loads(evaluated.read_text())
            assert evaluation["images"] == {"test": 1000}
            assert cells[5] == accuracy_text(evaluation["test_ra"] / 100, 1000)
        else:
            assert cells[5] == ""


def accuracy_text(accuracy, images):
    """In percent, with the 95 % interval of Wilson."""
    z2 = 1.96**2 / images
    middle = (accuracy + z2 / 2) / (1 + z2)
    half = (z2 * (accuracy * (1 - accuracy) + z2 / 4)) ** 0.5 / (1 + z2)
    return f"{100 * accuracy:.1f} ({100 * (middle - half):.1f} to {100 * (middle + half):.1f})"


def withstood(folder):
    """By test image, 1.0 where all attacks failed, else 0.0; ``[N]``."""
    answers = load_checkpoint(folder / "autoattack.pth.tar")
    y, found = answers["labels"]["test"], answers["outcomes"]["predicted"].values()
    return np.logical_and.reduce([study_table.withstood(one, y) for one in found]).astype(float)


def test_answers_by_image_give_accuracies_and_differences():
    kept = {
        path.parent.name: withstood(path.parent) for path in MODELS.glob("*/autoattack.pth.tar")
    }
    for name, right in kept.items():
        evaluation = json.loads((MODELS / name / "autoattack.json").read_text())
        assert 100 * right.mean() == pytest.approx(evaluation["test_ra"])
    page = (MODELS / "README.md").read_text()
    pairs = re.findall(r"^\| ([a-z-]+) - ([a-z-]+) \| (.*) \|$", page, re.MULTILINE)
    assert len(pairs) == 7
    for one, other, text in pairs:
        mean, low, high = study_table.bootstrap((kept[one] - kept[other])[None])
        assert text == f"{mean:+.2f} [{low:+.1f}, {high:+.1f}]"


def test_the_record_of_a_speedrun_is_what_its_files_say():
    folder = ROOT / "results" / "speedrun" / "resnet18-quarter"
    summary, evaluation = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "autoattack")
    )
    best, rows = summary["best"], list(map(json.loads, (folder / "metrics.jsonl").open()))
    assert evaluation["network"]["weights"] == summary["weights"]["model_RA_best.pth.tar"]
    minutes = sum(row["train_seconds"] for row in rows) / 60
    page = (folder.parent / "README.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| [ResNet-18 x .25]"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:4] == [str(len(rows)), f"{minutes:.0f}"]
    assert cells[4] == accuracy_text(evaluation["test_ra"] / 100, 1000)
    assert cells[5:7] == [f"{best['test_ra']:.1f}", f"{best['test_sa']:.1f}"]
    assert 100 * withstood(folder).mean() == pytest.approx(evaluation["test_ra"])
    model = load_model(folder)
    assert sum(w.numel() for w in model.parameters()) == pytest.approx(700e3, rel=0.01)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("run", "epochs", "fall"),
    [
        ("resnet18-quarter", 1, r"from 17\.2 to 1\.2 %"),
        ("fgsm", 4, r"from 16\.0 to 3\.9 %"),
        ("fgsm16", 1, r"is 4\.7 % on .* and is 28\.5 %"),
    ],
)
def test_the_guard_stops_at_a_real_collapse(monkeypatch, run, epochs, fall):
    """Shown the accuracies after each epoch of three runs: after ``epochs`` it still goes on."""
    folder = ROOT / "results" / "speedrun" / run
    rows = list(map(json.loads, (folder / "metrics.jsonl").open()))
    seen = [row[name] for row in rows for name in ("guard_ra", "guard_one_step_ra")]
    monkeypatch.setattr(collapse, "score", lambda *_, **__: Score(seen.pop(0), 0.0, 256))
    guard = CollapseGuard(PGD(8 / 255, 8 / 255, 1), toy.data(30), 1)
    guard._chance = 10.0
    for epoch in range(epochs):
        guard.check(Forward(toy.network()), f"epoch {epoch}")
    with pytest.raises(CollapseError, match=fall):
        guard.check(Forward(toy.network()), "the next")


if __name__ == "__main__":
    content = {name: measured(load_model(MODELS / name)) for name in NAMES}
    (MODELS / "figures.json").write_text(json.dumps(content, indent=2) + "\n")
