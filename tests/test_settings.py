import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

from data import load_data
from sparse_core import MaskingConfig
from utils.errors import InputError
from utils.execution.hardware import best_precision
from utils.settings.adversarial import AdversarialSettings, cautions, refuse_idle_masks
from utils.settings.applied import placed
from utils.settings.command_line import as_known, parse_settings
from utils.settings.common import settings_from
from utils.settings.device import pick_device
from utils.settings.robust_bird import EarlyBirdSettings, TicketSettings


def parse(line, stored=None):
    return parse_settings(AdversarialSettings, line.split(), "test", lambda given: stored or {})


def test_defaults_are_the_papers():
    settings = parse(
        "--dataset cifar10 --data data/cifar10 --arch resnet18 --save_dir experiment/dense"
    )
    assert settings.method == "dense"
    assert (
        settings.batch_size,
        settings.lr,
        settings.momentum,
        settings.weight_decay,
        settings.epochs,
    ) == (128, 0.1, 0.9, 5e-4, 200)
    assert settings.milestones == (100, 150)
    train, test = settings.training_attack, settings.test_attack
    assert (train.eps, train.steps, train.step_size, train.norm, train.random_start) == (
        8 / 255,
        10,
        2 / 255,
        "linf",
        True,
    )
    assert (test.eps, test.steps, test.step_size, test.norm, test.random_start) == (
        8 / 255,
        20,
        2 / 255,
        "linf",
        True,
    )
    assert settings.training.attack_training


def test_the_papers_sparse_commands():
    settings = parse("--dataset cifar10 --data data/cifar10 --density 0.2 --dynamic_fre --fbp")
    masking = settings.masking(steps_per_epoch=352)
    assert settings.method == "fbp"
    assert (masking.density, masking.sparse_init, masking.growth, masking.drop_fraction) == (
        0.2,
        "igq",
        "random",
        0.5,
    )
    assert (masking.update_frequency, masking.second_frequency, masking.total_steps) == (
        900,
        1200,
        70_400,
    )
    assert (
        masking.adaptive,
        masking.start_epoch,
        masking.epoch_range,
        masking.update_threshold,
    ) == (True, 100, 4, 0.5)
    assert (masking.prune_ratio, masking.growth_ratio) == (0.4, 0.05)
    assert parse("--fb").masking(352).second_frequency is None
    assert not parse("--fb").masking(352).adaptive


def test_every_sparsity_flag_reaches_the_library():
    line = (
        "--fbp --density 0.3 --sparse_init erk --growth gradient --death-rate 0.4 --decay-schedule"
        " linear --update_frequency 7 --dynamic_fre --second_frequency 9 --dynamic_epoch 5"
        " --epoch_range 3 --update_threshold 0.6 --prune_ratio 0.2 --growth_ratio 0.1 --seed 8"
        " --epochs 20 --decreasing_lr 10"
    )
    assert parse(line).masking(10) == MaskingConfig(
        density=0.3, total_steps=200, sparse_init="erk", growth="gradient", drop_fraction=0.4,
        drop_schedule="linear", update_frequency=7, second_frequency=9, adaptive=True,
        start_epoch=5, epoch_range=3, update_threshold=0.6,
        prune_ratio=0.2, growth_ratio=0.1, seed=8,
    )  # fmt: skip
    assert parse("--fix").masking(10).fixed
    assert not parse("--fb").masking(10).fixed


def test_every_flag_of_the_specification_is_known():
    flags = (
        "--data x --dataset cifar10 --arch wideresnet --depth_factor 34 --width_factor 10 --seed 1"
        " --gpu 0 --print_freq 50 --save_dir d --batch_size 128 --lr .1 --decreasing_lr 100,150"
        " --momentum .9 --weight_decay 5e-4 --epochs 200 --norm linf --train_eps 8 --train_step 10"
        " --train_gamma 2 --train_randinit --test_eps 8 --test_step 20 --test_gamma 2"
        " --test_randinit --fbp --sparse_init igq --growth random --death magnitude"
        " --redistribution none --death-rate .5 --density .2 --dynamic_epoch 100 --decay-schedule"
        " cosine --update_frequency 900 --epoch_range 4 --prune_ratio .4 --growth_ratio .05"
        " --update_threshold .5 --dynamic_fre --second_frequency 1200"
    )
    assert parse(flags).method == "fbp"
    assert parse("--fb --fix").method == parse("--fix").method == "static"


