"""``main_adv.py --eval`` as a command; test_trials.py and test_scores.py test the attacks."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import utils.settings.applied
from data import Split
from tests import toy
from utils.evaluation.scores import evaluate
from utils.storage.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture
def trained(finished, tmp_path):
    """The best model of a toy run."""
    return finished(*toy.TOY_RUN, to=tmp_path / "runs") / "model_RA_best.pth.tar"


def results(checkpoint):
    return {
        path.name: json.loads(path.read_text())
        for path in sorted((checkpoint.parent / "evaluations").glob("*.json"))
    }


def answers(checkpoint):
    (path,) = (checkpoint.parent / "evaluations").glob("*.pth.tar")
    return load_checkpoint(path)


def evaluation(run_adv, checkpoint, *flags):
    outcome = run_adv("--eval", "--pretrained", checkpoint, *flags)
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_answers_are_kept_by_image_and_their_means_are_the_summary(run_adv, trained):
    out = evaluation(run_adv, trained, "--test_step", 2, "--restarts", 2)
    ((name, result),) = results(trained).items()
    assert name.startswith("model_RA_best_pgd-2-x-2_")
    assert (result["checkpoint"], result["attack"], result["title"]) == (
        "model_RA_best.pth.tar",
        "pgd",
        "PGD-2 x 2",
    )
    assert (result["norm"], result["eps"], result["images"]) == (
        "linf",
        pytest.approx(8.0),
        {"test": 60, "train": 100},
    )
    assert f"test RA (PGD-2 x 2, linf 8/255) {result['test_ra']:.2f}" in out
    content = answers(trained)
    predicted, labels = content["outcomes"]["predicted"], content["labels"]
    assert 100 * (predicted["clean"] == labels["test"]).double().mean().item() == pytest.approx(
        result["test_sa"]
    )
    assert 100 * (
        predicted["PGD-2, start 2"] == labels["test"]
    ).double().mean().item() == pytest.approx(result["test_ra"])
    assert 100 * (
        predicted["PGD-2, train, start 2"] == labels["train"]
    ).double().mean().item() == pytest.approx(result["train_ra"])
    assert result["robust_gap"] == result["train_ra"] - result["test_ra"]


def test_a_second_call_reads_what_the_first_found(run_adv, trained, monkeypatch):
    first = evaluation(run_adv, trained)
    monkeypatch.setattr(
        "utils.evaluation.trials._answers", lambda *given: pytest.fail("looked again")
    )
    second = evaluation(run_adv, trained)
    assert first.splitlines()[-2:] == second.splitlines()[-2:]
    assert "resuming from" in second


def test_another_attack_seed_subset_or_network_is_another_evaluation(run_adv, trained):
    for flags in (
        [],
        ["--test_eps", 4],
        ["--seed", 2],
        ["--test_subset", 20],
        ["--eval_attack", "cw"],
        ["--test_gamma", 1],
    ):
        evaluation(run_adv, trained, *flags)
    assert len(results(trained)) == 6
    content = load_checkpoint(trained)
    content["state_dict"]["linear.bias"] += 1.0
    torch.save(content, trained)
    evaluation(run_adv, trained)
    assert len(results(trained)) == 7


def test_a_radius_of_another_norm_is_said_and_one_of_another_unit_refused(run_adv, trained):
    assert "note: --norm l2 with --test_eps 8 has next to no effect" in evaluation(
        run_adv, trained, "--norm", "l2"
    )
    before = results(trained)
    outcome = run_adv("--eval", "--pretrained", trained, "--test_eps", 0.031)
    assert (outcome.code, outcome.err.count("\n"), results(trained)) == (2, 1, before)
    assert "--test_eps is in units of 1/255" in outcome.err


COMMON = "--eval --restarts 30 --test_step 3 --eval_dir"


def start(checkpoint, folder, *flags):
    command = [
        sys.executable,
        "main_adv.py",
        *COMMON.split(),
        str(folder),
        "--pretrained",
        str(checkpoint),
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes_in(folder):
    (path,) = folder.glob("*.pth.tar")
    return load_checkpoint(path)["outcomes"]


@pytest.mark.parametrize("by", ["limit", "signal"])
def test_cut_and_continued_is_uncut(trained, tmp_path, by):
    whole = start(trained, tmp_path / "whole")
    assert whole.wait(120) == 0
    if by == "limit":
        for turn in range(60):
            process = start(trained, tmp_path / "cut", "--time_limit", "0.0001")
            if process.wait(120) == 0:
                break
            assert process.returncode == 75
            assert "resumes from" in process.stderr.read()
            if turn == 2:  # enough interruptions: each costs a process start
                process = start(trained, tmp_path / "cut")
                assert process.wait(120) == 0
                break
        assert turn >= 1
    else:
        process = start(trained, tmp_path / "cut")
        for line in process.stdout:  # ends with the process
            if line.startswith("PGD-3:"):
                process.send_signal(signal.SIGINT)
                break
        assert process.wait(120) == 130, process.stderr.read()
        process = start(trained, tmp_path / "cut")
        assert process.wait(120) == 0
    one, other = outcomes_in(tmp_path / "whole"), outcomes_in(tmp_path / "cut")
    assert one["batches"] == other["batches"]
    assert all(
        torch.equal(one["predicted"][name], other["predicted"][name]) for name in one["predicted"]
    )
    found = [
        json.loads(next(folder.glob("*.json")).read_text())
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert found[0].pop("when") < found[1].pop("when")
    assert found[0] == found[1]


def test_autoattack_by_image(run_adv, trained):
    pgd = evaluation(run_adv, trained, "--test_step", 20, "--test_subset", 12)
    out = evaluation(run_adv, trained, "--eval_attack", "autoattack", "--test_subset", 12)
    strong, weak = (
        next(r for r in results(trained).values() if r["attack"] == kind)
        for kind in ("autoattack", "pgd")
    )
    assert strong["title"] == "AutoAttack"
    assert list(strong["trials"]) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert strong["test_ra"] == strong["trials"]["square"] <= weak["test_ra"]
    assert strong["train_ra"] is None
    assert "test RA (AutoAttack, linf 8/255)" in out
    assert "test RA (PGD-20, linf 8/255)" in pgd


def test_the_gap_is_of_the_training_images_that_the_run_took(run_adv, finished, tmp_path):
    run = finished(*toy.TOY_RUN, "--gap_subset", 20, to=tmp_path)
    evaluation(run_adv, run / "model_RA_best.pth.tar")
    (result,) = results(run / "model_RA_best.pth.tar").values()
    summary = json.loads((run / "summary.json").read_text())
    assert result["images"]["train"] == 20
    assert result["train_ra"] == summary["best"]["train_ra"]


def test_a_weak_start_and_the_data_are_told(run_adv, trained):
    out = evaluation(run_adv, trained, "--no-test_randinit")
    (result,) = results(trained).values()
    assert "without random start" in out
    assert result["digests"] == json.loads((trained.parent / "config.json").read_text())["digests"]
    assert result["when"] > "2026"


def test_what_others_store_as_an_epoch_does_not_spoil_the_result(run_adv, trained):
    content = load_checkpoint(trained)
    torch.save({**content, "epoch": torch.tensor(3)}, trained)
    evaluation(run_adv, trained)
    (result,) = results(trained).values()
    assert result["network"]["epoch"] is None


def test_a_network_trained_in_one_step_is_evaluated_in_another_ball(run_adv, finished, tmp_path):
    run = finished(*toy.TOY_RUN, "--train_attack", "n-fgsm", to=tmp_path)
    evaluation(run_adv, run / "model_RA_best.pth.tar", "--norm", "l2", "--test_eps", 128)


def test_an_attack_is_judged_by_its_own_loss(run_adv, trained):
    """Huge logits leave the cross-entropy without a gradient, and the margin with one."""
    content = load_checkpoint(trained)
    content["state_dict"]["linear.weight"] *= 1e9
    torch.save(content, trained)
    few = ["--test_subset", 20, "--test_step", 1]
    assert "has no gradient" not in evaluation(run_adv, trained, "--eval_attack", "cw", *few)
    assert "loss (ce) has no gradient at" in evaluation(run_adv, trained, *few)


def test_transfer_names_its_source(run_adv, trained, tmp_path):
    other = trained.parent.with_name("fb_d0.2_s9") / trained.name
    other.parent.mkdir()
    content = load_checkpoint(trained)
    content["state_dict"]["linear.weight"] += 0.01
    torch.save(content, other)
    out = evaluation(run_adv, trained, "--source", other)
    (result,) = results(trained).values()
    assert result["attack"] == "transfer"
    assert result["source"] == str(other)
    assert f"crafted on {other.parent.name}/model_RA_best" in out
    assert result["train_ra"] is None


def test_signs_of_gradient_masking(run_adv, trained):
    out = evaluation(run_adv, trained, "--eval_attack", "masking", "--test_subset", 20)
    (result,) = results(trained).values()
    assert {"noise", "one step", "PGD-10", "PGD-100", "PGD-20 in 16 eps"} <= set(result["trials"])
    assert len(result["signs"]) == 6
    assert "is noise over half as strong as PGD?" in out
    (picture,) = (trained.parent / "evaluations").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_unsound_networks_are_refused_before_anything_is_measured(run_adv, trained):
    content = load_checkpoint(trained)
    content["state_dict"]["linear.weight"] *= 0.0
    torch.save(content, trained)
    outcome = run_adv("--eval", "--pretrained", trained)
    assert outcome.code == 2
    assert "gradient is zero at all 32 images" in outcome.err
    assert not (trained.parent / "evaluations").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--restarts", 0], "at least 1"),
        (["--restarts", 2, "--no-test_randinit"], "all starts are the same"),
        (["--restarts", 2, "--eval_attack", "autoattack"], "attacks of its own"),
        (["--source", "nowhere.pth.tar"], "no such checkpoint"),
        (["--eval_attack", "masking", "--test_step", 3], "tries several"),
        (["--eval_dir", "FILE"], "--eval_dir DIR writes elsewhere"),
    ],
)
def test_bad_input(run_adv, trained, tmp_path, flags, message):
    (tmp_path / "file").write_text("")
    outcome = run_adv(
        "--eval",
        "--pretrained",
        trained,
        *(str(tmp_path / "file") if f == "FILE" else f for f in flags),
    )
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (trained.parent / "evaluations").exists()


def test_flags_of_an_evaluation_are_refused_in_training(run_adv):
    outcome = run_adv("--restarts", 2)
    assert outcome.code == 2
    assert "add --eval" in outcome.err


def test_the_library_call_agrees(run_adv, trained):
    from data import load_data
    from models.loading import network_of
    from utils.attacks import PGD

    evaluation(run_adv, trained, "--test_step", 2, "--restarts", 3)
    (result,) = results(trained).values()
    content = load_checkpoint(trained)
    model = network_of(content, trained, content["network"], torch.device("cpu"))
    score = evaluate(
        model, load_data("digits", test_subset=60).test, PGD(8 / 255, 2 / 255, 2), restarts=3
    )
    assert score.accuracy == result["test_ra"]


def test_a_file_of_another_evaluation_is_not_gone_on_with(run_adv, trained):
    evaluation(run_adv, trained)
    (path,) = (trained.parent / "evaluations").glob("*.pth.tar")
    content = load_checkpoint(path)
    torch.save({**content, "key": "another"}, path)
    outcome = run_adv("--eval", "--pretrained", trained)
    assert outcome.code == 2
    assert "belongs to another evaluation" in outcome.err


def test_images_that_changed_are_another_evaluation(run_adv, image_tree, tmp_path):
    """One changed pixel in one of many images is enough."""
    flags = [
        f
        for f in toy.TOY_RUN
        if f not in ("--dataset", "digits", "--train_subset", "100", "--test_subset", "60")
    ]
    assert (
        run_adv(
            *flags,
            "--dataset",
            "imagefolder",
            "--data",
            image_tree,
            "--save_dir",
            tmp_path / "runs",
        ).code
        == 0
    )
    (checkpoint,) = (tmp_path / "runs").glob("*/model_RA_best.pth.tar")
    evaluation(run_adv, checkpoint)
    assert len(results(checkpoint)) == 1
    evaluation(run_adv, checkpoint)
    assert len(results(checkpoint)) == 1
    changed = image_tree / "test" / "bee" / "003.png"
    pixels = np.array(Image.open(changed))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(changed)
    evaluation(run_adv, checkpoint)
    assert len(results(checkpoint)) == 2


# ---------------------------------------------------------------- which classes, which network


@pytest.fixture
def reversed_digits(monkeypatch):
    """Call it to have the digits loaded with their classes numbered in the opposite order."""
    original = utils.settings.applied.load_data

    def load(*arguments, **options):
        found = original(*arguments, **options)
        splits = {
            part: replace(split, labels=9 - split.labels)
            for part, split in vars(found).items()
            if isinstance(split, Split)
        }
        return replace(found, classes=found.classes[::-1], **splits)

    return lambda: monkeypatch.setattr(utils.settings.applied, "load_data", load)


def test_classes_are_matched_by_name(run_adv, trained, reversed_digits, tmp_path):
    evaluation(run_adv, trained)
    reversed_digits()
    with pytest.warns(
        UserWarning, match="in another order than the data: they are matched by name"
    ):
        evaluation(run_adv, trained, "--eval_dir", tmp_path / "again")
    (before,), (after,) = (
        results(trained).values(),
        [json.loads(path.read_text()) for path in (tmp_path / "again").glob("*.json")],
    )
    assert all(
        before[name] == after[name] for name in ("test_sa", "test_ra", "train_ra", "network")
    )
    (again,) = (tmp_path / "again").glob("*.pth.tar")
    before, after = answers(trained), load_checkpoint(again)
    # accuracies alone could agree by chance
    assert torch.equal(before["labels"]["test"], after["labels"]["test"])
    predicted = [kept["outcomes"]["predicted"]["clean"] for kept in (before, after)]
    assert torch.equal(*predicted)


def test_other_classes_are_refused_and_transfer_needs_one_order(
    run_adv, trained, reversed_digits, tmp_path
):
    content = load_checkpoint(trained)
    other = tmp_path / "other.pth.tar"
    names = ["zero", *content["network"]["classes"][1:]]
    save_checkpoint(other, {**content, "network": {**content["network"], "classes": names}})
    outcome = run_adv("--eval", "--pretrained", other, "--eval_dir", tmp_path)
    assert (outcome.code, "other classes than the data: zero and not 0" in outcome.err) == (
        2,
        True,
    ), outcome.err
    save_checkpoint(
        other,
        {
            **content,
            "network": {**content["network"], "classes": content["network"]["classes"][::-1]},
        },
    )
    outcome = run_adv("--eval", "--pretrained", trained, "--source", other, "--eval_dir", tmp_path)
    assert (
        outcome.code,
        "numbers the classes in another order than --pretrained" in outcome.err,
    ) == (2, True), outcome.err
    nameless = {name: value for name, value in content["network"].items() if name != "classes"}
    save_checkpoint(other, {**content, "network": nameless})
    assert run_adv("--eval", "--pretrained", other, "--eval_dir", tmp_path).code == 0


def test_an_evaluation_names_its_network_as_the_summary_does(run_adv, trained):
    content, summary = (
        load_checkpoint(trained),
        json.loads((trained.parent / "summary.json").read_text()),
    )
    evaluation(run_adv, trained)
    (found,) = results(trained).values()
    assert found["network"] == {
        "weights": summary["weights"][trained.name],
        "epoch": content["epoch"],
        "val_ra": content["val_ra"],
    }
    assert summary["weights"].keys() == {
        "model_RA_best.pth.tar",
        "model_SA_best.pth.tar",
        "checkpoint.pth.tar",
    }
