import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils.training.engine
import utils.training.run
import utils.training.stage
from models import build_model
from models.channels import narrow, plan_largest
from models.flops import layer_costs, paper_inference, real_inference
from models.loading import build_network
from sparse_core import initial_masks
from tests import toy
from tests.toy import only_run
from utils.early_bird import EarlyBird
from utils.storage.checkpoint import load_checkpoint
from utils.storage.run_folder import read_epochs, read_summary

ROOT = Path(__file__).parent.parent
BIRD = [*toy.TOY_BIRD, *toy.EASY_TICKET]
DEVICE = torch.device("cpu")


def files(root):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def fresh():
    return build_model("resnet18", 10, width=0.0625, mean=[0.3], std=[0.3])


def stage1_network(paths):
    model = fresh()
    model.load_state_dict(load_checkpoint(paths.stage1)["state_dict"])
    return model


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(("inside", "pruning"), [(True, "unstructured"), (False, "channel")])
def test_the_scripts_run_from_their_folder_and_from_the_root(tmp_path, pruning, inside):
    """The original command at toy size gives a ticket and stage-2 results."""
    where, script = (
        (ROOT / "Robust-Bird", "train_eb.py") if inside else (ROOT, "Robust-Bird/train_eb.py")
    )
    flags = [
        "--stage1",
        "sgd",
        "--stage2",
        "pgd",
        "--arch",
        "resnet18",
        "--pruning",
        pruning,
        "--density",
        "0.5",
    ]
    command = [sys.executable, script, *BIRD, *flags, "--save_dir", str(tmp_path)]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "the ticket emerged after epoch 2" in result.stdout
    assert re.search(r"stage 2 epoch 2/2 .* test RA", result.stdout)
    paths = only_run(tmp_path)
    assert sorted(os.listdir(paths.root)) == sorted(
        [*toy.RUN_FILES, "model_stage1.pth.tar", "mask_distances.png"]
    )


def test_both_stages_are_in_the_metrics_and_the_second_in_the_summary(run_eb, tmp_path):
    outcome = run_eb(*BIRD, "--save_dir", tmp_path, "--density", 0.3)
    assert outcome.code == 0, outcome.err
    paths = only_run(tmp_path)
    rows, summary = read_epochs(paths), read_summary(paths)
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [row["ticket"] for row in rows[:2]] == [False, True]
    assert [len(row["mask_distances"]) for row in rows[:2]] == [0, 1]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.01, 0.1, 0.01])
    assert [f"{row['density']:.4f}" for row in rows] == ["1.0000", "1.0000", "0.3000", "0.3000"]
    assert not {"val_ra", "test_ra", "test_sa", "train_ra"} & rows[0].keys()
    assert {"val_ra", "val_sa", "test_ra", "test_sa", "train_ra"} <= rows[2].keys()
    assert summary["method"] == "rb"
    assert summary["best"]["val_ra"] == max(row["val_ra"] for row in rows[2:])
    assert summary["final"]["epoch"] == 2
    first = summary["stage1"]
    assert (first["kind"], first["epochs"], first["emerged"], first["val_sa"]) == (
        "sgd",
        2,
        True,
        rows[1]["val_sa"],
    )
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    config = json.loads(paths.config.read_text())
    assert config["settings"]["epochs1"] == 4
    assert "kept" not in config["network"]


@pytest.mark.parametrize("stage1", ["sgd", "pgd", "fast"])
def test_flops_add_what_stage_1_took(run_eb, tmp_path, stage1):
    assert (
        run_eb(
            *BIRD, "--train_step", 3, "--stage1", stage1, "--save_dir", tmp_path, "--density", 0.3
        ).code
        == 0
    )
    paths = only_run(tmp_path)
    costs, summary = layer_costs(fresh(), (1, 8, 8)), read_summary(paths)
    masks = load_checkpoint(paths.checkpoint)["masking"]["masks"]
    live = {name: int(mask.sum()) for name, mask in masks.items()}
    passes = {"sgd": 1, "pgd": 1 + 3, "fast": 1 + 1}[stage1]
    for count, inference in (("real", real_inference), ("paper", paper_inference)):
        ticket, dense = inference(costs, live), inference(costs)
        assert summary["flops"][count]["inference"] == ticket
        assert (
            summary["flops"][count]["training"]
            == 3 * 4 * 100 * 2 * ticket + 3 * passes * 100 * 2 * dense
        )


