import re
from pathlib import Path

import pytest
import torch
from tables import plan

from tests import toy
from utils.errors import InputError
from utils.settings.adversarial import AdversarialSettings
from utils.settings.applied import load_data_for
from utils.settings.command_line import parse_settings
from utils.settings.robust_bird import EarlyBirdSettings, TicketSettings
from utils.training.forecast import Forecast, duration, image_passes, seconds_left, seconds_per_pass

IMAGES = {"train": 100, "val": 30, "test": 50}


def settings(kind, text):
    return parse_settings(kind, text.split(), "", lambda given: {})


def test_passes_by_hand():
    adv = settings(
        AdversarialSettings,
        "--epochs 10 --decreasing_lr 5 --train_step 3 --test_step 4 --test_every 5",
    )
    epochs = 10 * 100 * (3 + 2 * 3) + (10 * 30 + 2 * 50) * (2 + 2 * 4)
    assert image_passes(adv, IMAGES, [0]) == epochs + 2 * 2 * 10 * (100 + 50)


def test_passes_of_two_stages_by_hand():
    bird = settings(
        EarlyBirdSettings,
        "--epochs1 7 --epochs2 10 --decreasing_lr 5 --train_step 3 --test_step 4 --density 0.5",
    )
    first = 7 * (100 * 3 + 30)
    second = 10 * 100 * 9 + 10 * (30 + 50) * 10
    assert image_passes(bird, IMAGES, [0, 0]) == first + second + 2 * 2 * 10 * 150


TWO_STAGES = "--epochs1 7 --epochs2 10 --decreasing_lr 5 --train_step 3 --test_step 4 --density 0.5"


@pytest.mark.parametrize(
    ("kind", "history", "done"),
    [
        (EarlyBirdSettings, [], [0, 0]),
        (EarlyBirdSettings, [{"stage": 1, "ticket": False}] * 3, [3, 0]),
        (EarlyBirdSettings, [{"stage": 1, "ticket": True}] * 3, [7, 0]),
        (TicketSettings, [{"stage": 1, "ticket": True}] * 3, [3, 0]),  # trains on regardless
        (EarlyBirdSettings, [{"stage": 1, "ticket": True}, {"stage": 2}, {"stage": 2}], [7, 2]),
        (AdversarialSettings, [{"epoch": 1}] * 4, [4]),
    ],
)
def test_what_lies_behind_a_run(kind, history, done):
    text = "--epochs 10 --decreasing_lr 5" if kind is AdversarialSettings else TWO_STAGES
    assert settings(kind, text).epochs_done(history) == done


def test_what_is_left_by_hand():
    """Half of stage 2's third epoch is done; training on an image takes nine passes and 9 ms."""
    bird, history = (
        settings(EarlyBirdSettings, TWO_STAGES),
        [{"stage": 1, "ticket": True}, {"stage": 2}, {"stage": 2}],
    )
    passes = 7.5 * 100 * 9 + 7.5 * (30 + 50) * 10 + 2 * 2 * 10 * 150
    assert seconds_left(bird, IMAGES, history, 0.5, 0.009) == pytest.approx(passes * 1e-3)


def test_a_forecast_leaves_out_the_slow_start_and_comes_once():
    forecast = Forecast()
    assert forecast.update(100, 8.0, is_over=False) is None  # the clock starts
    assert forecast.update(500, 12.0, is_over=False) is None  # too little time has passed
    assert forecast.update(700, 14.0, is_over=False) == pytest.approx(6 / 600)
    assert forecast.update(900, 16.0, is_over=True) is None


def test_a_forecast_of_short_epochs_is_that_of_the_second():
    forecast = Forecast()
    assert forecast.update(1000, 3.0, is_over=True) is None
    assert forecast.update(500, 0.5, is_over=False) is None
    assert forecast.update(1000, 1.0, is_over=True) == pytest.approx(1e-3)


def test_a_run_says_what_it_does_where_it_writes_and_how_long_that_takes(run_adv, tmp_path):
    lines = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path).out.splitlines()
    assert "resnet18 on digits" in lines[0]
    assert lines[1].startswith(f"writing to {tmp_path}")
    likely = [
        number
        for number, line in enumerate(lines)
        if line.endswith("at the pace of the first steps")
    ]
    assert len(likely) == 1
    assert lines[likely[0] - 1].startswith("epoch 1/")
    assert lines[likely[0]].startswith("about ")


def test_a_pass_is_measured():
    adv = settings(AdversarialSettings, "--width 0.0625 --train_subset 100")
    data = load_data_for(adv, torch.device("cpu"))
    assert data.images["train"] == 100
    assert 0 < seconds_per_pass(adv, data, torch.device("cpu")) < 0.1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "3 s"),
        (89.9, "90 s"),
        (100, "2 min"),
        (3600, "60 min"),
        (7200, "2.0 h"),
        (200_000, "2.3 days"),
    ],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_the_plan_knows_what_is_finished_begun_and_new(run_adv, capsys, tmp_path):
    common = [*toy.TOY_RUN, "--save_dir", str(tmp_path)]
    assert run_adv(*common, "--seed", 1).code == 0
    assert run_adv(*common, "--seed", 2, "--time_limit", 0.0001).code == 75
    runs = [["main_adv.py", *common, "--seed", seed, "--resume"] for seed in "123"]
    bird = [*toy.TOY_BIRD, "--density", "0.3", "--save_dir", str(tmp_path)]
    states = plan([*runs, ["Robust-Bird/train_eb.py", *bird]], jobs=2)
    assert [state for state, *_ in states] == ["finished", "begun", "new", "new"]
    assert Path(states[0][1]).is_dir()
    assert not Path(states[2][1]).exists()
    table = capsys.readouterr().err.splitlines()
    assert table[0].endswith("finished")
    assert "about" in table[2]
    assert table[-1].startswith("3 of 4 runs to train, about")


def test_a_plan_of_finished_runs_measures_nothing(run_adv, capsys, tmp_path):
    run = [*toy.TOY_RUN, "--save_dir", str(tmp_path)]
    assert run_adv(*run).code == 0
    plan([["main_adv.py", *run]], jobs=1)
    assert capsys.readouterr().err.splitlines()[-1] == "0 of 1 runs to train"


@pytest.mark.parametrize(
    ("flags", "message"), [("--densty 3", "unknown argument"), ("--density 7", "(0, 1]")]
)
def test_a_plan_refuses_what_a_run_would_refuse(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        plan([["main_adv.py", *flags.split()]], jobs=1)
