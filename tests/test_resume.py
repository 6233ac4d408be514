"""A run stopped at any moment and resumed equals the uninterrupted run to the bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from main_adv import AdversarialRun
from models.flops import real_training
from tests import toy
from tests.toy import only_run
from utils.errors import InputError, Stopped
from utils.execution.interruption import Interruption
from utils.settings.adversarial import AdversarialSettings
from utils.settings.command_line import parse_settings
from utils.storage.checkpoint import load_checkpoint, save_checkpoint
from utils.storage.paths import RunPaths
from utils.storage.run_folder import read_epochs, read_summary

LONGER = [*toy.TOY_RUN, "--epochs", "5", "--decreasing_lr", "3"]
FBP = ["--fbp", *toy.TOY_MASKS, "--dynamic_epoch", "1"]
METHODS = {
    "dense": LONGER,
    "fb": [*LONGER, "--fb", *toy.TOY_MASKS, "--growth", "gradient"],
    "fb by momentum in bf16": [
        *LONGER,
        "--fb",
        *toy.TOY_MASKS,
        "--growth",
        "momentum",
        "--attack_mode",
        "eval",
        "--precision",
        "bf16",
    ],
    "fbp": [*LONGER, *FBP],
    "static, seldom tested": [
        *LONGER,
        "--fix",
        "--density",
        "0.3",
        "--eval_every",
        "2",
        "--test_every",
        "3",
    ],
    "fb with remedies": [
        *LONGER,
        *"--fb --train_loss trades --awp .005 --awp_start 1 --ema .5".split(),
        *toy.TOY_MASKS,
    ],
    "n-fgsm with swa": [
        *LONGER,
        *"--fb --train_attack n-fgsm --swa 2 --lr_schedule cosine --nesterov".split(),
        *toy.TOY_MASKS,
    ],
    "fb by channels": [
        *LONGER,
        *"--fb --structure channel --channel_multiple 1 --update_frequency 2".split(),
        *"--growth gradient --awp .005 --ema .5".split(),
    ],
    "fbp by channels": [
        *LONGER,
        *"--fbp --structure channel --channel_multiple 1 --update_frequency 2".split(),
        *"--dynamic_epoch 1 --swa 2 --prune_ratio 1".split(),
    ],
    "rb": [*toy.TOY_BIRD, *toy.EASY_TICKET],
    "rb-channel": [*toy.TOY_BIRD, *toy.EASY_TICKET, "--pruning", "channel", "--density", "0.5"],
    "rb fast": [*toy.TOY_BIRD, *toy.EASY_TICKET, "--stage1", "fast"],
}


def state(save_dir):
    """A run's tensors by name; its metrics, summary and other masking state, without times."""
    paths = only_run(save_dir)
    content = load_checkpoint(paths.checkpoint)
    tensors = {f"weight {name}": value for name, value in content["state_dict"].items()}
    tensors |= {
        f"momentum {i}": s["momentum_buffer"] for i, s in content["optimizer"]["state"].items()
    }
    average = content.get("average", {"weights": {}})
    for kind in average.keys() - {"count", "last"}:
        tensors |= {f"average {kind} {name}": value for name, value in average[kind].items()}
    masking = content["masking"] or {}
    kinds = ("masks", "explored", "store") if "masks" in masking else ("store",)
    tensors |= {
        f"{kind} {name}": value for kind in kinds for name, value in masking.get(kind, {}).items()
    }
    for path in (paths.best_ra, paths.best_sa):
        tensors |= {
            f"{path.name} {name}": value
            for name, value in load_checkpoint(path)["state_dict"].items()
        }
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in read_epochs(paths)]
    summary = {
        k: v
        for k, v in read_summary(paths).items()
        if k not in ("seconds", "settings", "stage1", "made_by")
    }
    plain = {k: v for k, v in masking.items() if k not in kinds}
    plain["averaged"] = average.get("count")
    return tensors, (rows, summary, plain, content["epoch"])


def assert_equal(one, other):
    (tensors, plain), (tensors2, plain2) = state(one), state(other)
    assert tensors.keys() == tensors2.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], tensors2[name])] == []
    assert repr(plain) == repr(plain2)  # as text, so that NaN (not measured) equals itself