def test_an_unstructured_ticket_is_the_global_magnitude_mask_of_stage_1(run_eb, tmp_path):
    assert run_eb(*BIRD, "--save_dir", tmp_path, "--density", 0.3).code == 0
    paths = only_run(tmp_path)
    expected, content = (
        initial_masks(stage1_network(paths), 0.3, "magnitude"),
        load_checkpoint(paths.checkpoint),
    )
    assert all(
        torch.equal(mask, expected[name]) for name, mask in content["masking"]["masks"].items()
    )
    assert content["masking"]["events"] == []
    for name, mask in expected.items():
        assert not content["state_dict"][name][~mask].any()


def test_stage_2_goes_on_from_the_weights_of_stage_1(run_eb, tmp_path, monkeypatch):
    """No rewinding, a fresh optimizer, and for channels the narrow network's weights."""
    for pruning in ("unstructured", "channel"):
        seen = []
        original = utils.training.run.Run.adversarial_epoch

        def spy(self, epoch, title, original=original, seen=seen):
            if epoch == 0:
                seen.append(
                    (
                        {k: v.clone() for k, v in self.stage.model.state_dict().items()},
                        dict(self.stage.optimizer.state),
                    )
                )
            original(self, epoch, title)

        monkeypatch.setattr(utils.training.run.Run, "adversarial_epoch", spy)
        assert (
            run_eb(
                *BIRD, "--save_dir", tmp_path / pruning, "--density", 0.5, "--pruning", pruning
            ).code
            == 0
        )
        monkeypatch.setattr(utils.training.run.Run, "adversarial_epoch", original)
        ((state, momenta),) = seen
        assert momenta == {}
        first = stage1_network(only_run(tmp_path / pruning))
        expected = first.state_dict()
        if pruning == "channel":
            plan, live, _ = plan_largest(first, (1, 8, 8), 0.5, floor=0.1)
            expected = narrow(first, plan.channels.kept(live)).state_dict()
        else:
            masks = initial_masks(first, 0.5, "magnitude")
            expected = {
                name: value * masks[name] if name in masks else value
                for name, value in expected.items()
            }
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_channels_are_gone_and_the_checkpoint_knows_its_widths(run_eb, run_adv, tmp_path):
    outcome = run_eb(*BIRD, "--save_dir", tmp_path, "--density", 0.5, "--pruning", "channel")
    assert outcome.code == 0, outcome.err
    paths = only_run(tmp_path)
    summary, rows = read_summary(paths), read_epochs(paths)
    content = load_checkpoint(paths.best_ra)
    model = build_network(content["network"], DEVICE)
    model.load_state_dict(content["state_dict"])
    dense, small = (sum(p.numel() for p in m.parameters() if p.dim() > 1) for m in (fresh(), model))
    assert rows[-1]["density"] == summary["density"] == small / dense < 0.6
    widths = {
        name: layer.weight.shape[0]
        for name, layer in model.named_modules()
        if f"{name}.weight" in fresh().state_dict()
        and layer.weight.shape[0] < fresh().get_submodule(name).weight.shape[0]
    }
    assert summary["channels"] == widths
    assert all(width % 8 == 0 for width in widths.values())
    assert (
        summary["flops"]["real"]["inference"]
        == real_inference(layer_costs(model, (1, 8, 8)))
        == rows[-1]["inference_flops"]
    )
    evaluated = run_adv("--eval", "--pretrained", paths.best_ra)
    assert evaluated.code == 0, evaluated.err
    best = summary["best"]
    assert (
        f"test RA (PGD-1, linf 8/255) {best['test_ra']:.2f}  test SA {best['test_sa']:.2f} "
        f" training RA {best['train_ra']:.2f}" in evaluated.out
    )
    assert summary["method"] == "rb-channel"
    assert json.loads(paths.config.read_text())["network"] == content["network"]


@pytest.mark.parametrize("arch", ["resnet50", "vgg11", "wideresnet"])
def test_other_networks_lose_channels_too(run_eb, tmp_path, image_tree, arch):
    size = {"wideresnet": ["--depth_factor", 10, "--width_factor", 1]}.get(
        arch, ["--width", 0.0625]
    )
    flags = (
        "--dataset imagefolder --image_size 32 --epochs1 1 --epochs2 1 --train_step 1 --test_step 1"
        " --batch_size 27".split()
    )
    flags += [
        "--data",
        image_tree,
        "--arch",
        arch,
        *size,
        "--pruning",
        "channel",
        "--density",
        0.5,
        "--save_dir",
        tmp_path / "runs",
    ]
    outcome = run_eb(*flags)
    assert outcome.code == 0, outcome.err
    assert read_summary(only_run(tmp_path / "runs"))["density"] < 0.6