@pytest.mark.parametrize("line", ["--death_rate 0.3 --fb", "--death-rate 0.3 --fb"])
def test_both_spellings(line):
    assert parse(line).death_rate == 0.3


def test_random_starts_are_on_and_can_be_turned_off():
    assert parse("").training_attack.random_start
    assert not parse("--no-train_randinit").training_attack.random_start
    assert not parse("--no-test-randinit").test_attack.random_start


def test_fractions_of_the_run():
    settings = parse("--epochs 12 --decreasing_lr 0.5,0.75 --fbp --dynamic_epoch 0.5")
    assert settings.milestones == (6, 9)
    assert settings.first_adaptive_epoch == 6
    assert (
        settings.run_name()
        == parse("--epochs 12 --decreasing_lr 6,9 --fbp --dynamic_epoch 6").run_name()
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--densty 0.3", "did you mean --density"),
        ("--lr fast", "invalid float"),
        ("--arch resnet19", "invalid choice"),
        ("--density 0 --fb", r"\(0, 1\]"),
        ("--density 1.2 --fb", r"\(0, 1\]"),
        ("--density 1 --fb", "nothing to prune"),
        ("--growth gradient", "no effect with a dense run"),
        ("--fb --fbp", "choose one"),
        ("--fbp --fix", "choose one"),
        ("--fix --growth gradient", "masks do not move"),
        ("--fb --prune_ratio 0.2", "only --fbp"),
        ("--fb --second_frequency 100", "no --dynamic_fre"),
        ("--fb --growth momentum --momentum 0", "--momentum 0"),
        ("--fb --reset", "no meaning"),
        ("--fbp --epochs 20", "past the end of 20 epochs"),
        ("--epochs 20 --decreasing_lr 10,30", "past the end of 20 epochs"),
        (
            "--epochs 2 --decreasing_lr 0.5,0.75",
            "0.75 of 2 epochs comes to epoch 2, the end; leave it out",
        ),
        (
            "--epochs 3 --fbp --dynamic_epoch 0.9 --decreasing_lr 1",
            "0.9 of 3 epochs comes to epoch 3, the end; 0.5 is earlier",
        ),
        ("--decreasing_lr 150,100", "must not decrease"),
        ("--decreasing_lr ten", "neither an epoch nor a fraction"),
        ("--decreasing_lr 3.5", "neither an epoch nor a fraction"),
        ("--data somewhere", "is no folder, and names no data set; name it with --dataset"),
        ("--image_size 16", "not decoded from a folder"),
        ("--arch wideresnet --width 0.5", "--width_factor"),
        ("--device cpu --gpu 0", "no effect with --device cpu"),
        ("--epochs 0", "at least 1"),
        ("--batch_size 1", "at least 2"),
        ("--decreasing_lr nan", "neither an epoch nor a fraction"),
        ("--fbp --dynamic_epoch inf", "neither an epoch nor a fraction"),
        ("--width inf", "finite"),
        ("--lr 1e39", "finite"),
        ("--save_every 0", "at least 1"),
        ("--save_minutes 0", "positive"),
        ("--time_limit -1", "positive"),
        ("--fbp --growth_ratio nan", "finite"),
        ("--resume_dir x --save_dir y", "names the folder itself"),
        ("--eval --pretrained x --eval_attack autoattack --train_subset 5", "test images alone"),
        ("--lr 0", "positive"),
        ("--train_eps -1", "0 or more"),
        ("--train_subset 0", "at least 1"),
        ("--resume --resume_dir x", "choose one"),
        ("--eval", "needs --pretrained"),
        ("--pretrained x", "add --eval"),
        ("--eval_attack cw", "add --eval"),
        ("--eval --pretrained x --save_dir y", "no effect with --eval"),
        ("--eval --pretrained x --lr 0.2", "no effect with --eval"),
        ("--eval --pretrained x --eval_attack autoattack --test_step 5", "its own steps"),
    ],
)
def test_what_cannot_take_effect_is_refused(line, reason):
    with pytest.raises(InputError, match=reason):
        parse(line)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--train_eps 0.0314", r"--train_eps is in units of 1/255, so 0.0314 .* give 8.007"),
        ("--test_eps 0.031", "--test_eps is in units of 1/255"),
        ("--train_gamma 0.00784", "--train_gamma is in units of 1/255, .* give 1.999"),
        ("--norm l2 --train_eps 0.5 --train_gamma 0.1", "give 127.5"),
        ("--norm l2 --train_eps 128 --train_gamma 0.1", "give 25.5"),
        ("--eval --pretrained x --test_eps 0.031", "give 7.905"),
        ("--train_eps 300", r"must lie in \[0, 255\]"),
        (
            "--train_eps 8/256",
            "--train_eps: '8/256' is not a number; the unit is 1/255: give 8 for 8/255",
        ),
        ("--train_eps 0.0314/255", "give 8.007"),
        ("--test_eps eight", "the unit is 1/255: give 8 for 8/255"),
    ],
)
def test_radii_in_another_unit_are_refused(line, reason):
    with pytest.raises(InputError, match=reason):
        parse(line)


