"""Submissions to benchmarks and model hubs, read by loaders written from their documentation."""

import importlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from models import load_model
from tests.toy import TOY_RUN, Command
from utils.attacks import PGD
from utils.errors import InputError
from utils.evaluation import command as evaluation_command
from utils.evaluation.trials import pgd_trials
from utils.storage.paths import RunPaths

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
SHORT = (
    "--dataset imagefolder --arch resnet18 --epochs 1 --batch_size 10 --train_step 1 --test_step 1"
    " --test_subset 10 --update_frequency 2 --precision float32 --compile off --decreasing_lr 0.5"
).split()


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory):
    """Full-width ResNet-18s trained for a few steps at the benchmark's sparsities, of weights and
    of channels."""
    root = tmp_path_factory.mktemp("submit")
    rng = np.random.RandomState(0)
    for part, count in (("train", 3), ("test", 1)):
        for name in CIFAR10:
            (root / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.randint(0, 255, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / "images" / part / name / f"{number}.png")
    runs = {"weights": [], "channels": []}
    with pytest.MonkeyPatch.context() as patch:
        for structure, densities in (
            ("weights", (0.1, 0.05, 0.01)),
            ("channels", (0.5, 0.25, 0.1)),
        ):
            for density in densities:
                save = root / f"{structure}-{density}"
                flags = [*SHORT, "--data", root / "images", "--save_dir", save]
                flags += ["--fb", "--density", density, "--cache_dir", root / "cache"]
                if structure == "channels":
                    flags += ["--structure", "channel", "--channel_multiple", 4]
                patch.setattr("sys.argv", ["main_adv.py", *map(str, flags)])
                importlib.import_module("main_adv").main()
                runs[structure].append(next(path for path in save.iterdir() if path.is_dir()))
    return runs


@pytest.fixture
def balls(monkeypatch):
    """Replaces AutoAttack by two PGD steps, for speed; lists the norm and radius of each call."""
    seen = []

    def weak(model, attack, classes, device, seed):
        seen.append((attack.norm, pytest.approx(attack.eps)))
        return pgd_trials(model, PGD(attack.eps, attack.eps / 2, 2), seed, name="AutoAttack")

    monkeypatch.setattr(evaluation_command, "autoattack_trials", weak)
    return seen


@pytest.fixture
def submit(balls, monkeypatch, capsys):
    return Command("submit", monkeypatch, capsys)


class Block(nn.Module):
    """A pre-activation block with the names of the benchmark's base network for Flying Bird."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False))

    def forward(self, x):
        h = F.relu(self.bn1(x))
        x = self.shortcut(h) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + x


class Base(nn.Module):
    """The benchmark's ResNet-18, on normalized images."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        widths = (64, 64, 128, 256, 512)
        for stage in range(1, 5):
            first = Block(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            second = Block(widths[stage], widths[stage], 1)
            setattr(self, f"layer{stage}", nn.Sequential(first, second))
        self.bn, self.linear = nn.BatchNorm2d(512), nn.Linear(512, 10)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))


FMN = ["--fmn_steps", 4, "--fmn_trials", 2]