@pytest.fixture
def whole(finished, tmp_path):
    """Copies the finished run of a method to ``whole``, and returns that folder."""

    def whole(method):
        script = "train_eb" if method.startswith("rb") else "main_adv"
        finished(*METHODS[method], to=tmp_path / "whole", script=script)
        return tmp_path / "whole"

    return whole


@pytest.fixture
def run(run_adv, run_eb):
    return lambda method, *flags: (run_eb if method.startswith("rb") else run_adv)(
        *METHODS[method], *flags
    )


def stop_at(monkeypatch, opportunity):
    """Ask for a stop at every opportunity (a step, a batch of a test) from this one on, counted
    from 1; None never asks. Returns the list that counts them."""
    chances = []

    def asked(self):
        chances.append(1)
        return Stopped("asked", 75) if opportunity and len(chances) >= opportunity else None

    monkeypatch.setattr(Interruption, "asked", asked)
    return chances


@pytest.mark.parametrize("method", METHODS)
def test_stopped_again_and_again(run, tmp_path, monkeypatch, method):
    """At every third opportunity, until the run is done; an interrupted test starts over."""
    chances = stop_at(monkeypatch, None)
    assert run(method, "--save_dir", tmp_path / "whole").code == 0
    codes = []
    while not codes or codes[-1] == 75:
        stop_at(monkeypatch, 3)
        outcome = run(method, "--save_dir", tmp_path / "cut", "--resume")
        codes.append(outcome.code)
        assert len(codes) < len(chances)
    assert outcome.code == 0, outcome.err
    assert len(codes) > 3
    assert_equal(tmp_path / "whole", tmp_path / "cut")


def test_the_best_model_is_of_its_epoch_and_not_of_a_later_step(run, tmp_path, monkeypatch):
    """Interrupted in the step after the best epoch and resumed, the stored best model stays."""
    stop_at(monkeypatch, 8)  # four steps and three batches of tests are epoch 1
    assert run("dense", "--save_dir", tmp_path).code == 75
    paths = only_run(tmp_path)
    assert load_checkpoint(paths.checkpoint)["partial"]["losses"].numel() == 1
    before = paths.best_ra.read_bytes()
    stop_at(monkeypatch, 1)
    assert run("dense", "--save_dir", tmp_path, "--resume").code == 75
    assert paths.best_ra.read_bytes() == before


