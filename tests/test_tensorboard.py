"""Events for TensorBoard, read back with its own reader, and the CSV of the same figures."""

import csv
import io
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import toy
from tests.toy import TOY_BIRD, TOY_MASKS, TOY_RUN, only_run
from utils.storage.paths import RunPaths
from utils.storage.run_folder import RunFolder, read_epochs
from utils.storage.tensorboard import flattened

ROW = {
    "epoch": 1,
    "test_ra": 40.0,
    "layer_densities": {"conv1.weight": 0.5, "linear.weight": 0.25},
    "updates": [
        {"step": 2, "prune": True, "grow": False},
        {"step": 4, "prune": True, "grow": True},
    ],
    "mask_distances": [0.3, 0.1],
    "ticket": False,
}


def events_of(run):
    """All events of a run as TensorBoard reads them, none sampled away or purged."""
    folder = RunPaths(run).tensorboard
    assert len(list(folder.iterdir())) == 1
    read = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0}, purge_orphaned_data=False
    )
    return read.Reload()


def scalars(run, tag):
    return [(event.step, event.value) for event in events_of(run).Scalars(tag)]


def test_a_line_without_nesting():
    assert flattened(ROW) == {
        "epoch": 1, "test_ra": 40.0, "density/conv1.weight": 0.5, "density/linear.weight": 0.25,
        "updates": 2, "updates/prune": 2, "updates/grow": 1, "mask_distance": 0.1, "ticket": 0,
    }  # fmt: skip
    assert flattened({"mask_distances": [], "updates": []}) == {
        "updates": 0,
        "updates/prune": 0,
        "updates/grow": 0,
    }


def test_every_figure_of_every_epoch_and_the_picture(run_adv, tmp_path):
    assert run_adv(*TOY_RUN, "--fb", *TOY_MASKS, "--save_dir", tmp_path, "--tensorboard").code == 0
    run = only_run(tmp_path).root
    rows, shown = read_epochs(RunPaths(run)), events_of(run).Tags()
    assert scalars(run, "accuracy/test_ra") == [
        (row["epoch"], pytest.approx(row["test_ra"])) for row in rows
    ]
    assert scalars(run, "loss/val_loss") == [
        (row["epoch"], pytest.approx(row["val_loss"])) for row in rows
    ]
    assert scalars(run, "updates/all") == [(1, 2.0), (2, 2.0)]
    for layer, density in rows[-1]["layer_densities"].items():
        assert scalars(run, f"density/{layer}")[-1] == (2, pytest.approx(density))
    assert len(shown["scalars"]) == len(flattened(rows[0]))
    assert shown["images"] == ["net_train"]
    assert events_of(run).Images("net_train")[-1].step == 2


def test_a_resumed_run_has_every_step_once(run_adv, tmp_path):
    """Begun without events, resumed with them, then extended: the flag need not be repeated."""
    common = ["--save_dir", tmp_path]
    assert run_adv(*TOY_RUN, *common).code == 0
    run = only_run(tmp_path).root
    assert not RunPaths(run).tensorboard.exists()
    for epochs, flags in ((3, ["--tensorboard"]), (4, [])):
        assert run_adv("--resume_dir", run, "--epochs", epochs, *flags).code == 0
        assert [step for step, _ in scalars(run, "accuracy/val_ra")] == list(range(1, epochs + 1))


def test_both_stages_of_robust_bird_share_one_axis(run_eb, tmp_path):
    assert run_eb(*TOY_BIRD, *toy.EASY_TICKET, "--save_dir", tmp_path, "--tensorboard").code == 0
    run = only_run(tmp_path).root
    assert scalars(run, "run/stage") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert set(events_of(run).Tags()["images"]) == {"net_train", "mask_distances"}


def test_without_the_library_it_is_one_line_and_nothing_is_written(run_adv, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    outcome = run_adv(*TOY_RUN, "--save_dir", tmp_path / "out", "--tensorboard")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "pip install tensorboard" in outcome.err
    assert not (tmp_path / "out").exists()
    assert run_adv(*TOY_RUN, "--save_dir", tmp_path / "out").code == 0


def test_a_failing_disk_is_a_failed_run(tmp_path, monkeypatch):
    from utils.errors import RunError
    from utils.storage import tensorboard

    def full(*arguments):
        raise OSError(28, "No space left on device")

    folder = RunFolder.create(RunPaths(tmp_path / "run"), {}, tensorboard=True)
    folder.rewrite_epochs([])
    monkeypatch.setattr(tensorboard.Events, "append", full)
    with pytest.raises(RunError, match="No space left"), folder.settled():
        folder.append_epoch(ROW)


def test_a_full_disk_in_the_library_s_own_thread_is_only_our_line(tmp_path):
    """The library's traceback is suppressed; those of other threads are still printed."""
    script = """
import errno, sys, threading
from pathlib import Path
from tensorboard.summary.writer import record_writer
from utils.errors import run_command
from utils.storage.run_folder import RunFolder
from utils.storage.paths import RunPaths
def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")
def command():
    folder = RunFolder.create(RunPaths(Path(sys.argv[1])), {}, tensorboard=True)
    folder.rewrite_epochs([])
    record_writer.RecordWriter.write = record_writer.RecordWriter.flush = full
    with folder.settled():
        folder.append_epoch({"epoch": 1, "test_ra": 1.0})
        folder.append_epoch({"epoch": 2, "test_ra": 1.0})
code = run_command(command)
other = threading.Thread(target=full)
other.start(); other.join()
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("error: cannot write") == 1
    assert done.stderr.count("Traceback") == 1


# ---------------------------------------------------------------- CSV


@pytest.fixture
def metrics_csv(monkeypatch, capsys):
    return toy.Command("metrics_csv", monkeypatch, capsys)


def test_the_csv_has_a_line_an_epoch(finished, metrics_csv, tmp_path):
    run = finished(*TOY_BIRD, *toy.EASY_TICKET, to=tmp_path / "runs", script="train_eb")
    outcome = metrics_csv(run)
    assert outcome.code == 0, outcome.err
    assert metrics_csv(run, "--out", tmp_path / "m.csv").code == 0
    assert (tmp_path / "m.csv").read_text() == outcome.out
    table = list(csv.DictReader(io.StringIO(outcome.out)))
    rows = read_epochs(RunPaths(run))
    assert len(table) == len(rows) == 4
    assert float(table[-1]["test_ra"]) == rows[-1]["test_ra"]
    assert table[0]["test_ra"] == ""  # not measured in stage 1
    assert float(table[-1]["density/conv1.weight"]) == rows[-1]["layer_densities"]["conv1.weight"]


def test_no_run_and_no_place_are_one_line(metrics_csv, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    for arguments in (
        [tmp_path / "nothing"],
        [tmp_path, "--out", tmp_path / "no" / "m.csv"],
        [tmp_path, "--output", "x"],
    ):
        outcome = metrics_csv(*arguments)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