def test_a_layer_that_the_floor_helps_is_named(run_eb, finished, tmp_path):
    """The last group's scales are far below all others, as after a few epochs of clean training."""
    finished(*toy.TOY_RUN, to=tmp_path / "dense")
    state = load_checkpoint(only_run(tmp_path / "dense").checkpoint)["state_dict"]
    for name in ("bn.weight", "layer4.1.bn1.weight"):
        state[name] *= 1e-6
    torch.save({"state_dict": state}, tmp_path / "dense.pth.tar")
    flags = (
        "--dataset digits --width 0.0625 --epochs2 1 --batch_size 25 --train_subset 100"
        " --test_subset 60 --train_step 1 --test_step 1"
    )
    flags = [
        *flags.split(),
        "--stage1_pretrained",
        tmp_path / "dense.pth.tar",
        "--pruning",
        "channel",
        "--density",
        0.5,
        "--channel_multiple",
        1,
    ]
    for floor, stay in ((0, 1), (0.1, 3)):
        outcome = run_eb(*flags, "--channel_floor", floor, "--save_dir", tmp_path / str(floor))
        helped = (
            f"note: by rank alone layer4.0.conv2 would keep 0 of its channels; it keeps its {stay} "
        )
        assert helped in outcome.out, outcome.out + outcome.err


# ---------------------------------------------------------------- when the ticket is drawn


def test_no_ticket_in_time_is_a_warning_and_the_last_mask_is_taken(run_eb, tmp_path):
    outcome = run_eb(*toy.TOY_BIRD, "--eb_window", 3, "--eb_tolerance", 0, "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert (
        "warning: no ticket emerged within --epochs1 4; continuing with the mask of its last epoch"
        in outcome.out
    )
    paths = only_run(tmp_path)
    assert [row["stage"] for row in read_epochs(paths)] == [1, 1, 1, 1, 2, 2]
    assert read_summary(paths)["stage1"]["emerged"] is False