@pytest.mark.parametrize("structure", ["weights", "channels"])
def test_a_pack_for_the_pruning_benchmark(run_folders, submit, balls, tmp_path, structure):
    folders, out = run_folders[structure], tmp_path / "pack"
    done = submit(*folders, "--for", "ap-benchmark", "--out", out, *FMN)
    assert done.code == 0, done.err
    assert balls == [("linf", 0.031)] * 3
    assert "the benchmark wants all 10,000 test images" in done.out
    rates, short = ((90, 95, 99), "US") if structure == "weights" else ((50, 75, 90), "S")
    by_weights = structure == "weights"
    name = "FlyingBird_Chen2021Sparsity" if by_weights else "FlyingBirdChannels_Unpublished"
    keys = [f"{name}_R18_CIFAR10_{short}_{rate}" for rate in rates]
    assert {path.name for path in out.iterdir()} == {
        *(f"{key}{suffix}" for key in keys for suffix in (".pt", ".pickle")),
        *("taxonomy.json", "results.json", "issue.md"),
    }
    issue, results = (out / "issue.md").read_text(), json.loads((out / "results.json").read_text())
    for key, folder in zip(keys, folders, strict=True):
        base = Base()
        base.load_state_dict(torch.load(out / f"{key}.pt")["state_dict"], strict=True)
        ours = load_model(RunPaths(folder).best_ra)
        images = torch.rand(4, 3, 32, 32)
        with torch.no_grad():
            logits = base.eval()(ours.normalize(images))
            assert torch.allclose(logits, ours(images), atol=1e-4 * logits.abs().max())
        distances = pickle.loads((out / f"{key}.pickle").read_bytes())
        assert len(distances) == 10
        robust = 100 * np.mean([float(d) > 8 / 255 for d in distances])
        assert f"_Robust Accuracy (HO-FMN):_ {robust:.2f}" in issue
        assert results[key]["AutoAttack"] == {
            "norm": "linf",
            "eps": 0.031,
            "robust accuracy": pytest.approx(results[key]["AutoAttack"]["robust accuracy"]),
        }
        assert f'_Model GDrive:_ "{key}" : ["", ".pt"]' in issue
    taxonomy = json.loads((out / "taxonomy.json").read_text())
    assert taxonomy["Type of Pipeline:"] == "D-Methods Pruning During Training"
    assert bool(taxonomy["link_to_paper"]) == by_weights  # the channel method is in no paper
    assert taxonomy["D: Training step "] == "Adversarial Training (AT) PGD"
    criterion = {
        "weights": "Lowest Weight Magnitude LWM",
        "channels": "Least Importance Score (LIS)",
    }
    assert taxonomy["Pruning criterion"] == criterion[structure]
    removed = [results[key]["removed %"] for key in keys]
    assert removed == pytest.approx(rates, abs=0.5 if structure == "weights" else 4)
    again = submit(*folders, "--for", "ap-benchmark", "--out", out, *FMN)
    assert again.code == 2
    assert "already exists" in again.err


ELSEWHERE = """
import torch
from Mine2026 import Mine2026
network = Mine2026().eval()
network.load_state_dict(torch.load("Mine2026.pt"), strict=True)
with torch.no_grad():
    torch.save(network(torch.load("images.pt")), "logits.pt")
"""


def test_an_entry_for_robustbench(run_folders, submit, balls, tmp_path):
    """Its module loads where none of our code can be imported."""
    folder, out = run_folders["channels"][0], tmp_path / "entry"
    done = submit(folder, "--for", "robustbench", "--out", out, "--name", "Mine2026")
    assert done.code == 0, done.err
    assert balls == [("linf", 8 / 255)]
    info = json.loads((out / "model_info" / "cifar10" / "Linf" / "Mine2026.json").read_text())
    assert info["eps"] == "8/255"
    assert info["architecture"] == "PreActResNet-18"
    assert info["authors"] is None  # the channel method is in no paper
    assert 0 <= float(info["autoattack_acc"]) <= float(info["clean_acc"]) <= 100
    images = torch.rand(4, 3, 32, 32)
    torch.save(images, out / "images.pt")
    (out / "load.py").write_text(ELSEWHERE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "load.py"], cwd=out, env=environment, check=True)
    with torch.no_grad():
        expected = load_model(RunPaths(folder).best_ra)(images)
    assert torch.allclose(torch.load(out / "logits.pt"), expected, atol=1e-4 * expected.abs().max())
    assert "- **Evaluation method**: AutoAttack" in (out / "issue.md").read_text()


