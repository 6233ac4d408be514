"""Scripts for a GPU that is available for minutes only, tried on a CPU at toy size."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import campaign
import pytest
import torch

from models import load_model
from tests import toy
from tests.toy import only_run
from utils.storage.checkpoint import load_checkpoint
from utils.storage.paths import RunPaths

ROOT = Path(__file__).parent.parent


def script(path, *flags, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", path, *map(str, flags)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_gpu_script_gets_through(tmp_path):
    result = script("benchmarks/gpu.sh", "--device", "cpu", OUT=str(tmp_path / "gpu"))
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.rindex("\ntests: no failure") :]
    assert "did not finish" not in table, (tmp_path / "gpu").glob("*.err")
    for row in ("the paper's loop", "0.25 of the channels", "an epoch of CIFAR-10 takes"):
        assert row in table
    assert table.count("\nepoch ") == 3
    (run,) = (tmp_path / "gpu" / "runs").iterdir()
    assert load_checkpoint(run / "checkpoint.pth.tar")["masking"]["events"]


def test_the_campaign_trains_in_order_and_packs(tmp_path):
    """MINUTES are enough for the first run, not for the others."""
    out = tmp_path / "out"
    variables = {"SMOKE": "1", "OUT": str(out)}
    result = script("scripts/campaign.sh", "digits", 1.4, "--device", "cpu", **variables)
    assert result.returncode == 0, result.stderr
    first = result.stderr.index("fbp_resnet18_digits")
    assert first < result.stderr.index("dense_resnet18_digits")
    assert "were forecast" in result.stderr
    (archive, *_) = sorted((out / "packed").glob("fbp*.tar.xz"))
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "there", filter="data")
    run = only_run(tmp_path / "there")
    assert json.loads(run.summary.read_text())["method"] == "fbp"
    assert run.metrics.read_text() == next(out.glob("fbp*/metrics.jsonl")).read_text()
    packed, whole = load_model(run.best_ra), load_model(next(out.glob("fbp*")) / run.best_ra.name)
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(packed(x), whole(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("forecasts", "started"),
    [([10, 10, 10], "abc"), ([10, 900, 10], "ac"), ([300, 300, 100], "a"), ([900, 10, 10], "bc")],
)
def test_only_what_ends_in_time_is_started(forecasts, started, monkeypatch, capsys):
    """One of 10 minutes is reserved for packing; each run takes half as long again as forecast."""
    now, begun = [0.0], []

    def run(tasks, jobs):
        ((_, command),) = tasks.items()
        assert float(command[-1]) == pytest.approx((600 - 60 - now[0]) / 60, abs=0.01)
        begun.append(command[0])
        now[0] += 1.5 * forecasts["abc".index(command[0])]
        return []

    monkeypatch.setattr(campaign.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(campaign.tables, "run_all", run)
    plan = [("new", f"runs/{name}", f) for name, f in zip("abc", forecasts, strict=True)]
    assert campaign.train(plan, [["a"], ["b"], ["c"]], 600.0) == 0
    assert "".join(begun) == started
    told = capsys.readouterr().err
    assert told.count("not started") == 3 - len(started)
    assert f"{started[0]} took" in told


def test_the_start_of_a_short_remainder_says_little_of_longer_runs(monkeypatch, capsys):
    now, begun = [0.0], []

    def run(tasks, jobs):
        ((name, _),) = tasks.items()
        begun.append(name)
        now[0] += {"a": 30, "b": 3600}[name] + 90
        return []

    monkeypatch.setattr(campaign.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(campaign.tables, "run_all", run)
    plan = [("begun", "runs/a", 30.0), ("new", "runs/b", 3600.0)]
    assert campaign.train(plan, [["a"], ["b"]], 4 * 3600.0) == 0
    assert begun == ["a", "b"]


def test_finished_runs_are_skipped_and_a_stopped_one_ends_all(monkeypatch, capsys):
    begun = []

    def stopped(tasks, jobs):
        begun.extend(tasks)
        raise SystemExit(130)

    monkeypatch.setattr(campaign.tables, "run_all", stopped)
    plan = [("finished", "runs/a", 0.0), ("begun", "runs/b", 1.0), ("new", "runs/c", 1.0)]
    assert campaign.train(plan, [["a"], ["b"], ["c"]], campaign.time.monotonic() + 600) == 130
    assert begun == ["b"]


def test_archives_are_cut_and_weights_left_out_where_files_would_be_too_many(
    finished, tmp_path, monkeypatch, capsys
):
    root = finished(*toy.TOY_RUN, to=tmp_path / "runs")
    whole = campaign.archive([RunPaths(root)], with_weights=True)
    monkeypatch.setattr(campaign, "_BYTES", len(whole) * 2 // 3)
    monkeypatch.setattr(campaign, "_FILES", 3)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / f"{root.name}.tar.xz").write_text("of an earlier call")
    campaign.pack([root, tmp_path / "nothing", *[root] * 5], tmp_path / "packed")
    names = [f"{root.name}.tar.xz.0", f"{root.name}.tar.xz.1", "others.tar.xz"]
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == sorted(names)
    told = capsys.readouterr().err
    assert "packed without weights" in told
    assert "cat NAME.tar.xz.* | tar xJ" in told
    with tarfile.open(tmp_path / "packed" / "others.tar.xz") as file:
        assert len(file.getnames()) == 5 * 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "takes a folder of data and the minutes"),
        (("digits",), "takes a folder of data and the minutes"),
        (("digits", "soon"), "MINUTES is a number, not 'soon'"),
        (("nowhere", 5), "'nowhere' has"),
        (("digits", 5, "--densty", 1), "--densty"),
    ],
)
def test_bad_input_is_one_line(arguments, reason, tmp_path):
    result = script("scripts/campaign.sh", *arguments, OUT=str(tmp_path / "out"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert reason in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nowhere", "and"), "one folder of images"),
        (("nowhere",), "one folder of images"),
        (("--device", "tpu"), "--device is cpu or cuda"),
        (("--device",), "--device is cpu or cuda"),
        ((), "no torch that sees a GPU"),
    ],
)
def test_what_the_gpu_script_refuses(arguments, reason, tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path / "out")}
    result = script("benchmarks/gpu.sh", *arguments, **hidden)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert reason in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["Robust-Bird/train_eb.py", "--device", "cuda"],
        ["main_adv.py", "--eval", "--pretrained", "{checkpoint}", "--device", "cuda"],
    ],
)
def test_commands_that_name_a_gpu_where_there_is_none(command, tmp_path, finished):
    checkpoint = finished(*toy.TOY_RUN, to=tmp_path / "run") / "model_RA_best.pth.tar"
    command = [word.format(checkpoint=checkpoint) for word in command]
    evaluates = "--eval" in command
    folder = [] if evaluates else ["--save_dir", str(tmp_path / "new")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *command, *folder],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "torch sees no GPU on this machine" in result.stderr
    assert not (tmp_path / "new").exists()