def test_no_radius_and_what_a_checkpoint_was_trained_with_are_not_refused():
    assert parse("--train_eps 0 --test_eps 0.5 --train_gamma 0").train_eps == 0
    assert parse("--norm l2 --train_eps 300 --train_gamma 30").train_eps == 300
    assert parse("--eval --pretrained x", {"train_eps": 0.0314, "test_eps": 300.0}).test_eps == 300


def test_a_ball_that_nobody_meant_is_said():
    weak = cautions(parse("--norm l2 --decreasing_lr 9"), 352)
    assert [line[:29] for line in weak] == [
        "--norm l2 with --train_eps 8 ",
        "--norm l2 with --test_eps 8 h",
    ]
    (steps,) = cautions(
        parse("--norm l2 --decreasing_lr 9 --train_eps 128 --train_gamma 15 --test_eps 128"), 352
    )
    assert "20 steps of --test_gamma 2 do not reach half of --test_eps 128" in steps
    assert not cautions(
        parse(
            "--norm l2 --decreasing_lr 9 --train_eps 128 --train_gamma 15 --test_eps 128"
            " --test_gamma 15"
        ),
        352,
    )
    (gray,) = parse(
        "--eval --pretrained x --norm linf", {"norm": "l2", "test_eps": 128.0}
    ).attack_cautions("test")
    assert "gray" in gray
    assert not parse("").attack_cautions("test")
    (stored,) = parse("--eval --pretrained x", {"test_eps": 0.031}).attack_cautions("test")
    assert (
        stored
        == "--norm linf with --test_eps 0.031 has next to no effect; --test_eps 8 --test_gamma 2"
        " is usual"
    )
    strong = parse("--eval --pretrained x --norm l2 --test_eps 128 --eval_attack autoattack")
    assert not strong.attack_cautions("test", own_steps=True)


def test_help_shows_groups_defaults_and_units(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "data:",
        "sparsity:",
        "in 1/255 (default 8.0)",
        "--death_rate X",
        "--time_limit MINUTES",
        "with - for _",
    ):
        assert part in text
    assert "--death-rate" not in text  # it works too, but would double the text


def test_help_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse("--help")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: {Path(sys.argv[0]).name} [flags]"
    assert max(map(len, lines[: lines.index("examples:")])) <= 101  # the description is not wrapped


@pytest.mark.parametrize("kind", [AdversarialSettings, EarlyBirdSettings, TicketSettings])
def test_examples_in_help_are_commands_that_work(kind):
    for example in kind.examples:
        _, script, *flags = shlex.split(example)
        assert Path(script).name == kind.script
        assert (Path(__file__).parents[1] / script).exists()
        parse_settings(kind, flags, "", lambda given: {})


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("--arch resnet19", "resnet18"),
        ("--dataset CIFAR-10", "cifar10"),
        ("--growth grad", "gradient"),
        ("--device gpu", "cuda"),
    ],
)
def test_the_nearest_of_several_choices_is_suggested(line, nearest):
    with pytest.raises(InputError, match=f"did you mean {nearest}"):
        parse(line)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (
            "--dataset CIFAR10 --data x --arch ResNet18 --norm L2",
            "--dataset cifar10 --data x --arch resnet18 --norm l2",
        ),
        ("--fb --sparse_init ERK --growth Gradient", "--fb --sparse_init erk --growth gradient"),
        ("--fb --sparse_init ER", "--fb --sparse_init er"),
        ("--fb --sparse_init fixed_ERK --decay-schedule Cosine", "--fb --sparse_init erk"),
        ("--arch VGG16_BN", "--arch vgg16"),
        (
            "--eval --pretrained x --eval_attack AA",
            "--eval --pretrained x --eval_attack autoattack",
        ),
        ("--train_eps 8/255 --test_gamma 2/255", ""),
        ("--data data/cifar10", "--dataset cifar10 --data data/cifar10"),
    ],
)
def test_what_people_type_is_the_value_it_means(typed, meant):
    assert parse(typed) == parse(meant)
    assert parse(typed).run_name() == parse(meant).run_name()