def test_a_window_of_one_is_a_ticket_after_the_first_epoch(run_eb, tmp_path):
    outcome = run_eb(*toy.TOY_BIRD, "--eb_window", 1, "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "the ticket emerged after epoch 1\n" in outcome.out
    assert [row["stage"] for row in read_epochs(only_run(tmp_path))] == [1, 2, 2]


def test_the_base_script_draws_after_exactly_its_epochs(run_base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        EarlyBird,
        "observe",
        lambda self, model, original=EarlyBird.observe: original(self, model) or True,
    )
    outcome = run_base(*toy.TOY_BIRD, "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "the ticket is drawn after epoch 4" in outcome.out
    paths = only_run(tmp_path)
    assert [row["stage"] for row in read_epochs(paths)] == [1, 1, 1, 1, 2, 2]
    assert read_summary(paths)["method"] == "oneshot"


@pytest.mark.parametrize("pruning", ["unstructured", "channel"])
def test_density_one_prunes_nothing_and_says_so(run_eb, tmp_path, pruning):
    outcome = run_eb(*BIRD, "--save_dir", tmp_path, "--density", 1, "--pruning", pruning)
    assert outcome.code == 0, outcome.err
    assert "warning: --density 1 keeps everything, nothing is pruned" in outcome.out
    content = load_checkpoint(only_run(tmp_path).checkpoint)
    assert content["masking"] is None
    assert "channels" not in content["network"]
    assert read_summary(only_run(tmp_path))["density"] == 1


def test_a_trained_network_can_be_pruned_instead(run_eb, finished, tmp_path):
    """From our checkpoint or a bare state dict; content, not path, determines the run's name."""
    finished(*toy.TOY_RUN, to=tmp_path / "dense")
    path = only_run(tmp_path / "dense").checkpoint
    state = load_checkpoint(path)["state_dict"]
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        tmp_path / "paper.pth.tar",
    )
    flags = (
        "--dataset digits --width 0.0625 --epochs2 1 --batch_size 25 --train_subset 100"
        " --test_subset 60 --train_step 1 --test_step 1"
    )
    for number, source in enumerate((path, tmp_path / "paper.pth.tar")):
        outcome = run_eb(
            *flags.split(),
            "--stage1_pretrained",
            source,
            "--save_dir",
            tmp_path / str(number),
            "--density",
            0.3,
        )
        assert outcome.code == 0, outcome.err
        assert "stage 1 epoch" not in outcome.out
    one, two = (only_run(tmp_path / str(number)) for number in range(2))
    model = fresh()
    model.load_state_dict(state)
    expected = initial_masks(model, 0.3, "magnitude")
    masks = [load_checkpoint(paths.checkpoint)["masking"]["masks"] for paths in (one, two)]
    assert all(torch.equal(m[name], expected[name]) for m in masks for name in expected)
    assert one.root.name != two.root.name
    (path.rename(tmp_path / "moved.pth.tar"))
    again = run_eb(
        *flags.split(),
        "--stage1_pretrained",
        tmp_path / "moved.pth.tar",
        "--save_dir",
        tmp_path / "0",
        "--density",
        0.3,
        "--resume",
    )
    assert "is finished" in again.out
    summary = read_summary(one)
    assert (summary["stage1"]["epochs"], summary["stage1"]["kind"]) == (0, None)
    assert (
        summary["flops"]["real"]["training"] == 3 * 2 * 100 * summary["flops"]["real"]["inference"]
    )


def test_robust_accuracy_in_stage_1_on_request(run_eb, tmp_path):
    assert run_eb(*BIRD, "--stage1_ra", "--save_dir", tmp_path).code == 0
    rows = read_epochs(only_run(tmp_path))
    assert all({"val_ra", "val_loss", "test_ra", "test_sa"} <= row.keys() for row in rows)


def test_fast_is_one_large_step_in_eval_mode_on_a_cycle(run_eb, tmp_path, monkeypatch):
    plans = []
    original = utils.training.stage.train_epoch

    def spy(*arguments, **options):
        plans.append(options["plan"])
        return original(*arguments, **options)

    monkeypatch.setattr(utils.training.stage, "train_epoch", spy)
    assert (
        run_eb(*BIRD, "--stage1", "fast", "--attack_mode", "train", "--save_dir", tmp_path).code
        == 0
    )
    attack = plans[0].attack
    assert (attack.eps, attack.step_size, attack.steps, attack.random_start) == (
        8 / 255,
        10 / 255,
        1,
        True,
    )
    assert not plans[0].attack_training
    assert (plans[0].schedule, plans[0].lr, plans[0].epochs) == ("onecycle", 0.2, 4)
    assert plans[-1].attack_training
    assert plans[-1].milestones == (1,)
    assert plans[0].seed != plans[-1].seed


# ---------------------------------------------------------------- resume


RESUMED = {
    "weights": ["--density", 0.5],
    "channels": ["--density", 0.5, "--pruning", "channel"],
    "fast": ["--stage1", "fast", "--stage1_ra"],
}


def state(save_dir):
    """Everything that a run leaves, except times, settings and provenance."""
    paths = only_run(save_dir)
    content = load_checkpoint(paths.checkpoint)
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in read_epochs(paths)]
    summary = {k: v for k, v in read_summary(paths).items() if k not in ("seconds", "settings")}
    summary["stage1"].pop("seconds", None)
    summary.pop("made_by")
    first = load_checkpoint(paths.stage1)["state_dict"] if paths.stage1.exists() else {}
    return {
        **content["state_dict"],
        **{f"stage 1 {name}": value for name, value in first.items()},
    }, (content["network"], rows, summary)


def cut_and_resume(run, finished, flags, tmp_path, monkeypatch, cut_after):
    """Run ``flags`` whole, and interrupted after ``cut_after`` epochs and resumed: both must end
    alike. Returns the output of the interrupted run."""
    finished(*flags, to=tmp_path / "whole", script=run.module)
    original, calls = utils.training.run.Run.train_epoch, []

    def cut(self, epoch, title):
        calls.append(1)
        if len(calls) > cut_after:
            raise KeyboardInterrupt
        return original(self, epoch, title)

    monkeypatch.setattr(utils.training.run.Run, "train_epoch", cut)
    stopped = run(*flags, "--save_dir", tmp_path / "cut")
    assert stopped.code == 130
    monkeypatch.setattr(utils.training.run.Run, "train_epoch", original)
    resumed = run("--resume_dir", only_run(tmp_path / "cut").root)
    assert resumed.code == 0, resumed.err
    (weights, rest), (weights2, rest2) = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert weights.keys() == weights2.keys()
    assert all(torch.equal(weights[name], weights2[name]) for name in weights)
    assert rest == rest2
    before = files(tmp_path / "cut")
    assert "is finished" in run(*flags, "--save_dir", tmp_path / "cut", "--resume").out
    assert files(tmp_path / "cut") == before
    return stopped.out


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("cut_after", [1, 2, 3])
def test_resume_equals_the_run_that_was_never_stopped(
    run_eb, finished, tmp_path, monkeypatch, kind, cut_after
):
    """Interrupted in stage 1, between the stages (ticket drawn, nothing of stage 2 saved), and in
    stage 2."""
    said = cut_and_resume(
        run_eb, finished, [*BIRD, *RESUMED[kind]], tmp_path, monkeypatch, cut_after
    )
    assert f"(stage {1 if cut_after < 3 else 2}, epoch {cut_after if cut_after < 3 else 1})" in said


