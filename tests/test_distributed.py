"""Training in several processes: the arithmetic of one, shared decisions, and an orderly end of all
when one ends."""

import atexit
import contextlib
import copy
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sparse_core
from data import Augmentation, Batch, TrainLoader
from models.channels import channel_counts, find_channels, narrow
from sparse_core import Masking, MaskingConfig, mask_hash
from tests import toy
from tests.processes import become, free_port, in_processes, spawn
from tests.test_resume import FBP, LONGER, assert_equal
from tests.toy import only_run
from utils.attacks import PGD
from utils.errors import InputError, RunError, Stopped
from utils.evaluation.command import evaluate_checkpoint, stored_settings
from utils.evaluation.scores import evaluate
from utils.execution.distributed import ALONE, World, joined, synchronize_batch_norm
from utils.execution.forward import Execution, Forward
from utils.settings.adversarial import AdversarialSettings
from utils.settings.command_line import parse_settings
from utils.storage.checkpoint import load_checkpoint, save_checkpoint
from utils.storage.run_folder import read_epochs
from utils.training.averages import ExponentialAverage
from utils.training.channel_masking import ChannelMasking
from utils.training.engine import train_epoch
from utils.training.losses import LOSSES, Options
from utils.training.schedule import Plan

ATTACK = PGD(8 / 255, 2 / 255, 3)
# seven batches of four; the left-over image joins the last, so two processes share 5 unevenly
IMAGES = 29

# ---------------------------------------------------------------- how a batch is divided


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("least", [1, 2])
def test_each_image_of_a_batch_counts_once(size, least):
    whole = list(TrainLoader(toy.split(IMAGES), 8, Augmentation(1), seed=1).epoch(3))
    parts = [
        list(
            TrainLoader(
                toy.split(IMAGES), 8, Augmentation(1), seed=1, world=World(r, size), least=least
            ).epoch(3)
        )
        for r in range(size)
    ]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert min(len(share.y) for share in shares) >= min(least, len(batch.y))
        assert {share.total for share in shares} == {len(batch.y)}
        assert sum(share.weight for share in shares) == pytest.approx(1)
        counting = [share for share in shares if share.weight]
        assert all(share.weight == len(share.y) / len(batch.y) for share in counting)
        assert torch.equal(torch.cat([share.indices for share in counting]), batch.indices)
        assert torch.equal(torch.cat([share.x for share in counting]), batch.x)
        assert (
            max(len(share.y) for share in counting) - min(len(share.y) for share in counting) <= 1
        )


def test_a_single_image_or_too_few_leave_processes_without():
    loader = TrainLoader(toy.split(11), 8, Augmentation(), seed=1, world=World(2, 4))
    # batches of 8 and 3 images for four processes
    assert [(len(b.y), b.weight) for b in loader.epoch(0)] == [(2, 0.25), (2, 0.0)]
    assert loader.smallest == 3


# ---------------------------------------------------------------- the arithmetic of one


def plain_network(batch_norm):
    torch.manual_seed(0)
    norm = [nn.BatchNorm2d(4)] if batch_norm else []
    layers = [
        nn.Conv2d(3, 4, 3, padding=1),
        *norm,
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 3),
    ]
    return nn.Sequential(*layers).double()