def test_a_choice_that_is_one_already_stays_as_it_is():
    assert as_known("Own", ["own", "Own"]) == "Own"
    assert as_known("OWN", ["Own"]) == "Own"
    assert as_known("aa", ["pgd"]) == "aa"  # an alias of another flag's value


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("--sparsity 0.8", "--density 0.2"),
        ("--sparsity=0.95", "--density 0.05"),
        ("--fb --sparsity most", "--density"),
        ("--workers 4", "there are no workers"),
        ("--num-workers 4", "there are no workers"),
        ("--resume runs/RUN", "--resume_dir runs/RUN resumes"),
        ("--seed 2 --resume runs/RUN --fb", "--resume_dir runs/RUN resumes"),
        ("--resume=runs/RUN", "--resume_dir runs/RUN resumes"),
        ("--resume --densty 2", "did you mean --density"),
    ],
)
def test_flags_of_other_programs_are_answered(line, answer):
    with pytest.raises(InputError, match=answer):
        parse(line)


@pytest.mark.parametrize("kind", [EarlyBirdSettings, TicketSettings])
def test_epochs_of_two_stages(kind):
    with pytest.raises(InputError, match="use --epochs1 for stage 1 and --epochs2 for stage 2"):
        parse_settings(kind, ["--epochs", "5"], "", lambda given: {})


@pytest.mark.parametrize(
    ("line", "idle"),
    [
        ("", "--density 0.3"),
        ("", "--density 0.2"),
        ("--dataset digits", "--data x"),
        ("--dataset cifar10", "--cache_dir x"),
        ("--arch resnet18", "--depth_factor 28"),
        ("--train_step 0", "--train_gamma 5"),
        ("--train_step 0", "--attack_mode eval"),
        ("--test_step 0", "--test_gamma 5"),
    ],
)
def test_what_is_left_aside_is_said_and_does_not_change_the_run(line, idle):
    settings, plain = parse(f"{line} {idle} --decreasing_lr 9"), parse(f"{line} --decreasing_lr 9")
    (note,) = settings.notes
    assert note.startswith(f"{idle.split()[0]} has no effect with ")
    assert cautions(settings, 352) == [note, *cautions(plain, 352)]
    assert settings == plain
    assert settings.run_name() == plain.run_name()


def test_what_takes_effect_is_not_left_aside():
    assert not parse("--fb --density 0.3").notes
    assert not parse("--dataset cifar10 --data x").notes
    assert not parse("--arch wideresnet --depth_factor 28").notes


def test_a_flag_left_aside_leaves_the_checkpoint_as_it_is():
    """The checkpoint's value counts then, not the default."""
    stored = {"dataset": "digits", "data": "theirs", "epochs": 3, "train_step": 0, "fb": False}
    settings = parse_settings(
        AdversarialSettings,
        "--resume_dir run --data x --train_gamma 5".split(),
        "",
        lambda given: stored | {"train_gamma": 3.0},
    )
    assert (settings.data, settings.train_gamma) == ("theirs", 3.0)
    assert len(settings.notes) == 2


def test_an_evaluation_leaves_flags_of_training_aside():
    settings = parse_settings(
        AdversarialSettings,
        "--eval --pretrained x --tensorboard --print_freq 5".split(),
        "",
        lambda given: {},
    )
    assert not settings.tensorboard
    assert [note.split()[0] for note in settings.notes] == ["--print_freq", "--tensorboard"]


def test_a_flag_is_named_in_one_spelling():
    with pytest.raises(InputError, match=r"^--eval_attack: invalid choice"):
        parse("--eval_attack autoatack")