@pytest.mark.parametrize("structure", ["weights", "channels"])
def test_a_folder_for_the_hub_round_trips_offline(
    run_folders, submit, tmp_path, monkeypatch, structure
):
    pytest.importorskip("huggingface_hub")
    from models.hub import HubNetwork

    folder, out = run_folders[structure][0], tmp_path / "model"
    done = submit(folder, "--for", "huggingface", "--out", out, "--name", "my model")
    assert done.code == 0, done.err
    assert f"hf upload 'USER/my model' {out}\n" in done.out
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = load_model(RunPaths(folder).best_ra)(images)
        model = HubNetwork.from_pretrained(str(out))
        assert torch.equal(model(images), expected)
        assert model.about["method"] == ("fb" if structure == "weights" else "fb-channel")
        model.save_pretrained(tmp_path / "again")
        assert HubNetwork.from_pretrained(str(tmp_path / "again")).about == model.about
        with pytest.raises(InputError, match="num_classes cannot be changed"):
            HubNetwork.from_pretrained(str(out), num_classes=7)
        assert torch.equal(load_model(tmp_path / "again" / "model.safetensors")(images), expected)
        assert torch.equal(load_model(out)(images), expected)
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    for said in ("license: mit", "robust accuracy", "python main_adv.py", "airplane, automobile"):
        assert said in card


@pytest.mark.parametrize("structure", ["weights", "channels"])
def test_a_released_model(run_folders, submit, tmp_path, structure):
    folder, out = run_folders[structure][0], tmp_path / "released"
    done = submit(folder, "--for", "release", "--out", out, "--name", "mine")
    assert done.code == 0, done.err
    assert {path.name for path in out.iterdir()} == {"README.md", "model.pt"}
    assert (out / "README.md").read_text().startswith("# mine\n")
    # in float16: a tenth of 11.2 million weights and their mask, or a quarter of them
    assert (out / "model.pt").stat().st_size < (4e6 if structure == "weights" else 6.2e6)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = load_model(RunPaths(folder).best_ra)(images)
        assert torch.allclose(load_model(out)(images), expected, atol=0.01 * expected.abs().max())


def test_what_cannot_be_submitted_is_refused_before_any_work(
    run_folders, submit, run_adv, tmp_path
):
    weights, channels = run_folders["weights"], run_folders["channels"]
    assert run_adv(*TOY_RUN, "--save_dir", tmp_path / "toy").code == 0
    (toy,) = (tmp_path / "toy").iterdir()
    out = ["--out", tmp_path / "new" / "out"]
    for words, reason in (
        ([*weights[:2], "--for", "ap-benchmark"], "asks for a network at 99 % too"),
        ([*weights[:2], channels[0], "--for", "ap-benchmark"], "differ in"),
        ([weights[0], weights[0], "--for", "ap-benchmark"], "two of the runs have pruned 90 %"),
        ([toy, "--for", "ap-benchmark"], "of full width"),
        ([toy, "--for", "robustbench"], "RobustBench takes networks of CIFAR-10"),
        ([*weights, "--for", "robustbench"], "takes one run"),
        ([weights[0], "--for", "huggingface", "--test_subset", 5], "evaluates nothing"),
        ([tmp_path / "none", "--for", "huggingface"], "none"),
        ([weights[0], "--for", "robustbench", "--no-such", 1], "unknown argument"),
        ([weights[0], "--for", "elsewhere"], "invalid choice"),
        ([*weights, "--for", "ap-benchmark", "--fmn_steps", 0], "must be 1 or more"),
        (
            [*weights, "--for", "ap-benchmark", "--norm", "l2"],
            "--norm is the benchmark's to choose",
        ),
        ([weights[0], "--for", "robustbench", "--eval_attack", "pgd"], "benchmark's to choose"),
        ([weights[0], "--for", "robustbench", "--test-eps=2"], "--test-eps is the benchmark's"),
        ([weights[0], "--for", "robustbench", "--name", "class"], "the name of a class"),
        ([weights[0], "--for", "release", "--name", "a/b"], "is not a file name"),
        ([weights[0], "--for", "release", "--fmn_steps", 7], "have no effect"),
    ):
        done = submit(*words, *out)
        assert (done.code, len(done.err.splitlines())) == (2, 1), (words, done.err)
        assert reason in done.err, (words, done.err)
        assert not (tmp_path / "new").exists(), words