def trained(world, batch_norm=False, training=True, spoil=None, remedies=False, channels=False):
    """Train two epochs of seven steps in float64, with gradient growth at steps 4, 8 and 12;
    returns all that came of it."""
    model = store = plain_network(batch_norm)
    if channels:
        groups = find_channels(store, (3, 8, 8))
        live = groups.first(channel_counts(groups.sizes, 0.5, 1), 1)
        model = narrow(copy.deepcopy(store), groups.kept(live))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    config = MaskingConfig(0.4, 14, growth="gradient", update_frequency=4)
    if channels:
        masking = ChannelMasking(model, store, optimizer, groups, live, config, world=world)
    else:
        masking = Masking(model, optimizer, config, compare=False)
    loader = TrainLoader(toy.split(IMAGES), 4, Augmentation(1), seed=1, world=world)
    plan = Plan(2, ATTACK, attack_training=training, seed=1, lr=0.1, milestones=())
    average = None
    if remedies:
        attack = dataclasses.replace(ATTACK, loss="kl", start="gaussian")
        trades = {"loss": LOSSES["trades"], "options": Options(beta=6.0)}
        plan = dataclasses.replace(plan, attack=attack, awp=0.01, awp_start=1, **trades)
        average = ExponentialAverage(model, 0.5)
    forward = Forward(model, Execution(world=world))
    results = []
    for epoch in range(2):
        # a simulated defect: the masks of one process differ
        if spoil == world.rank and epoch == 1:
            masking.masks["0.weight"][:] = masking.masks["0.weight"].flip(0)
        doubled = (
            Batch(b.x.double(), b.y, b.indices, b.weight, b.step_images)
            for b in loader.epoch(epoch)
        )
        options = {
            "plan": plan,
            "epoch": epoch,
            "steps": len(loader),
            "masking": masking,
            "average": average,
            "forward": forward,
            "on_move": average.follow if average else lambda move: None,
        }
        result = train_epoch(model, optimizer, doubled, **options)
        results.append([result.loss, result.accuracy, result.images])
    moments = {
        f"momentum {i}": state["momentum_buffer"]
        for i, state in enumerate(optimizer.state.values())
    }
    state = {**model.state_dict(), **moments}
    if average is not None:
        state |= {f"average {n}": value for n, value in average.model.state_dict().items()}
    masks = {"channels": masking.live} if channels else masking.masks
    return {
        "state": state,
        "masks": masks,
        "results": results,
        "updates": len(masking.events),
        "hash": mask_hash(masks),
    }


@pytest.mark.parametrize(
    ("size", "remedies", "channels"),
    [(2, False, False), (3, False, False), (2, True, False), (2, True, True)],
)
def test_without_batch_norm_several_processes_are_one(tmp_path, size, remedies, channels):
    """In float64; the remedies are TRADES, weight perturbation and an average."""
    rest = (False, True, None, remedies, channels)
    one, several = trained(ALONE, *rest), in_processes(size, trained, tmp_path, *rest)
    assert one["updates"] == 3
    for other in several:
        assert other["hash"] == one["hash"]
        assert all(torch.equal(one["masks"][name], other["masks"][name]) for name in one["masks"])
        assert (
            max(
                float((one["state"][name] - other["state"][name]).abs().max())
                for name in one["state"]
            )
            < 1e-6
        )
        for mine, theirs in zip(one["results"], other["results"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)
    assert several[0]["results"] == several[1]["results"]


@pytest.mark.parametrize("training", [True, False])
def test_with_batch_norm_all_hold_the_network_of_the_first(tmp_path, training):
    """Statistics included, although each process sees other images; a single process would have
    different ones."""
    first, second = in_processes(2, trained, tmp_path, True, training)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert not torch.equal(
        first["state"]["1.running_mean"], trained(ALONE, True, training)["state"]["1.running_mean"]
    )


def threads_left(rank, port, folder, spoil):
    """Write down the communication threads of torch that are still alive at exit."""
    # registered first, so it runs after the handlers of torch's communication
    atexit.register(lambda: (folder / str(rank)).write_text(" ".join(exchanging())))
    become(rank, port)
    with contextlib.suppress(RunError, Stopped), joined() as world:
        trained(world, spoil=1 if spoil else None)
        assert exchanging()


def exchanging():
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name or "store" in name]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists threads as Linux does")
@pytest.mark.parametrize("spoil", [False, True], ids=["finished", "failed"])
def test_no_thread_outlives_python(tmp_path, spoil):
    """A thread that asks for the interpreter while it shuts down aborts the process, and a finished
    run would exit with SIGABRT."""
    spawn(threads_left, (free_port(), tmp_path, spoil))
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["", ""]