@pytest.mark.parametrize(
    ("line", "steps", "reason"),
    [
        ("--fb --epochs 5", 100, "no mask update falls into the run of 500 steps"),
        ("--fb --dynamic_fre --epochs 60", 16, "no mask update falls into the run of 960 steps"),
    ],
)
def test_masks_that_would_never_move_are_refused(line, steps, reason):
    with pytest.raises(InputError, match=reason):
        refuse_idle_masks(parse(line), steps)


def test_masks_that_move_are_not_refused():
    for line in ("", "--fix", "--fb", "--fbp --dynamic_fre"):
        refuse_idle_masks(parse(line), 352)


def test_what_stays_idle_unasked_is_said():
    """With --dynamic_fre and its default, a short run has no mask update in its second half."""
    line = (
        "--fbp --density 0.2 --dynamic_fre --epochs 12 --dynamic_epoch 0.5 --decreasing_lr 0.5,0.75"
        " --update_frequency 20"
    )
    refuse_idle_masks(parse(line), 40)
    (caution,) = cautions(parse(line), 40)
    assert "the last mask update is at step 240 and Flying Bird+ adapts after step 240" in caution
    assert not cautions(parse(f"{line} --second_frequency 20"), 40)
    # the last update is at step 300 of 320, past epoch 16
    assert not cautions(
        parse("--epochs 20 --decreasing_lr 10 --update_frequency 100 --fbp --dynamic_epoch 16"), 16
    )
    assert not cautions(parse("--fbp --dynamic_fre"), 352)
    assert (
        "density stays"
        in cautions(
            parse("--fbp --epochs 2 --decreasing_lr 1 --dynamic_epoch 1 --update_frequency 2"), 4
        )[0]
    )
    assert "is never lowered" in cautions(parse("--epochs 20"), 352)[0]
    fb = "--fb --epochs 3 --decreasing_lr 0.5 --dynamic_fre --update_frequency 4"
    assert "at step 12 of 24, so the masks stay in the second half" in cautions(parse(fb), 8)[0]
    assert not cautions(parse(f"{fb} --second_frequency 4"), 8)


def test_a_stored_run_fills_in_and_cannot_be_contradicted():
    stored = {
        "arch": "vgg16",
        "width": 0.5,
        "seed": 4,
        "dataset": "cifar10",
        "lr": 0.2,
        "fb": False,
        "train_randinit": True,
    }
    settings = parse("--eval --pretrained x --data d --test_step 50", stored)
    assert (settings.arch, settings.width, settings.seed, settings.test_step) == (
        "vgg16",
        0.5,
        4,
        50,
    )
    assert parse("--eval --pretrained x --arch vgg16_bn --lr 0.2", stored).arch == "vgg16"
    for line, reason in (
        (
            "--eval --pretrained x --arch resnet18",
            "--arch resnet18 contradicts the checkpoint, which has vgg16",
        ),
        ("--eval --pretrained x --lr 0.1", "contradicts"),
        ("--resume_dir x --lr 0.1", "contradicts"),
        ("--resume_dir x --fb", "^--fb contradicts the checkpoint, which was trained without it$"),
        (
            "--resume_dir x --no-train_randinit",
            "^--no-train_randinit contradicts the checkpoint, which was trained with it$",
        ),
    ):
        with pytest.raises(InputError, match=reason):
            parse(line, stored)


# ---------------------------------------------------------------- run names


def test_the_run_name_is_stable():
    """If it changes, --resume no longer finds the folders of existing runs."""
    assert AdversarialSettings().run_name() == "dense_resnet18_digits_e200_s1_44136fa3"
    settings = parse("--dataset cifar10 --density 0.1 --fbp --dynamic_fre --seed 3")
    assert settings.run_name() == "fbp_resnet18_cifar10_d0.1_e200_s3_d2634cf8"


def test_the_name_covers_what_changes_the_result_and_nothing_else():
    base = parse("--fb").run_name()
    for line in (
        "--save_dir x",
        "--device cpu",
        "--print_freq 3",
        "--resume",
        "--density 0.2",
        "--lr 0.1",
    ):
        assert parse(f"--fb {line}").run_name() == base
    for line in (
        "--lr 0.2",
        "--density 0.3",
        "--seed 2",
        "--train_subset 100",
        "--attack_mode eval",
        "--no-train_randinit",
        "--fix",
    ):
        assert parse(f"--fb {line}").run_name() != base
    assert parse("--fb --fix").run_name() == parse("--fix").run_name()
    assert parse("--fb").run_name("abc") not in (base, parse("--fb").run_name("abd"))