def test_another_draw_is_another_run(run, whole, tmp_path, monkeypatch):
    """Negative control: with one draw changed in one epoch after a stop, the comparison fails."""
    whole("fb")
    stop_at(monkeypatch, 7)
    assert run("fb", "--save_dir", tmp_path / "cut").code == 75
    monkeypatch.undo()
    import utils.training.engine

    original = utils.training.engine.attack_draws

    def changed(attack, indices, shape, *key):
        draws = original(attack, indices, shape, *key)
        if key[-1] == 2:
            draws[0] = 1 - draws[0]
        return draws

    monkeypatch.setattr(utils.training.engine, "attack_draws", changed)
    assert run("fb", "--save_dir", tmp_path / "cut", "--resume").code == 0
    with pytest.raises(AssertionError):
        assert_equal(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("flags", [["--save_every", "3"], ["--save_minutes", "1e-9"]])
def test_saving_within_an_epoch_changes_nothing(run, tmp_path, monkeypatch, flags):
    from utils.training.run import Run

    saved, original = [], Run._save_checkpoint
    monkeypatch.setattr(
        Run,
        "_save_checkpoint",
        lambda self, tally: saved.append(tally and tally.step) or original(self, tally),
    )
    assert run("fbp", "--save_dir", tmp_path / "plain").code == 0
    assert saved == [None] * 5
    saved.clear()
    assert run("fbp", "--save_dir", tmp_path / "often", *flags).code == 0
    assert saved == ([3, None] if "--save_every" in flags else [1, 2, 3, 4, None]) * 5
    assert_equal(tmp_path / "plain", tmp_path / "often")


# ---------------------------------------------------------------- who asks for a stop


def start(*flags):
    command = [sys.executable, "main_adv.py", *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


LONG = [*toy.TOY_RUN, "--epochs", "300", "--decreasing_lr", "100"]


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGUSR1, 138, "terminated"),
    ],
)
def test_a_signal_saves_and_leaves(tmp_path, number, code, word):
    process = start(*LONG, "--save_dir", tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (code, word)
    assert re.search(
        rf"{word}; the last good checkpoint is .* \(epoch \d+(, and (step \d of 4|all steps) of the"
        r" next)?\); --resume",
        out,
    )
    assert load_checkpoint(only_run(tmp_path).checkpoint)["epoch"] >= 2
    assert not [name for name in os.listdir(only_run(tmp_path).root) if name.startswith(".")]


def test_a_second_ctrl_c_does_not_wait(run, tmp_path, monkeypatch):
    def twice(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # pragma: no cover - the second signal arrives before

    monkeypatch.setattr(Interruption, "asked", twice)
    # a shell's background jobs start with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outcome = run("dense", "--save_dir", tmp_path)
    assert outcome.code == 130
    assert "no checkpoint yet" in outcome.out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_time_limit_saves_and_says_that_there_is_more(run, whole, tmp_path):
    whole("fbp")
    codes = []
    while not codes or codes[-1] == 75:
        outcome = run("fbp", "--save_dir", tmp_path / "cut", "--resume", "--time_limit", 0.2 / 60)
        codes.append(outcome.code)
        assert len(codes) < 40
    assert codes[-1] == 0, outcome.err
    assert len(codes) > 3
    assert_equal(tmp_path / "whole", tmp_path / "cut")


def test_a_limit_that_is_over_at_once_still_gets_somewhere(run, tmp_path):
    """One step or one test at a time: an interrupted test starts over and then runs to its end."""
    codes = []
    while not codes or codes[-1] == 75:
        codes.append(
            run(
                "dense",
                "--epochs",
                2,
                "--decreasing_lr",
                1,
                "--save_dir",
                tmp_path,
                "--resume",
                "--time_limit",
                1e-9,
            ).code
        )
        assert len(codes) < 40
    assert codes[-1] == 0
    # the first test and the fifth step share a call; the second test and the summary take one each
    assert len(codes) == 4 + 4 + 2


def test_another_run_that_may_have_been_meant_is_named(run, tmp_path):
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "config.json").write_text('{"settings": [1]}')
    alone = run("fb", "--save_dir", tmp_path, "--resume")
    assert "nothing to resume there, starting from scratch\n" in alone.out
    (folder,) = tmp_path.glob("fb_*")
    assert (
        f"starting from scratch; {folder} has --density 0.3\n"
        in run("fb", "--density", 0.4, "--save_dir", tmp_path, "--resume").out
    )


def test_where_a_run_goes_on_is_said(run, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2)
    stopped = run("dense", "--save_dir", tmp_path)
    assert "asked; the last good checkpoint is" in stopped.out
    assert "(step 2 of 4 of epoch 1)" in stopped.out
    monkeypatch.undo()
    assert (
        "resuming after step 2 of 4 of epoch 1"
        in run("dense", "--save_dir", tmp_path, "--resume").out
    )


def test_a_broken_network_is_not_saved_within_an_epoch(run_adv, tmp_path):
    """After one step the loss is still finite, but the weights are not."""
    outcome = run_adv(
        *toy.TOY_RUN,
        "--lr",
        "1e30",
        "--weight_decay",
        "1e12",
        "--save_every",
        1,
        "--save_dir",
        tmp_path,
    )
    assert outcome.code == 3
    assert "no longer finite after epoch 1, step 1 of 4" in outcome.err
    assert not only_run(tmp_path).checkpoint.exists()


# ---------------------------------------------------------------- damaged files


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "gone":
        path.unlink()
        return
    else:  # flip a bit of a weight
        weights = (
            load_checkpoint(path)["state_dict"]["layer4.1.bn2.running_var"].numpy().tobytes()[:64]
        )
        place = bytes(content).find(weights)
        assert place > 0
        content[place + 5] ^= 1
    path.unlink()  # the file may have another hard link
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "gone"])
@pytest.mark.parametrize("by", ["--resume", "--resume_dir"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    run, run_adv, whole, tmp_path, monkeypatch, how, by
):
    whole("dense")
    stop_at(monkeypatch, 18)  # in the third epoch, with two complete checkpoints
    assert run("dense", "--save_dir", tmp_path / "cut").code == 75
    monkeypatch.undo()
    paths = only_run(tmp_path / "cut")
    damage(paths.checkpoint, how)
    outcome = (
        run("dense", "--save_dir", tmp_path / "cut", "--resume")
        if by == "--resume"
        else run_adv("--resume_dir", paths.root)
    )
    assert outcome.code == 0, outcome.err
    assert "warning: " in outcome.out
    assert "resuming from the previous checkpoint checkpoint_previous.pth.tar" in outcome.out
    assert_equal(tmp_path / "whole", tmp_path / "cut")


def test_what_a_run_fell_back_to_stays_until_there_is_something_better(
    run, whole, tmp_path, monkeypatch
):
    """The damaged checkpoint never replaces the good one, and messages name the good one."""
    whole("dense")
    stop_at(monkeypatch, 18)
    assert run("dense", "--save_dir", tmp_path / "cut").code == 75
    monkeypatch.undo()
    paths = only_run(tmp_path / "cut")
    damage(paths.checkpoint, "cut")
    replace = os.replace

    # as if killed when the new file is written but not yet renamed
    def refused(source, target):
        if Path(target) == paths.checkpoint:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        outcome = run("dense", "--save_dir", tmp_path / "cut", "--resume")
    assert outcome.code == 3
    assert re.search(
        r"the last good checkpoint is \S*checkpoint_previous\.pth\.tar \(epoch 2", outcome.err
    ), outcome.err
    assert run("dense", "--save_dir", tmp_path / "cut", "--resume").code == 0
    assert_equal(tmp_path / "whole", tmp_path / "cut")
    assert load_checkpoint(paths.previous)["epoch"] == 4  # the two files alternate again


def test_a_run_that_another_process_has_taken_further_is_left_alone(run, tmp_path, monkeypatch):
    """It read the checkpoint before the other finished; training would overwrite that work."""
    stop_at(monkeypatch, 6)
    assert run("dense", "--save_dir", tmp_path).code == 75
    monkeypatch.undo()
    flags = [str(flag) for flag in (*METHODS["dense"], "--save_dir", tmp_path, "--resume")]
    settings = parse_settings(AdversarialSettings, flags, "", lambda given: {})
    slow = AdversarialRun(settings, torch.device("cpu"))
    assert run("dense", "--save_dir", tmp_path, "--resume").code == 0
    paths = only_run(tmp_path)
    before = paths.stamps(), paths.config.read_bytes()
    with pytest.raises(
        InputError,
        match=r"another process has trained in .* in the meantime; --resume continues from there",
    ):
        slow.train()
    assert (paths.stamps(), paths.config.read_bytes()) == before


@pytest.mark.parametrize("by", ["--resume", "--resume_dir"])
def test_with_both_damaged_nothing_starts_anew(run, run_adv, tmp_path, monkeypatch, by):
    stop_at(monkeypatch, 18)
    assert run("dense", "--save_dir", tmp_path).code == 75
    monkeypatch.undo()
    paths = only_run(tmp_path)
    damage(paths.checkpoint, "flipped")
    damage(paths.previous, "cut")
    outcome = (
        run("dense", "--save_dir", tmp_path, "--resume")
        if by == "--resume"
        else run_adv("--resume_dir", paths.root)
    )
    assert (outcome.code, "cannot be resumed; another --save_dir starts" in outcome.err) == (
        2,
        True,
    )
    assert len(read_epochs(paths)) == 2
    paths.checkpoint.unlink()
    paths.previous.unlink()
    outcome = run("dense", "--save_dir", tmp_path, "--resume")
    assert (outcome.code, "has epochs but no checkpoint" in outcome.err) == (2, True)


def test_what_a_killed_process_left_half_written_is_swept_up(run, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    assert run("dense", "--save_dir", tmp_path).code == 75
    monkeypatch.undo()
    rest = only_run(tmp_path).root / ".checkpoint.pth.tar-abc123"
    rest.write_bytes(b"half")
    assert run("dense", "--save_dir", tmp_path, "--resume").code == 0
    assert not rest.exists()


def test_a_disk_that_is_full_for_a_while_costs_an_epoch(run, whole, tmp_path, monkeypatch):
    import utils.storage.run_folder

    whole("fbp")
    original = utils.storage.run_folder.save_checkpoint

    def full(path, content, keep=None):
        if content["epoch"] == 3:
            raise OSError(28, "No space left on device")
        original(path, content, keep)

    with monkeypatch.context() as patch:
        patch.setattr(utils.storage.run_folder, "save_checkpoint", full)
        outcome = run("fbp", "--save_dir", tmp_path / "cut")
    assert outcome.code == 3
    assert re.search(
        r"error: cannot write .*checkpoint.pth.tar \(No space left.*the last good checkpoint is .*"
        r" \(epoch 2\)",
        outcome.err,
    )
    assert len(read_epochs(only_run(tmp_path / "cut"))) == 2
    assert run("fbp", "--save_dir", tmp_path / "cut", "--resume").code == 0
    assert_equal(tmp_path / "whole", tmp_path / "cut")


def test_a_second_process_is_told_of_the_first_before_that_has_a_checkpoint(
    run_adv, finished, tmp_path
):
    """For a moment, a run has metrics and no checkpoint yet."""
    finished(*toy.TOY_RUN, to=tmp_path)
    paths = only_run(tmp_path)
    for path in (paths.checkpoint, paths.previous, paths.summary):
        path.unlink()
    with FileLock(paths.lock):
        for flags in (["--resume"], []):
            outcome = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path, *flags)
            assert (outcome.code, outcome.err) == (
                2,
                f"error: another process is training in {paths.root}\n",
            )
    assert (
        "has epochs but no checkpoint"
        in run_adv(*toy.TOY_RUN, "--save_dir", tmp_path, "--resume").err
    )


# ---------------------------------------------------------------- more epochs


@pytest.mark.parametrize("by", ["fb", "rb"])
def test_a_finished_run_may_grow(run_adv, run_eb, tmp_path, by):
    """If milestones and schedules do not depend on the length, it equals the longer run."""
    run, name = (run_eb, "--epochs2") if by == "rb" else (run_adv, "--epochs")
    flags = (
        [*toy.TOY_BIRD, *toy.EASY_TICKET]
        if by == "rb"
        else [*toy.TOY_RUN, "--fb", *toy.TOY_MASKS, "--decay-schedule", "constant"]
    )
    assert run(*flags, name, 4, "--save_dir", tmp_path / "whole").code == 0
    assert run(*flags, name, 2, "--save_dir", tmp_path / "grown").code == 0
    root = only_run(tmp_path / "grown").root
    fewer = run("--resume_dir", root, name, 1)
    assert (fewer.code, f"{name} 1 contradicts the checkpoint" in fewer.err) == (2, True)
    outcome = run("--resume_dir", root, name, 4)
    assert outcome.code == 0, outcome.err
    (tensors, (rows, summary, plain, epoch)), (tensors2, (rows2, summary2, plain2, epoch2)) = (
        state(tmp_path / "whole"),
        state(tmp_path / "grown"),
    )
    assert all(torch.equal(tensors[name], tensors2[name]) for name in tensors)
    assert (rows, plain, epoch) == (rows2, plain2, epoch2)
    assert {k: v for k, v in summary.items() if k != "run"} == {
        k: v for k, v in summary2.items() if k != "run"
    }
    assert "is finished" in run("--resume_dir", root).out
    before = RunPaths(root).stamps(), RunPaths(root).config.read_bytes()
    # refused, since its figures would be those of 4 epochs
    shorter = run(*flags, name, 2, "--save_dir", tmp_path / "grown", "--resume")
    assert (shorter.code, f"has grown to {name} 4; --resume_dir resumes it" in shorter.err) == (
        2,
        True,
    )
    assert (RunPaths(root).stamps(), RunPaths(root).config.read_bytes()) == before


def test_what_begins_at_a_fraction_begins_later_in_a_longer_run(run_adv, tmp_path):
    """Epochs averaged before the new start do not count; passes done before it do."""
    flags = [*toy.TOY_RUN, "--save_dir", tmp_path, "--swa", "0.5", "--awp", "0.01"]
    assert run_adv(*flags, "--awp_start", "0.5").code == 0  # from epoch 2 of 2
    paths = only_run(tmp_path)
    one = load_checkpoint(paths.checkpoint)
    assert one["average"]["count"] == 1
    outcome = run_adv("--resume_dir", paths.root, "--epochs", 5)  # from epoch 3 of 5
    assert outcome.code == 0, outcome.err
    grown, rows = load_checkpoint(paths.checkpoint), read_epochs(paths)
    assert grown["average"]["count"] == 3
    assert ["further_passes" in row for row in rows] == [False, True, True, True, True]
    real = [row["inference_flops"] for row in rows]
    further = [row.get("further_passes", 0) for row in rows]
    flops = read_summary(paths)["flops"]["real"]["training"]
    assert flops == real_training(real, 100, 1, further)


def test_a_run_whose_best_network_is_lost_is_refused_at_once(run_adv, finished, tmp_path):
    finished(*toy.TOY_RUN, "--epochs", "3", to=tmp_path)
    paths = only_run(tmp_path)
    rows = [{**row, "val_ra": 50.0 - row["epoch"]} for row in read_epochs(paths)]
    content = load_checkpoint(paths.checkpoint)
    save_checkpoint(paths.checkpoint, {**content, "history": rows})
    paths.best_ra.unlink()
    outcome = run_adv("--resume_dir", paths.root, "--epochs", 4)
    assert outcome.code == 2
    assert f"no such checkpoint: {paths.best_ra}" in outcome.err
    assert paths.summary.exists()
    assert len(read_epochs(paths)) == 3


def test_a_folder_that_is_moved_while_it_trains_is_not_made_anew(run_adv, tmp_path, monkeypatch):
    def move(run, *_):
        run.paths.root.rename(tmp_path / "moved")

    monkeypatch.setattr(AdversarialRun, "refuse_broken_network", move)
    outcome = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path / "runs")
    assert outcome.code == 3
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_memory_that_a_cpu_lacks_is_one_line(run_adv, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("utils.training.stage.train_epoch", fail)
    outcome = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path)
    assert outcome.code == 3
    assert "out of memory on cpu; lower --batch_size" in outcome.err
    assert outcome.err.count("\n") == 1