def order_of_ending(rank, port, folder):
    become(rank, port)
    with joined() as world:
        replica = world.replica(plain_network(False), torch.device("cpu"))
        replica.itself = replica
        there = weakref.ref(replica.reducer)
        ending = weakref.finalize(
            dist.group.WORLD, lambda: (folder / str(rank)).write_text(str(there()))
        )
        ending.atexit = False
        del replica


def test_the_group_outlives_what_computes_with_it(tmp_path):
    """If DDP's reducer dropped the group last, it would wait for a thread that waits for the
    interpreter: a deadlock seen in one of 20 runs."""
    spawn(order_of_ending, (free_port(), tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["None", "None"]


def failing(world):
    try:
        trained(world, spoil=1)
    except (RunError, Stopped) as error:
        return [type(error).__name__, str(error), getattr(error, "code", None)]
    return ["nothing", "", None]


def test_masks_that_differ_end_the_run(tmp_path):
    first, second = in_processes(2, failing, tmp_path)
    assert first == ["RunError", "after 8 steps the masks differ between the 2 processes", None]
    assert second == ["Stopped", "", 3]


def scores(world):
    import utils.evaluation.scores

    utils.evaluation.scores.EVAL_BATCH = 3
    found = []
    for images in (20, 2):  # seven batches, the last of two images; a single batch
        counts = []
        for attack in (None, ATTACK):
            model = toy.network()
            score = evaluate(
                model,
                toy.split(images),
                attack,
                forward=Forward(model, Execution(world=world)),
                on_batch=counts.append,
            )
            found.append([score.accuracy, score.loss, score.images])
        assert sum(counts) == 2 * images
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_evaluation_is_that_of_one_process_to_the_bit(tmp_path, monkeypatch, size):
    monkeypatch.setattr("utils.evaluation.scores.EVAL_BATCH", 3)
    assert in_processes(size, scores, tmp_path) == [scores(ALONE)] * size


# ---------------------------------------------------------------- decisions


def decided(world, folder):
    def outcome(work, **options):
        try:
            return str(world.agree(work, **options))
        except (InputError, RunError, Stopped) as error:
            return f"{type(error).__name__}: {error} {getattr(error, 'code', '')}".strip()

    def unless(ranks, error):
        def work():
            if world.rank in ranks:
                raise error
            return world.rank

        return work

    def after_the_first():
        (folder / str(world.rank)).touch()
        return sorted(path.name for path in folder.iterdir() if len(path.name) == 1)

    return {
        "fine": outcome(unless([], None)),
        "all": outcome(unless([0, 1, 2], InputError("wrong flag"))),
        "one": outcome(unless([1], RunError("broken"))),
        "disk": outcome(unless([2], OSError(28, "No space left on device"))),
        "in turn, first": outcome(unless([0], InputError("no such folder")), in_turn=True),
        "in turn, later": outcome(unless([2], InputError("no such folder")), in_turn=True),
        "turns": outcome(after_the_first, in_turn=True),
        "from first": world.from_first(lambda: f"said by {world.rank}"),
        "none from first": world.from_first(lambda: None),
        "highest": world.highest(10 - world.rank),
        "equal": world.require_equal(-5, "these"),
    }


def test_all_decide_alike(tmp_path):
    first, second, third = in_processes(3, decided, tmp_path, tmp_path)
    assert [rank["fine"] for rank in (first, second, third)] == ["0", "1", "2"]
    assert first["all"] == "InputError: wrong flag"
    assert first["one"] == "RunError: process 1 of 3: broken"
    assert first["disk"] == "RunError: process 2 of 3: [Errno 28] No space left on device"
    assert first["in turn, first"] == "InputError: no such folder"
    assert first["in turn, later"] == "InputError: process 2 of 3: no such folder"
    codes = {"all": 2, "one": 3, "disk": 3, "in turn, first": 2, "in turn, later": 2}
    for other in (second, third):
        assert {name: other[name] for name in codes} == {
            name: f"Stopped:  {code}" for name, code in codes.items()
        }
    assert first["turns"] == "['0']"
    assert all("'0'" in other["turns"] for other in (second, third))
    for rank in (first, second, third):
        assert (rank["from first"], rank["none from first"], rank["highest"], rank["equal"]) == (
            "said by 0",
            None,
            10,
            None,
        )


def test_alone_nothing_is_asked_of_anyone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some schedulers set it for their own use
    with joined() as world:
        assert world == ALONE
    model = toy.network()
    assert ALONE.replica(model, torch.device("cpu")) is model
    assert (ALONE.highest(3), ALONE.name, ALONE.from_first(lambda: 4)) == (3, "", 4)
    ALONE.require_equal(1, "these")
    with pytest.raises(InputError, match="as it was"):
        ALONE.agree(lambda: (_ for _ in ()).throw(InputError("as it was")))


def trained_static(world, save_dir):
    """Train with different initial masks in each process, as gradient scores may give on GPUs;
    returns the hashes of the masks before and after, and the weights."""
    import main_adv

    original = sparse_core.initial_masks
    sparse_core.initial_masks = lambda *a, seed, **given: original(
        *a, seed=seed + world.rank, **given
    )
    flags = [*toy.TOY_RUN, "--fix", "--density", "0.3", "--save_dir", save_dir]
    settings = parse_settings(AdversarialSettings, flags, "", lambda given: {})
    run = main_adv.AdversarialRun(settings, torch.device("cpu"), world)
    before = mask_hash(run.stage.masking.masks)
    run.train()
    return {
        "before": before,
        "masks": mask_hash(run.stage.masking.masks),
        "state": run.stage.model.state_dict(),
    }


def test_all_begin_where_the_first_does(tmp_path):
    first, second = in_processes(2, trained_static, tmp_path, str(tmp_path / "runs"))
    assert first["before"] != second["before"]
    assert first["masks"] == second["masks"] == first["before"]
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    stored = load_checkpoint(only_run(tmp_path / "runs").checkpoint)
    assert all(
        torch.equal(value, stored["state_dict"][name]) for name, value in second["state"].items()
    )


def leaving(rank, port, folder):
    become(rank, port)
    try:
        with joined() as world:
            world.agree(lambda: None)
            time.sleep(0 if rank else 1.5)
            raise Stopped("", 75)
    except Stopped:
        (folder / str(rank)).write_text(str(time.time()))


def test_the_first_leaves_first(tmp_path):
    """torchrun kills the other processes once one has failed, and the first has files to write."""
    spawn(leaving, (free_port(), tmp_path))
    first, second = (float((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    assert second > first


# ---------------------------------------------------------------- synchronized batch norm


def test_a_synchronized_norm_is_torchs_and_stays_what_it_was():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    model.double().train()
    model(torch.rand(4, 4, 5, 5, dtype=torch.float64))
    model.eval()
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    before, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    synchronize_batch_norm(model)
    synchronize_batch_norm(model)
    assert all(
        isinstance(norm, nn.SyncBatchNorm) and isinstance(norm, nn.BatchNorm2d)
        for norm in (model[0], model[1][0])
    )
    assert type(model[0]).forward is nn.SyncBatchNorm.forward
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_it_is_refused_on_a_cpu(run_adv, tmp_path):
    outcome = run_adv(*toy.TOY_RUN, "--sync_bn", "--device", "cpu", "--save_dir", tmp_path)
    assert (outcome.code, outcome.err.strip()) == (
        2,
        "error: --sync_bn is for GPUs: torch has no synchronized batch norm on a CPU",
    )
    assert not list(tmp_path.iterdir())


def test_what_gpus_have_synchronized_goes_on_and_is_evaluated_on_a_cpu(
    run_adv, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("main_adv.pick_device", lambda settings, world: torch.device("cpu"))
        assert run_adv(*toy.TOY_RUN, "--sync_bn", "--save_dir", tmp_path).code == 0
    root = only_run(tmp_path).root
    resumed = run_adv("--resume_dir", root, "--epochs", "3")
    assert resumed.code == 0, resumed.err
    assert run_adv("--eval", "--pretrained", root / "model_RA_best.pth.tar").code == 0


def _evaluated(world, checkpoint, folder):
    flags = ["--eval", "--pretrained", checkpoint, "--eval_dir", f"{folder}/{world.rank}"]
    settings = parse_settings(AdversarialSettings, flags, "", stored_settings)
    evaluate_checkpoint(settings, torch.device("cpu"), world)
    return {}


def test_an_evaluation_goes_on_from_what_the_first_process_has(run_adv, finished, tmp_path):
    """A process that resumed from its own file would skip batches that the others wait for."""
    run = finished(*toy.TOY_RUN, to=tmp_path / "runs")
    checkpoint, folder = str(run / "model_RA_best.pth.tar"), tmp_path / "answers"
    assert run_adv("--eval", "--pretrained", checkpoint, "--eval_dir", folder / "0").code == 0
    (summary,), (answers,) = folder.glob("0/*.json"), folder.glob("0/*.pth.tar")
    expected = json.loads(summary.read_text())
    content = load_checkpoint(answers)
    # interrupted after the clean trial, in the first process alone
    for kept in content["outcomes"].values():
        for name in [name for name in kept if name != "clean"]:
            del kept[name]
    save_checkpoint(answers, content)
    summary.unlink()
    in_processes(2, _evaluated, tmp_path, checkpoint, str(folder))
    found = json.loads(summary.read_text())
    assert found["trials"] == expected["trials"]
    assert found["test_ra"] == expected["test_ra"]


# ---------------------------------------------------------------- runs


def torchrun(script, *flags, wait=True):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        *map(str, flags),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=180)
    return toy.Outcome(process.returncode, out, err)


def spoken(err):
    """The lines that the run itself wrote to stderr, without torchrun's report."""
    return [
        line
        for line in err.splitlines()
        if line.startswith(("error:", "interrupted", "terminated", "stopped"))
    ]


def root_cause(err):
    """Exit code of the process that ended first, which comes last in torchrun's report. torchrun
    itself always exits with 1."""
    return int(re.findall(r"exitcode +: (-?\d+)", err)[-1])


def test_cut_and_resumed_by_two_processes_and_by_one(run_adv, tmp_path):
    flags = [*LONGER, *FBP, "--growth", "gradient"]
    whole = torchrun("main_adv.py", *flags, "--save_dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert whole.out.count("in 2 processes") == whole.out.count("everything is in") == 1
    assert len(read_epochs(only_run(tmp_path / "whole"))) == 5
    cut = torchrun("main_adv.py", *flags, "--save_dir", tmp_path / "cut", "--time_limit", 0.3 / 60)
    assert (cut.code, spoken(cut.err)) == (1, ["stopped by --time_limit 0.005"])
    assert root_cause(cut.err) == 75
    paths = only_run(tmp_path / "cut")
    kept = paths.checkpoint.read_bytes()
    assert load_checkpoint(paths.checkpoint)["epoch"] < 5
    resumed = torchrun("main_adv.py", *flags, "--save_dir", tmp_path / "cut", "--resume")
    assert resumed.code == 0, resumed.err
    assert_equal(tmp_path / "whole", tmp_path / "cut")
    for path in (paths.checkpoint, paths.previous):
        path.write_bytes(kept)
    alone = run_adv("--resume_dir", paths.root)
    assert alone.code == 0, alone.err
    assert "note: the checkpoint was written by 2 process(es) and resumed by 1" in alone.out
    assert len(read_epochs(paths)) == 5


def test_robust_bird_in_two_processes(run_eb, tmp_path):
    flags = [
        *toy.TOY_BIRD,
        *toy.EASY_TICKET,
        "--pruning",
        "channel",
        "--density",
        "0.5",
        "--save_dir",
        tmp_path,
    ]
    outcome = torchrun("Robust-Bird/train_eb.py", *flags)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("the ticket emerged") == 1
    assert [row["stage"] for row in read_epochs(only_run(tmp_path))] == [1, 1, 2, 2]
    assert "is finished" in run_eb(*flags, "--resume").out


def test_a_broken_loss_is_said_once(tmp_path):
    outcome = torchrun("main_adv.py", *toy.TOY_RUN, "--save_dir", tmp_path, "--lr", "1e30")
    assert len(spoken(outcome.err)) == 1
    assert "in epoch 1, step" in spoken(outcome.err)[0]
    assert (outcome.code, root_cause(outcome.err)) == (1, 3)


def test_what_is_wrong_is_said_once(tmp_path):
    outcome = torchrun("main_adv.py", *toy.TOY_RUN, "--save_dir", tmp_path, "--batch_size", "3")
    assert spoken(outcome.err) == [
        "error: --batch_size 3 leaves 2 processes fewer than 2 image(s) each"
    ]
    assert (outcome.code, root_cause(outcome.err), list(tmp_path.iterdir())) == (1, 2, [])


LONG = [*toy.TOY_RUN, "--epochs", "300", "--decreasing_lr", "100"]


def children(process):
    """Process ids of torchrun's workers by rank."""
    found = {}
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with (
                open(f"/proc/{number}/stat") as stat,
                open(f"/proc/{number}/environ", "rb") as environ,
            ):
                if int(stat.read().rsplit(")", 1)[1].split()[1]) == process.pid:
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)", environ.read())
                    if rank:
                        found[int(rank[1])] = int(number)
        except OSError:  # the process has just ended
            continue
    return found


def is_at_work(number):
    try:
        with open(f"/proc/{number}/stat") as stat:
            # a zombie has ended
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_all_and_loses_nothing(run_adv, tmp_path, rank):
    process = torchrun("main_adv.py", *LONG, "--save_dir", tmp_path, wait=False)
    until(process, "epoch 2/")
    numbers = children(process)
    os.kill(numbers[rank], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    (said,) = spoken(err)
    assert said.startswith(
        f"error: process {1 - rank} of 2: another process of this run has ended; the last good"
        " checkpoint is "
    )
    assert ("(epoch " in said) == (rank == 1)
    assert not any(is_at_work(number) for number in numbers.values())
    root = only_run(tmp_path).root
    assert run_adv("--resume_dir", root, "--time_limit", 0.3 / 60).code == 75


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_without_torchrun_they_stop(run_adv, tmp_path):
    process = torchrun("main_adv.py", *LONG, "--save_dir", tmp_path, wait=False)
    until(process, "epoch 2/")
    numbers = children(process)
    process.kill()
    process.communicate(timeout=60)  # returns once the last worker has closed its output
    time.sleep(0.5)
    assert not any(is_at_work(number) for number in numbers.values())
    paths = only_run(tmp_path)
    assert "terminated, since torchrun has ended" in paths.log.read_text()
    assert load_checkpoint(paths.checkpoint)["epoch"] < 300
    assert run_adv("--resume_dir", paths.root, "--time_limit", 0.3 / 60).code == 75


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_one_that_is_asked_to_stop_stops_all_after_the_same_step(tmp_path):
    process = torchrun("main_adv.py", *LONG, "--save_dir", tmp_path, wait=False)
    until(process, "epoch 2/")
    os.kill(children(process)[1], signal.SIGTERM)
    time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    assert spoken(err) == []
    assert "another process was asked to stop" in err
    assert root_cause(err) == 143
    assert re.search(
        r"another process was asked to stop; the last good checkpoint is .* --resume continues from"
        r" there",
        out,
    )