def test_what_auto_means_is_what_counts():
    """One process synchronizes no batch norm, yet may resume a run that several began."""
    cpu = torch.device("cpu")
    usual = best_precision(cpu)
    names = [
        [s.run_name() for s in parse(line).on_machine(cpu, 1)]
        for line in ("--fb", f"--fb --precision {usual}")
    ]
    assert names[0][0] == names[1][0]
    assert (len(names[0]), len(names[1])) == (2, 1)
    fixed = parse(f"--sync_bn --precision {usual}")
    assert [s.sync_bn for s in fixed.on_machine(cpu, 1)] == [False, True]
    assert [s.sync_bn for s in fixed.on_machine(cpu, 2)] == [True]
    assert placed(fixed.with_values(resume_dir="there"), load_data("digits"), cpu)[0].sync_bn, (
        "one process resumes what several began"
    )
    assert fixed.on_machine(cpu, 1)[0].run_name() == parse(f"--precision {usual}").run_name()


def test_how_a_run_was_told_to_go_is_not_taken_over():
    stored = {
        "resume": True,
        "device": "cpu",
        "gpu": 1,
        "save_dir": "s",
        "data": "d",
        "dataset": "cifar10",
        "epochs": 100,
    }
    settings = parse("--resume_dir x", stored)
    assert (settings.resume, settings.device, settings.gpu, settings.save_dir, settings.data) == (
        False,
        "auto",
        None,
        "runs",
        "d",
    )
    assert parse("--eval --pretrained x --gpu 0", stored).gpu == 0


def test_other_spellings_of_the_same_are_no_contradiction():
    stored = {"epochs": 100, "decreasing_lr": "0.5,0.75"}
    assert parse("--resume_dir x --decreasing_lr 50,75", stored).milestones == (50, 75)


def test_a_run_that_grows_may_repeat_its_fractions_and_cannot_shrink():
    stored = {"epochs": 6, "decreasing_lr": "0.5", "fbp": True, "dynamic_epoch": "0.5"}
    grown = parse("--resume_dir x --epochs 9 --decreasing_lr 0.50 --dynamic_epoch .5", stored)
    assert (grown.milestones, grown.first_adaptive_epoch) == ((4,), 4)
    for line, reason in (
        (
            "--epochs 5 --decreasing_lr 0.5",
            "^--epochs 5 contradicts the checkpoint, which has 6; a run can only grow$",
        ),
        (
            "--epochs 7 --decreasing_lr 0.6",
            r"^--decreasing_lr 0\.6 contradicts the checkpoint, which has 0\.5$",
        ),
    ):
        with pytest.raises(InputError, match=reason):
            parse(f"--resume_dir x {line}", stored)


def test_settings_from_a_checkpoint_are_checked_too():
    assert settings_from(AdversarialSettings, {"lr": 0.3, "unknown": 1}).lr == 0.3
    with pytest.raises(InputError, match="unknown architecture"):
        settings_from(AdversarialSettings, {"arch": "resnet19"})
    with pytest.raises(InputError, match="unknown --train_loss mart; known: ce, trades"):
        settings_from(AdversarialSettings, {"train_loss": "mart"})


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("line", "gpus", "expected"),
    [
        ("", 0, "cpu"),
        ("", 2, "cuda:0"),
        ("--gpu 1", 2, "cuda:1"),
        ("--device cpu", 2, "cpu"),
        ("--device cuda", 1, "cuda:0"),
    ],
)
def test_devices(line, gpus, expected, monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert str(pick_device(parse(line))) == expected
    assert [str(device) for device in chosen] == [expected] * (expected != "cpu")


@pytest.mark.parametrize(
    ("line", "gpus"), [("--device cuda", 0), ("--gpu 0", 0), ("--gpu 2", 2), ("--gpu -1", 2)]
)
def test_missing_devices_are_refused(line, gpus, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(InputError, match="GPU"):
        pick_device(parse(line))


def test_deterministic_kernels_are_for_gpus(monkeypatch):
    asked = []
    monkeypatch.setattr("torch.use_deterministic_algorithms", asked.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match="no effect on a CPU"):
        pick_device(parse("--deterministic"))
    assert asked == []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    pick_device(parse("--deterministic"))
    assert asked == [True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
