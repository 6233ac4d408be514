import pytest

from utils.errors import InputError
from utils.settings.command_line import parse_settings
from utils.settings.robust_bird import EarlyBirdSettings, TicketSettings


def parse(line, kind=EarlyBirdSettings, stored=None):
    return parse_settings(kind, line.split(), "test", lambda given: stored or {})


def test_the_seed_command_and_the_papers_defaults():
    line = (
        "--stage1 sgd --epochs1 200 --stage2 pgd --epochs2 200 --arch resnet18 --data data/cifar10"
        " --pruning unstructured --density 0.2"
    )
    settings = parse(line + " --save_dir experiment/rb")
    assert settings == parse("--data data/cifar10 --save_dir experiment/rb")
    assert (settings.dataset, settings.print_freq, settings.batch_size, settings.lr) == (
        "cifar10",
        100,
        128,
        0.1,
    )
    one, two = settings.plan1, settings.plan2
    assert (one.attack, one.epochs, one.milestones) == (None, 200, (50, 150))
    assert (two.attack.eps, two.attack.steps, two.attack.step_size, two.attack_training) == (
        8 / 255,
        10,
        2 / 255,
        True,
    )
    assert (two.epochs, two.milestones, two.seed) == (200, (50, 150), 1)


def test_every_flag_of_the_specification_is_known():
    flags = (
        "--stage1 pgd --epochs1 10 --stage2 pgd --epochs2 10 --arch resnet18 --pruning channel"
        " --density .2 --data x --dataset cifar100 --save_dir s --print_freq 100 --batch_size 128"
        " --lr .1 --decreasing_lr 5,8 --momentum .9 --weight_decay 5e-4 --norm linf --train_eps 8"
        " --train_step 10 --train_gamma 2 --train_randinit --test_eps 8 --test_step 20 --test_gamma"
        " 2 --test_randinit --eb_window 5 --eb_tolerance .1"
    )
    assert parse(flags).method == "rb-channel"
    assert parse(flags.split(" --eb_window")[0], TicketSettings).method == "oneshot-channel"


@pytest.mark.parametrize(
    ("path", "dataset"),
    [
        ("data/cifar10", "cifar10"),
        ("/x/CIFAR-10/", "cifar10"),
        ("data/cifar100", "cifar100"),
        ("cifar-100-python", "cifar100"),
        ("tiny-imagenet-200", "tinyimagenet"),
        ("data/svhn", "svhn"),
        ("/home/destiny/svhn", "svhn"),
    ],
)
def test_the_data_set_is_guessed_from_the_path(path, dataset):
    assert parse(f"--data {path}").dataset == dataset
    assert parse(f"--data {path} --dataset imagefolder").dataset == "imagefolder"
    assert (
        parse(f"--resume_dir r --data {path}", stored={"dataset": "imagefolder"}).dataset
        == "imagefolder"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--data images", "names no data set"),
        ("--stage1 adam", "invalid choice"),
        ("--pruning layer", "invalid choice"),
        ("--density 0", r"\(0, 1\]"),
        ("--eb_window 0", "at least 1"),
        ("--eb_tolerance 1.5", r"\[0, 1\]"),
        ("--eb_tolerance nan", "finite"),
        ("--pruning channel --channel_floor 0.3", r"must lie in \[0, --density 0.2\]"),
        ("--epochs1 0", "at least 1"),
        ("--epochs1 3 --eb_window 4", "no ticket could emerge"),
        ("--stage1_pretrained x --epochs1 3", "skips stage 1"),
        ("--stage1_pretrained x --stage1 pgd", "skips stage 1"),
        ("--stage1_pretrained x --eb_window 3", "skips stage 1"),
        ("--stage1 fast --norm l2", "--norm l2"),
        ("--stage2 fast --train_step 5", "sgd and fast, only with pgd"),
        ("--stage2 sgd --train_eps 4", "clean images"),
        ("--stage1 fast --stage2 fast --lr 0.3", "cycle of its own"),
        ("--stage1_pretrained x --stage2 fast --decreasing_lr 5", "cycle of its own"),
        ("--epochs1 20 --epochs2 30 --decreasing_lr 10,30", "past the end of 30 epochs"),
        ("--stage1 fast --epochs1 4 --epochs2 1 --decreasing_lr 2", "past the end of 1 epochs"),
        ("--epochs1 2 --stage2 fast --epochs2 21 --decreasing_lr 20", "past the end of 2 epochs"),
        ("--epochs1 4 --eb_tolerance 0.1", "no ticket could emerge"),
        ("--decreasing_lr 20,10", "must not decrease"),
        ("--epochs1 9 --lr_schedule cosine --decreasing_lr 50", "past the end of 9 epochs"),
        ("--fb", "unknown argument"),
        ("--eval", "unknown argument"),
        ("--resume_dir x --density 0.3", "contradicts"),
    ],
)
def test_what_cannot_take_effect_is_refused(line, reason):
    with pytest.raises(InputError, match=reason):
        parse(line, stored={"density": 0.2} if "resume_dir" in line else None)


