import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import utils.training.engine
import utils.training.run
import utils.training.stage
import utils.training.testing
from data import load_data
from models import build_model, load_model
from models.flops import layer_costs, paper_inference, real_inference
from sparse_core import SPARSE_INITS, DensityController, Verdict
from tests import toy
from tests.toy import only_run
from utils.attacks import PGD
from utils.evaluation.scores import evaluate
from utils.storage.checkpoint import load_checkpoint
from utils.storage.paths import RunPaths
from utils.storage.run_folder import read_epochs, read_summary

FBP = ["--fbp", *toy.TOY_MASKS, "--dynamic_epoch", "1"]
# Flying Bird+ compares epochs and needs several for a verdict
LONGER = ["--epochs", "5", "--decreasing_lr", "3"]


def files(root):
    """The hash of every file below ``root``."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "method", [[], ["--fb", *toy.TOY_MASKS], FBP, ["--fix", "--density", "0.3"]]
)
def test_a_run_leaves_everything_the_specification_names(run_adv, tmp_path, method):
    outcome = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path, *method)
    assert outcome.code == 0, outcome.err
    paths = only_run(tmp_path)
    assert sorted(os.listdir(paths.root)) == sorted(toy.RUN_FILES)
    config, rows, summary = (
        json.loads(paths.config.read_text()),
        read_epochs(paths),
        read_summary(paths),
    )
    assert config["settings"]["width"] == 0.0625
    (maker,) = config["made_by"]
    assert maker.keys() == {"when", "processes", "versions", "revision", "device", "hardware"}
    assert {"torch", "numpy"} <= maker["versions"].keys()
    assert summary["made_by"] == [maker]
    assert config["digests"].keys() == {
        "classes",
        "training labels",
        "training pixels",
        "test labels",
        "test pixels",
    }
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.01])
    assert {
        "best",
        "final",
        "diff",
        "robust_gap",
        "layer_densities",
        "flops",
        "seconds",
    } <= summary.keys()
    assert summary["diff"] == summary["best"]["test_ra"] - summary["final"]["test_ra"]
    assert summary["robust_gap"] == summary["final"]["train_ra"] - summary["final"]["test_ra"]
    assert paths.curves.read_bytes().startswith(b"\x89PNG")
    for path in (paths.checkpoint, paths.best_ra, paths.best_sa):
        assert next(iter(torch.load(path, weights_only=True)["state_dict"])) == "normalize.mean"
    assert str(paths.root) in outcome.out
    assert "FLOPs real" in outcome.out
    assert "FLOPs paper" in outcome.out


def test_flying_bird_keeps_its_density_exactly_and_moves_its_masks(run_adv, tmp_path):
    run_adv(*toy.TOY_RUN, "--save_dir", tmp_path, "--fb", *toy.TOY_MASKS)
    paths = only_run(tmp_path)
    masks = load_checkpoint(paths.checkpoint)["masking"]["masks"]
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.3 * total)
    rows = read_epochs(paths)
    assert [update["step"] for row in rows for update in row["updates"]] == [2, 4, 6, 8]
    assert f"{rows[-1]['density']:.4f}" == "0.3000"
    assert rows[-1]["explored"] > 0.3
    assert rows[0]["inference_flops"] == rows[1]["inference_flops"]


def test_flying_bird_plus_ends_below_its_density(run_adv, tmp_path, monkeypatch):
    monkeypatch.setattr(
        DensityController, "decide", lambda self, epoch: Verdict(prune=epoch >= self.start_epoch)
    )
    outcome = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path, *FBP)
    rows = read_epochs(only_run(tmp_path))
    assert f"{rows[0]['density']:.4f}" == "0.3000"
    assert rows[1]["density"] < 0.3
    assert [update["prune"] for update in rows[1]["updates"]] == [True, True]
    assert [update["epoch"] for row in rows for update in row["updates"]] == [1, 1, 2, 2]
    assert rows[1]["inference_flops"] < rows[0]["inference_flops"]
    assert f"density {rows[1]['density']:.4f}" in outcome.out


def test_flying_bird_plus_follows_the_verdict_of_its_own_metrics(run_adv, tmp_path):
    assert run_adv(*toy.TOY_RUN, *LONGER, "--save_dir", tmp_path, *FBP).code == 0
    rows = read_epochs(only_run(tmp_path))
    masking = load_checkpoint(only_run(tmp_path).checkpoint)["masking"]
    assert masking["gaps"] == [row["train_ra"] - row["val_ra"] for row in rows]
    assert masking["val_losses"] == [row["val_loss"] for row in rows]
    controller, seen = DensityController(start_epoch=1), []
    for epoch, row in enumerate(rows):
        verdict = controller.decide(epoch)
        seen += [verdict.prune or verdict.grow] * len(row["updates"])
        assert all(
            (update["prune"], update["grow"]) == (verdict.prune, verdict.grow)
            for update in row["updates"]
        )
        controller.observe(train_ra=row["train_ra"], val_ra=row["val_ra"], val_loss=row["val_loss"])
    assert any(seen)
    assert rows[-1]["density"] != rows[0]["density"]


def test_the_gap_may_be_of_fewer_training_images(run_adv, tmp_path):
    """The RA of every fourth training image; nothing else changes."""
    summaries = []
    for extra in ([], ["--gap_subset", 25]):
        save = tmp_path / str(len(extra))
        assert run_adv(*toy.TOY_RUN, *extra, "--save_dir", save).code == 0
        paths = only_run(save)
        summaries.append(read_summary(paths))
    whole, some = (summary["final"] for summary in summaries)
    assert (some["test_ra"], some["test_sa"]) == (whole["test_ra"], whole["test_sa"])
    data = load_data("digits", train_subset=100, test_subset=60)
    split = data.train.subset(data.train.indices[::4])
    score = evaluate(load_model(paths.checkpoint), split, PGD(8 / 255, 2 / 255, 1), seed=1)
    assert some["train_ra"] == score.accuracy
    assert some["robust_gap"] == some["train_ra"] - some["test_ra"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_is_what_the_flags_ask_for(run_adv, tmp_path, monkeypatch, mode):
    original, seen = utils.training.stage.train_epoch, []

    def spy(model, optimizer, batches, **options):
        result = original(model, optimizer, batches, **options)
        seen.append(
            ({k: optimizer.param_groups[0][k] for k in ("lr", "momentum", "weight_decay")}, options)
        )
        return result

    monkeypatch.setattr(utils.training.stage, "train_epoch", spy)
    attack, rate = "--train_eps 5 --train_step 2 --train_gamma 3", "--lr 0.05 --momentum 0.8"
    flags = f"{attack} {rate} --weight_decay 0.001".split()
    outcome = run_adv(*toy.TOY_RUN, *flags, "--attack_mode", mode, "--save_dir", tmp_path)
    assert outcome.code == 0
    assert "PGD-1 tests at linf 8/255, PGD-2 training at linf 5/255, 2 epochs" in outcome.out
    assert [group["lr"] for group, _ in seen] == pytest.approx([0.05, 0.005])
    for group, options in seen:
        assert (group["momentum"], group["weight_decay"]) == (0.8, 0.001)
        assert options["plan"].attack == PGD(5 / 255, 3 / 255, 2)
        assert options["plan"].attack_training == (mode == "train")


@pytest.mark.parametrize(("best", "networks"), [(2, 1), (1, 2)])
def test_a_network_that_is_best_and_last_is_measured_once(
    run_adv, tmp_path, monkeypatch, best, networks
):
    rows = iter([{"val_ra": float(epoch == best), "val_sa": 0.0} for epoch in (1, 2)])
    original, measured = utils.training.testing.final_scores, []
    monkeypatch.setattr(utils.training.testing, "epoch_scores", lambda *args, **options: next(rows))
    monkeypatch.setattr(
        utils.training.testing,
        "final_scores",
        lambda *args, **options: measured.append(1) or original(*args, **options),
    )
    assert run_adv(*toy.TOY_RUN, "--save_dir", tmp_path).code == 0
    assert len(measured) == networks
    summary = read_summary(only_run(tmp_path))
    assert summary["best"]["epoch"] == best
    assert (summary["best"]["test_ra"] == summary["final"]["test_ra"]) or networks == 2


def test_models_are_chosen_by_validation_and_never_by_the_test(run_adv, tmp_path, monkeypatch):
    """Validation RA is best in epoch 2, validation SA in epoch 1, both test figures in the last."""
    measured = ("val_sa", "val_ra", "val_loss", "test_sa", "test_ra")
    scores = [
        dict(zip(measured, row, strict=True))
        for row in ((90, 10, 2.0, 1, 1), (50, 40, 2.0, 2, 2), (60, 30, 2.0, 99, 99))
    ]
    remaining = iter(scores)
    monkeypatch.setattr(
        utils.training.testing, "epoch_scores", lambda *arguments, **options: next(remaining)
    )
    run_adv(*toy.TOY_RUN, "--epochs", 3, "--save_dir", tmp_path)
    paths = only_run(tmp_path)
    assert load_checkpoint(paths.best_ra)["epoch"] == 2
    assert load_checkpoint(paths.best_sa)["epoch"] == 1
    summary = read_summary(paths)
    assert (summary["best"]["epoch"], summary["best"]["val_ra"], summary["final"]["epoch"]) == (
        2,
        40,
        3,
    )


def test_the_summary_is_of_the_two_networks_it_names(run_adv, tmp_path):
    assert run_adv(*toy.TOY_RUN, *LONGER, "--save_dir", tmp_path, *FBP).code == 0
    paths = only_run(tmp_path)
    rows, summary, masks = (
        read_epochs(paths),
        read_summary(paths),
        load_checkpoint(paths.checkpoint)["masking"]["masks"],
    )
    best, final = summary["best"], summary["final"]
    assert (final["test_ra"], final["test_sa"]) == (rows[-1]["test_ra"], rows[-1]["test_sa"])
    chosen = rows[best["epoch"] - 1]
    assert (best["test_ra"], best["test_sa"], best["val_ra"]) == (
        chosen["test_ra"],
        chosen["test_sa"],
        max(r["val_ra"] for r in rows),
    )
    model = build_model("resnet18", 10, width=0.0625, mean=[0.3], std=[0.3])
    costs, live = (
        layer_costs(model, (1, 8, 8)),
        {name: int(mask.sum()) for name, mask in masks.items()},
    )
    real, paper = summary["flops"]["real"], summary["flops"]["paper"]
    assert real["inference"] == real_inference(costs, live) == rows[-1]["inference_flops"]
    assert real["training"] == 3 * 2 * 100 * sum(row["inference_flops"] for row in rows)
    assert paper["inference"] == paper_inference(costs, live) < paper_inference(costs)
    assert paper["training"] == 3 * 2 * 100 * 5 * paper["inference"]
    assert summary["layer_densities"] == {name: live[name] / masks[name].numel() for name in live}


@pytest.mark.parametrize("start", SPARSE_INITS)
def test_every_start_trains_as_a_static_baseline(run_adv, tmp_path, start):
    flags = [
        "--fix",
        "--density",
        "0.3",
        "--sparse_init",
        start,
        "--epochs",
        "1",
        "--decreasing_lr",
        "0",
    ]
    outcome = run_adv(*toy.TOY_RUN, *flags, "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    content = load_checkpoint(only_run(tmp_path).checkpoint)
    for name, mask in content["masking"]["masks"].items():
        assert not content["state_dict"][name][~mask].any()
    assert "density 0.3000" in outcome.out


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("arch", ["resnet50", "vgg11", "wideresnet"])
def test_other_networks_and_norms_train_on_image_folders(run_adv, tmp_path, image_tree, arch, norm):
    size = {"wideresnet": ["--depth_factor", 10, "--width_factor", 1]}.get(
        arch, ["--width", 0.0625]
    )
    flags = [
        "--dataset",
        "imagefolder",
        "--data",
        image_tree,
        "--image_size",
        32,
        "--arch",
        arch,
        *size,
        "--norm",
        norm,
    ]
    flags += [
        "--epochs",
        1,
        "--train_step",
        1,
        "--test_step",
        1,
        "--batch_size",
        27,
        "--save_dir",
        tmp_path / "runs",
        "--growth",
        "gradient",
    ]
    outcome = run_adv(*flags, "--fb", "--density", 0.3, "--update_frequency", 1)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("moment", ["between epochs", "mid-epoch", "after the checkpoint"])
def test_resume_equals_the_run_that_was_never_stopped(
    run_adv, finished, tmp_path, monkeypatch, moment
):
    def state(save_dir):
        paths = only_run(save_dir)
        content, best = load_checkpoint(paths.checkpoint), load_checkpoint(paths.best_ra)
        rows = [{k: v for k, v in row.items() if "second" not in k} for row in read_epochs(paths)]
        summary = {
            k: v
            for k, v in read_summary(paths).items()
            if k not in ("seconds", "settings", "made_by")
        }
        return (
            content["state_dict"],
            content["optimizer"],
            content["masking"],
            (rows, best["epoch"], summary),
        )

    flags = [*toy.TOY_RUN, *FBP, "--growth", "gradient", "--epochs", 3]
    finished(*flags, to=tmp_path / "whole")
    owner, name = {
        "between epochs": (utils.training.run.Run, "adversarial_epoch"),
        "mid-epoch": (utils.training.engine, "train_step"),
        "after the checkpoint": (utils.training.run.Run, "_save_best"),
    }[moment]
    original, calls = getattr(owner, name), []

    def cut(*arguments, **options):
        calls.append(1)
        if len(calls) == (7 if moment == "mid-epoch" else 2):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, cut)
    assert run_adv(*flags, "--save_dir", tmp_path / "cut").code == 130
    monkeypatch.setattr(owner, name, original)
    assert run_adv(*flags, "--save_dir", tmp_path / "cut", "--resume").code == 0
    (weights, optimizer, masking, rest), (weights2, optimizer2, masking2, rest2) = (
        state(tmp_path / "whole"),
        state(tmp_path / "cut"),
    )
    assert all(torch.equal(weights[name], weights2[name]) for name in weights)
    momenta = [[s["momentum_buffer"] for s in o["state"].values()] for o in (optimizer, optimizer2)]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert all(
        torch.equal(masking["masks"][name], masking2["masks"][name]) for name in masking["masks"]
    )
    assert masking["events"] == masking2["events"]
    assert rest == rest2
    makers = json.loads(only_run(tmp_path / "cut").config.read_text())["made_by"]
    assert len(makers) == 2, "one entry a start and a resume"
    assert read_summary(only_run(tmp_path / "cut"))["made_by"] == makers


def test_resuming_a_finished_run_changes_nothing(run_adv, tmp_path):
    first = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path)
    before = files(tmp_path)
    again = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path, "--resume")
    assert again.code == 0
    assert "is finished" in again.out
    assert re.findall(r"test RA [\d.]+", again.out) == re.findall(r"test RA [\d.]+", first.out)[-2:]
    content = load_checkpoint(only_run(tmp_path).checkpoint)
    assert not content["settings"]["resume"]
    by_path = run_adv("--resume_dir", only_run(tmp_path).root)
    assert "is finished" in by_path.out
    assert files(tmp_path) == before


# ---------------------------------------------------------------- evaluation


def test_eval_gives_the_numbers_the_run_printed(run_adv, tmp_path):
    outcome = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path, *FBP, "--seed", 3)
    paths = only_run(tmp_path)
    best = read_summary(paths)["best"]
    before = files(tmp_path)
    evaluated = run_adv(
        "--eval", "--pretrained", paths.best_ra, "--eval_dir", tmp_path.parent / "evaluations"
    )
    assert evaluated.code == 0, evaluated.err
    printed = (
        f"{best['test_ra']:.2f}  test SA {best['test_sa']:.2f}  training RA {best['train_ra']:.2f}"
    )
    assert f"test RA {printed}" in outcome.out
    assert (
        f"test RA (PGD-1, linf 8/255) {printed}  robust generalization gap {best['robust_gap']:.2f}"
        in evaluated.out
    )
    assert files(tmp_path) == before


def test_eval_takes_checkpoints_of_the_papers_code_and_other_attacks(run_adv, finished, tmp_path):
    run = finished(*toy.TOY_RUN, to=tmp_path / "runs")
    state = load_checkpoint(run / "model_RA_best.pth.tar")["state_dict"]
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}},
        tmp_path / "paper.pth.tar",
    )
    common = [
        "--eval",
        "--pretrained",
        tmp_path / "paper.pth.tar",
        "--width",
        0.0625,
        "--train_subset",
        50,
        "--test_subset",
        60,
    ]
    assert run_adv(*common, "--test_step", 2).code == 0
    outcome = run_adv(*common, "--test_step", 2, "--eval_attack", "cw")
    assert "CW-2" in outcome.out
    wrong = run_adv("--eval", "--pretrained", tmp_path / "paper.pth.tar")
    assert wrong.code == 2
    assert "conv1.weight has shape" in wrong.err


# ---------------------------------------------------------------- bad input


def assert_refused(outcome, code, *parts):
    assert outcome.code == code
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    for part in parts:
        assert part in outcome.err


CHANNELS = "--width 0.25 --fb --structure channel --update_frequency 1".split()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--density", "3", "--fb"], "(0, 1]"),
        (["--epochs", "1", "--fb"], "--update_frequency 900"),
        (["--arch", "vgg16"], "vgg16 cannot take 8x8"),
        (["--dataset", "imagefolder", "--data", "nowhere"], "no such folder"),
        (["--train_subset", "99999"], "--train_subset"),
        (["--fb", "--density", "0.000001", "--update_frequency", "1"], "fewer weights"),
        (["--eval", "--pretrained", "nowhere.pth.tar"], "no such checkpoint"),
        (["--resume_dir", "nowhere"], "no such checkpoint"),
        (["--unknown"], "unknown argument"),
        (["--width", "1000"], "cannot be built"),
        (["--save_dir", ""], "must not be empty"),
        ([*CHANNELS, "--channel_multiple", "999"], "--channel_multiple of 999 divides none"),
        ([*CHANNELS, "--density", "0.01"], "less than half of a --channel_multiple"),
        ([*CHANNELS, "--sparse_init", "snip"], "draws its first channels by the seed"),
        ([*CHANNELS, "--growth", "momentum"], "applies to weights only; channels grow by"),
        ([*CHANNELS, "--flops", "0.25", "--density", "0.5"], "--flops, which gives the density"),
        (["--structure", "channel"], "a dense run, which has no masks"),
        (["--fb", "--update_frequency", "1", "--channel_multiple", "8"], "masks of weights"),
        (
            ["--fix", "--sparse_init", "magnitude", "--width", "0.0625", "--density", "1e-6"],
            "fewer weights",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run_adv, tmp_path, monkeypatch, flags, part):
    monkeypatch.chdir(tmp_path)
    assert_refused(
        run_adv("--save_dir", "runs", *flags) if "--eval" not in flags else run_adv(*flags), 2, part
    )
    assert not list(tmp_path.glob("runs"))


@pytest.mark.parametrize("script", ["run_adv", "run_eb"])
def test_channels_without_torch_pruning_say_what_to_install(request, tmp_path, monkeypatch, script):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    channels = CHANNELS if script == "run_adv" else ["--pruning", "channel", "--density", "0.5"]
    flags = [*channels, "--dataset", "digits", "--save_dir", tmp_path / "runs"]
    assert_refused(request.getfixturevalue(script)(*flags), 2, "pip install torch-pruning")
    assert not (tmp_path / "runs").exists()


def test_a_corrupt_image_is_named_and_nothing_is_written(run_adv, tmp_path, image_tree):
    (image_tree / "train" / "bee" / "007.png").write_bytes(b"\x89PNG broken")
    outcome = run_adv(
        "--dataset", "imagefolder", "--data", image_tree, "--save_dir", tmp_path / "runs"
    )
    assert_refused(outcome, 2, "bee/007.png")
    assert not (tmp_path / "runs").exists()


def test_a_run_is_never_overwritten(run_adv, tmp_path):
    run_adv(*toy.TOY_RUN, "--save_dir", tmp_path)
    before = files(tmp_path)
    assert_refused(
        run_adv(*toy.TOY_RUN, "--save_dir", tmp_path), 2, "already holds a run", "--resume"
    )
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_refused(run_adv, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(
        run_adv(*toy.TOY_RUN, "--save_dir", tmp_path / "file"), 2, "cannot write the run folder"
    )


def test_checkpoints_of_another_architecture_are_refused(run_adv, tmp_path):
    run_adv(*toy.TOY_RUN, "--save_dir", tmp_path)
    path = only_run(tmp_path).best_ra
    assert_refused(
        run_adv("--eval", "--pretrained", path, "--arch", "resnet34"),
        2,
        "contradicts the checkpoint",
    )
    content = load_checkpoint(path)
    content["network"]["arch"] = "resnet34"
    torch.save(content, tmp_path / "wrong.pth.tar")
    assert_refused(
        run_adv("--eval", "--pretrained", tmp_path / "wrong.pth.tar"),
        2,
        "not a checkpoint of this resnet34",
    )


def test_eval_refuses_what_the_network_cannot_take(run_adv, tmp_path, image_tree):
    flags = [
        "--dataset",
        "imagefolder",
        "--data",
        image_tree,
        "--image_size",
        32,
        "--arch",
        "vgg11",
        "--width",
        0.0625,
    ]
    flags += ["--epochs", 1, "--train_step", 1, "--test_step", 1, "--save_dir", tmp_path / "r"]
    assert run_adv(*flags).code == 0
    path = only_run(tmp_path / "r").best_ra
    assert_refused(
        run_adv("--eval", "--pretrained", path, "--image_size", 16), 2, "vgg11 cannot take 16x16"
    )


def test_checkpoints_with_odd_contents_are_refused(run_adv, finished, tmp_path):
    paths = RunPaths(finished(*toy.TOY_RUN, to=tmp_path / "runs"))
    content = load_checkpoint(paths.checkpoint)
    torch.save({**content, "settings": "none"}, tmp_path / "odd.pth.tar")
    assert_refused(
        run_adv("--eval", "--pretrained", tmp_path / "odd.pth.tar"),
        2,
        "settings are not names and values",
    )
    torch.save({k: v for k, v in content.items() if k != "optimizer"}, paths.checkpoint)
    assert_refused(
        run_adv(*toy.TOY_RUN, "--save_dir", tmp_path / "runs", "--resume"),
        2,
        "cannot be resumed from",
    )


SMALL = "--dataset imagefolder --width 0.0625 --epochs 1 --train_step 1 --test_step 1".split()


def test_a_run_is_of_its_images_wherever_they_lie(run_adv, tmp_path, image_tree):
    flags = [*SMALL, "--save_dir", tmp_path / "r"]
    assert run_adv(*flags, "--data", image_tree).code == 0
    first = only_run(tmp_path / "r").root
    moved = shutil.copytree(image_tree, tmp_path / "moved")
    assert_refused(run_adv(*flags, "--data", moved), 2, f"{first} already holds a run")
    other = toy.write_image_tree(tmp_path / "other", side=32)
    outcome = run_adv(*flags, "--data", other, "--resume")
    assert (outcome.code, f"{first} has these settings and other data" in outcome.out) == (
        0,
        True,
    ), outcome.err
    assert len(list((tmp_path / "r").iterdir())) == 2


def test_resume_says_which_images_changed(run_adv, tmp_path, image_tree):
    data = shutil.copytree(image_tree, tmp_path / "data")
    flags = [*SMALL, "--save_dir", tmp_path / "r", "--data", data]
    assert run_adv(*flags).code == 0
    root, before = only_run(tmp_path / "r").root, files(tmp_path / "r")
    changed = next((data / "test").rglob("*.png"))
    Image.fromarray(255 - np.asarray(Image.open(changed))).save(changed)
    for more in (["--resume"], None):
        again = run_adv("--resume_dir", root) if more is None else run_adv(*flags, *more)
        assert_refused(
            again,
            2,
            str(root),
            f"trained on other data than {data} has now: its test pixels differ",
        )
    assert files(tmp_path / "r") == before


def test_a_nan_loss_stops_names_the_step_and_keeps_the_last_good_checkpoint(
    run_adv, tmp_path, monkeypatch
):
    original, steps = utils.training.engine.train_step, []

    def poisoned(*arguments, **options):
        done = original(*arguments, **options)
        steps.append(1)
        return done._replace(loss=done.loss * float("nan")) if len(steps) == 6 else done

    monkeypatch.setattr(utils.training.engine, "train_step", poisoned)
    outcome = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path)
    paths = only_run(tmp_path)
    assert_refused(
        outcome,
        3,
        "nan in epoch 2, step 2 of 4",
        f"last good checkpoint is {paths.checkpoint} (epoch 1)",
    )
    content = load_checkpoint(paths.checkpoint)
    assert content["epoch"] == 1
    assert all(value.isfinite().all() for value in content["state_dict"].values())
    assert not paths.summary.exists()


def test_a_real_divergence_is_caught(run_adv, tmp_path):
    assert_refused(
        run_adv(*toy.TOY_RUN, "--save_dir", tmp_path, "--lr", "1e30"),
        3,
        "the loss became nan",
        "no checkpoint yet",
    )


def test_a_network_broken_by_the_last_step_is_not_saved(run_adv, tmp_path):
    """With one step an epoch, the loss is still finite when the weights no longer are."""
    flags = ["--batch_size", "100", "--lr", "1e30"]
    outcome = run_adv(*toy.TOY_RUN, *flags, "--save_dir", tmp_path)
    assert_refused(outcome, 3, "no longer finite after epoch 1, step 1 of 1", "no checkpoint yet")
    assert not only_run(tmp_path).checkpoint.exists()


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(run_adv, tmp_path, monkeypatch):
    """A limit on file sizes makes a write fail as a full disk does."""
    original = utils.training.run.Run.adversarial_epoch

    def stop_after_one(self, epoch, title):
        if epoch == 1:
            raise KeyboardInterrupt
        original(self, epoch, title)

    monkeypatch.setattr(utils.training.run.Run, "adversarial_epoch", stop_after_one)
    assert run_adv(*toy.TOY_RUN, "--save_dir", tmp_path).code == 130
    paths = only_run(tmp_path)
    before = files(tmp_path)[paths.checkpoint]
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)); import"
        " main_adv; from utils.errors import run_command; sys.exit(run_command(main_adv.main))"
    )
    command = [sys.executable, "-c", script, *toy.TOY_RUN, "--save_dir", str(tmp_path), "--resume"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 3
    assert len(result.stderr.strip().splitlines()) == 1
    assert "File too large" in result.stderr
    assert files(tmp_path)[paths.checkpoint] == before
    assert not [name for name in os.listdir(paths.root) if name.startswith(".")]


def test_ctrl_c_is_one_line_and_can_be_resumed(tmp_path):
    flags = [
        "--dataset",
        "digits",
        "--width",
        "0.0625",
        "--epochs",
        "400",
        "--train_subset",
        "60",
        "--test_subset",
        "20",
    ]
    flags += [
        "--train_step",
        "1",
        "--test_step",
        "1",
        "--save_dir",
        str(tmp_path),
        "--decreasing_lr",
        "200",
    ]
    process = subprocess.Popen(
        [sys.executable, "main_adv.py", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted"
    where = r"\(epoch \d+(, and (step \d of \d|all steps) of the next)?\)"
    assert re.search(rf"interrupted; the last good checkpoint is .* {where}; --resume", out)
    assert load_checkpoint(only_run(tmp_path).checkpoint)["epoch"] >= 2