# ---------------------------------------------------------------- kill -9


def killing_flags(kills):
    """A run that is long enough to be still at work at the last kill."""
    epochs = 12 if kills <= 10 else 100
    return [*toy.TOY_RUN, *FBP, "--epochs", epochs, "--decreasing_lr", "0.5"]


def killed_and_resumed(tmp_path, kills):
    """Start a run, kill it at random moments for five minutes at most, then let it end.

    Returns how many kills hit it at work, and how many were tried."""
    flags = [*killing_flags(kills), "--save_every", "1", "--resume", "--save_dir", tmp_path / "cut"]
    moments, deadline = random.Random(1), time.monotonic() + 300
    done = tried = 0
    for _ in range(kills):
        tried += 1
        process = start(*flags)
        # most kills hit training, tests and saves, the others the start
        if moments.random() < 0.9:
            for line in process.stdout:
                if line.startswith("writing to"):
                    break
            time.sleep(moments.uniform(0.0, 0.4))
        else:
            time.sleep(moments.uniform(0.0, 2.0))
        process.kill()
        process.communicate()
        done += process.returncode == -signal.SIGKILL
        if time.monotonic() > deadline:
            break
    process = start(*flags)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return done, tried


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.long)])
def test_killed_at_random_moments(run_adv, tmp_path, kills):
    assert run_adv(*killing_flags(kills), "--save_dir", tmp_path / "whole").code == 0
    done, tried = killed_and_resumed(tmp_path, kills)
    assert done >= 0.6 * tried >= 0.3 * kills  # a slow machine has no time for all kills
    assert_equal(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_what_schedulers_send_asks_to_stop(number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup, around the tests, ignores SIGHUP
    try:
        with Interruption() as interruption:
            signal.raise_signal(number)
            stopped = interruption.asked()
    finally:
        signal.signal(number, before)
    assert (str(stopped), stopped.code) == ("terminated", 128 + number)


def test_a_closing_terminal_does_not_stop_what_nohup_started():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.asked() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_others_hide_in_a_run_folder_stays_and_the_umask_counts(run_adv, finished, tmp_path):
    finished(*toy.TOY_RUN, to=tmp_path)
    paths = only_run(tmp_path)
    (paths.root / ".Trash-1000").mkdir()
    theirs, ours = paths.root / ".notes-of-mine", paths.root / ".config.json-abc"
    theirs.write_text("mine")
    ours.write_text("cut")
    before = os.umask(0o007)
    try:
        grown = run_adv("--resume_dir", paths.root, "--epochs", 3)
    finally:
        os.umask(before)
    assert grown.code == 0, grown.err
    assert (theirs.exists(), ours.exists(), (paths.root / ".Trash-1000").is_dir()) == (
        True,
        False,
        True,
    )
    assert oct(paths.config.stat().st_mode & 0o777) == oct(0o660)


ODD_JSON = [
    b"{}", b"[]", b"3", b"null", b'"text"', b"{", b"", b"\xff\xfe\x00", b"[" * 100_000,
    b'{"settings": ' * 100_000,
    b'{"settings": {"seed": "one"}}', b'{"settings": {"arch": []}}',
    b'{"settings": {"epochs": null}}',
    b'{"settings": {"norm": "l7"}}',
    b'{"settings": {"density": 1' + b"0" * 400 + b"}}",
    b'{"settings": {"decreasing_lr": 3}}', b'{"settings": {"lr": NaN}}',
]  # fmt: skip


def test_odd_neighbours_are_skipped(run, tmp_path):
    """Whatever their ``config.json`` holds, the one run that resembles this one is still found."""
    assert run("fb", "--save_dir", tmp_path).code == 0
    (like_it,) = tmp_path.iterdir()
    for number, content in enumerate(ODD_JSON):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "config.json").write_bytes(content)
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.json")
    outcome = run("fb", "--density", 0.4, "--save_dir", tmp_path, "--resume")
    assert outcome.code == 0, outcome.err
    assert f"starting from scratch; {like_it} has --density 0.3\n" in outcome.out


def test_a_finished_run_with_an_odd_summary_is_one_line(
    run, run_adv, monkeypatch, capsys, tmp_path
):
    assert run("dense", "--save_dir", tmp_path).code == 0
    paths = only_run(tmp_path)
    whole = paths.summary.read_bytes()
    report = toy.Command("report", monkeypatch, capsys)
    lacking = json.loads(whole)
    del lacking["best"]["test_ra"]
    odd = {**json.loads(whole), "flops": {"real": [], "paper": 3}}
    for content in [*ODD_JSON, json.dumps(lacking).encode(), json.dumps(odd).encode()]:
        paths.summary.write_bytes(content)
        for outcome in (
            run("dense", "--save_dir", tmp_path, "--resume"),
            run_adv("--resume_dir", paths.root),
            report(paths.root),
        ):
            assert (outcome.code, outcome.err.count("\n"), "summary.json" in outcome.err) == (
                2,
                1,
                True,
            ), outcome.err
    assert "flops.real is a list; without that file, --resume writes it anew" in outcome.err
    paths.summary.unlink()
    assert run("dense", "--save_dir", tmp_path, "--resume").code == 0
    rewritten = json.loads(paths.summary.read_text())
    told = {"seconds": 0, "settings": rewritten["settings"], "made_by": []}
    assert {**rewritten, **told} == {**json.loads(whole), **told}