def test_the_last_checkpoint_of_stage_1_may_be_damaged(run_eb, finished, tmp_path, monkeypatch):
    """The run resumes from the checkpoint before the ticket, finds its masks and draws the same."""
    finished(*BIRD, to=tmp_path / "whole", script="train_eb")
    monkeypatch.setattr(
        "utils.training.robust_bird.RobustBirdRun.adversarial_epoch",
        lambda self, *arguments: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    assert run_eb(*BIRD, "--save_dir", tmp_path / "cut").code == 130
    monkeypatch.undo()
    paths = only_run(tmp_path / "cut")
    content = paths.checkpoint.read_bytes()
    paths.checkpoint.unlink()
    paths.checkpoint.write_bytes(content[:1000])
    outcome = run_eb("--resume_dir", paths.root)
    assert outcome.code == 0, outcome.err
    (weights, rest), (weights2, rest2) = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert all(torch.equal(weights[name], weights2[name]) for name in weights)
    assert rest == rest2


def test_the_base_script_resumes_too(run_base, finished, tmp_path, monkeypatch):
    cut_and_resume(run_base, finished, toy.TOY_BIRD, tmp_path, monkeypatch, 2)


def test_a_pruned_network_resumes_without_the_file_it_came_from(
    run_eb, finished, tmp_path, monkeypatch
):
    finished(*toy.TOY_RUN, to=tmp_path / "dense")
    flags = (
        "--dataset digits --width 0.0625 --epochs2 3 --batch_size 25 --train_subset 100"
        " --test_subset 60 --train_step 1 --test_step 1"
    )
    source = tmp_path / "dense.pth.tar"
    source.write_bytes(only_run(tmp_path / "dense").checkpoint.read_bytes())
    cut_and_resume(
        run_eb,
        finished,
        [*flags.split(), "--stage1_pretrained", source, "--density", 0.3],
        tmp_path,
        monkeypatch,
        1,
    )
    source.unlink()
    assert "is finished" in run_eb("--resume_dir", only_run(tmp_path / "cut").root).out


def test_a_mask_that_is_gone_is_missed_at_once(run_eb, tmp_path, monkeypatch):
    original = utils.training.run.Run.train_epoch

    def cut(self, epoch, title):
        if epoch == 2:
            raise KeyboardInterrupt
        return original(self, epoch, title)

    monkeypatch.setattr(utils.training.run.Run, "train_epoch", cut)
    assert run_eb(*toy.TOY_BIRD, "--save_dir", tmp_path).code == 130
    paths = only_run(tmp_path)
    assert [path.name for path in sorted(paths.mask(1).parent.iterdir())] == [
        "epoch_0001.pth.tar",
        "epoch_0002.pth.tar",
    ]
    paths.mask(1).unlink()
    outcome = run_eb("--resume_dir", paths.root)
    assert (outcome.code, "epoch_0001.pth.tar" in outcome.err) == (2, True)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--density", "1e-6"], "fewer weights than the network has layers"),
        (["--density", "1e-6", "--pruning", "channel"], "fewer channels than it has groups"),
        (["--dataset", "imagefolder", "--data", "nowhere"], "no such folder"),
        (["--data", "nowhere"], "names no data set"),
        (["--stage1_pretrained", "nowhere.pth.tar"], "cannot be read"),
        (["--resume_dir", "nowhere"], "no such checkpoint"),
        (["--arch", "vgg16"], "vgg16 cannot take 8x8"),
        (["--prunning", "channel"], "did you mean --pruning"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run_eb, tmp_path, monkeypatch, flags, part):
    monkeypatch.chdir(tmp_path)
    outcome = run_eb(*flags)
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1
    assert part in outcome.err
    assert not list(tmp_path.iterdir())


def test_networks_that_cannot_be_pruned_are_refused(run_eb, tmp_path):
    assert (
        run_eb(
            *BIRD, "--save_dir", tmp_path / "narrow", "--density", 0.5, "--pruning", "channel"
        ).code
        == 0
    )
    path = only_run(tmp_path / "narrow").best_ra
    common = ["--dataset", "digits", "--epochs2", 1, "--save_dir", tmp_path / "runs"]
    outcome = run_eb(*common, "--width", 0.0625, "--stage1_pretrained", path)
    assert (outcome.code, "channels were already removed" in outcome.err) == (2, True)
    outcome = run_eb(
        *common, "--width", 0.125, "--stage1_pretrained", only_run(tmp_path / "narrow").stage1
    )
    assert (
        outcome.code,
        "it was trained with --width 0.0625, this run has --width 0.125" in outcome.err,
    ) == (2, True)
    sparse = load_checkpoint(only_run(tmp_path / "narrow").stage1)
    for value in sparse["state_dict"].values():
        if value.dim() > 1:
            value[torch.rand(value.shape, generator=torch.Generator().manual_seed(0)) < 0.8] = 0
    torch.save(sparse, tmp_path / "sparse.pth.tar")
    outcome = run_eb(
        *common,
        "--width",
        0.0625,
        "--stage1_pretrained",
        tmp_path / "sparse.pth.tar",
        "--density",
        0.5,
    )
    assert (outcome.code, "is already sparse" in outcome.err) == (2, True)
    assert re.search(
        r"0\.(19|20)\d\d of its weights are not zero, fewer than --density 0\.5 keeps", outcome.err
    )
    sparse["state_dict"]["conv1.weight"][0] = float("nan")
    torch.save(sparse, tmp_path / "nan.pth.tar")
    outcome = run_eb(*common, "--width", 0.0625, "--stage1_pretrained", tmp_path / "nan.pth.tar")
    assert (outcome.code, "not finite" in outcome.err) == (2, True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("network", ["resnet18", {"arch": "resnet18"}, {"channels": []}])
def test_checkpoints_that_do_not_say_what_they_hold_are_refused(
    run_eb, run_adv, finished, tmp_path, network
):
    finished(*toy.TOY_RUN, to=tmp_path / "runs")
    content = load_checkpoint(only_run(tmp_path / "runs").checkpoint)
    content["network"] = (
        {**content["network"], **network} if network == {"channels": []} else network
    )
    torch.save(content, tmp_path / "odd.pth.tar")
    for outcome in (
        run_eb(
            "--dataset",
            "digits",
            "--width",
            0.0625,
            "--stage1_pretrained",
            tmp_path / "odd.pth.tar",
            "--save_dir",
            tmp_path / "no",
        ),
        run_adv("--eval", "--pretrained", tmp_path / "odd.pth.tar"),
    ):
        assert outcome.code == 2
        assert "does not say which" in outcome.err
    assert not (tmp_path / "no").exists()


def test_eval_takes_what_it_needs_of_a_robust_bird_run(run_eb, run_adv, tmp_path):
    """Its milestones make no sense in the epochs of main_adv.py, and are not checked."""
    assert (
        run_eb(*BIRD, "--decreasing_lr", "0.5,3", "--epochs2", 4, "--save_dir", tmp_path).code == 0
    )
    path = only_run(tmp_path).best_ra
    assert run_adv("--eval", "--pretrained", path).code == 0
    assert run_adv("--eval", "--pretrained", path, "--lr", 0.1).code == 2


def test_a_failure_names_its_stage(run_eb, tmp_path, monkeypatch):
    original = utils.training.engine.train_step

    def poisoned(*arguments, attack, **options):
        done = original(*arguments, attack=attack, **options)
        return done if attack is None else done._replace(loss=done.loss * float("nan"))

    monkeypatch.setattr(utils.training.engine, "train_step", poisoned)
    outcome = run_eb(*BIRD, "--save_dir", tmp_path)
    assert outcome.code == 3
    assert (
        "stage 2: the loss became nan in epoch 1, step 1 of 4; the last good checkpoint is"
        in outcome.err
    )


def test_a_run_is_resumed_by_the_script_that_made_it(run_eb, run_base, run_adv, tmp_path):
    assert run_eb(*BIRD, "--save_dir", tmp_path).code == 0
    for other in (run_base, run_adv):
        outcome = other("--resume_dir", only_run(tmp_path).root)
        assert outcome.code == 2
        assert "is from a run of train_eb.py" in outcome.err
    before = files(tmp_path)
    assert run_eb(*BIRD, "--save_dir", tmp_path).code == 2
    assert files(tmp_path) == before