def test_the_base_script_has_no_early_stop_to_set():
    with pytest.raises(InputError, match="unknown argument --eb_window"):
        parse("--eb_window 3", TicketSettings)


def test_what_stays_idle_unasked_is_said():
    assert parse("").cautions() == []
    assert "is never lowered" in parse("--epochs2 20").cautions()[0]
    assert "no ticket can emerge" in parse("--epochs1 4").cautions()[0]
    assert "nothing is pruned" in parse("--density 1").cautions()[0]
    assert [line[:24] for line in parse("--norm l2").cautions()] == [
        "--norm l2 with --train_e",
        "--norm l2 with --test_ep",
    ]
    assert len(parse("--norm l2 --stage2 sgd").cautions()) == 1


def test_a_stage_is_said_with_its_ball():
    settings = parse("--stage1 fast --train_eps 4")
    assert settings.stage_text("pgd") == "PGD-10 training at linf 4/255"
    assert (settings.stage_text("fast"), settings.stage_text("sgd")) == (
        "fast at linf 4/255",
        "sgd",
    )


def test_tolerances_follow_the_kind_unless_given():
    assert (
        parse("").early_bird().tolerance,
        parse("--pruning channel").early_bird().tolerance,
    ) == (0.08, 0.1)
    watched = parse("--eb_tolerance 0.02 --eb_window 3 --density 0.4").early_bird()
    assert (watched.tolerance, watched.window, watched.density) == (0.02, 3, 0.4)


def test_the_floor_is_a_tenth_and_at_most_half_the_density():
    floors = {
        "--density 0.5": 0.1,
        "--density 0.1": 0.05,
        "--density 0.5 --channel_floor 0": 0.0,
        "--density 0.5 --channel_floor 0.4": 0.4,
    }
    assert {line: parse(f"--pruning channel {line}").floor for line in floors} == floors
    assert (
        parse("--pruning channel --channel_floor 0.1").run_name()
        == parse("--pruning channel").run_name()
    )


# ---------------------------------------------------------------- run names


def test_the_run_name_is_stable():
    """If it changes, --resume no longer finds the folders of existing runs."""
    assert parse("").run_name() == "rb_resnet18_digits_d0.2_e200-200_s1_44136fa3"
    settings = parse(
        "--data data/cifar10 --density 0.1 --pruning channel --stage1 pgd --epochs1 50 --seed 3"
    )
    assert settings.run_name() == "rb-channel_resnet18_cifar10_d0.1_e50-200_s3_fd258f8e"
    assert (
        parse("", TicketSettings).run_name() == "oneshot_resnet18_digits_d0.2_e200-200_s1_44136fa3"
    )


def test_the_name_covers_what_changes_the_result_and_nothing_else(tmp_path):
    base = parse("").run_name()
    for line in (
        "--save_dir x",
        "--print_freq 3",
        "--eb_tolerance 0.08",
        "--stage1_ra",
        "--decreasing_lr 0.25,0.75",
    ):
        assert parse(line).run_name() == base
    for line in (
        "--eb_tolerance 0.1",
        "--eb_window 4",
        "--stage1 fast",
        "--epochs1 100",
        "--pruning channel",
        "--density 0.3",
    ):
        assert parse(line).run_name() != base
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"one")
    (tmp_path / "c").write_bytes(b"two")
    names = [parse(f"--stage1_pretrained {tmp_path / name}").run_name() for name in "abc"]
    assert names[0] == names[1] != names[2]
    assert len({*names, base}) == 3


def test_the_attack_of_an_adversarial_first_stage_counts_in_the_name():
    one, two = (
        parse(f"--dataset digits --stage1 pgd --train_loss trades {mode}").run_name()
        for mode in ("", "--attack_mode eval")
    )
    assert one != two
    names = [
        parse(f"--dataset digits --stage1 pgd {m}").run_name() for m in ("", "--attack_mode train")
    ]
    assert names[0] == names[1]


def test_milestones_hold_for_the_first_stage_whatever_the_second_does():
    settings = parse("--epochs1 60 --decreasing_lr 20,40 --lr_schedule cosine")
    assert not settings.notes
    assert (settings.plan1.milestones, settings.plan2.schedule) == ((20, 40), "cosine")
    ignored = parse("--stage1 fast --decreasing_lr 20,40 --lr_schedule cosine")
    assert "--decreasing_lr has no effect" in ignored.notes[0]


@pytest.mark.parametrize(
    ("line", "idle"),
    [
        ("", "--channel_floor 0.1"),
        ("--pruning channel --density 1", "--channel_floor 0.5"),
        ("--eb_window 1", "--eb_tolerance 0.1"),
        ("--dataset digits", "--data x"),
    ],
)
def test_what_is_left_aside_is_said_and_does_not_change_the_run(line, idle):
    settings, plain = parse(f"{line} {idle}"), parse(line)
    assert settings.cautions()[0] == settings.notes[0]
    assert settings.notes[0].startswith(f"{idle.split()[0]} has no effect with ")
    assert settings == plain
