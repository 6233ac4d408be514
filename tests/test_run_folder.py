import errno
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
from tqdm import tqdm

from utils.errors import InputError, RunError
from utils.storage import run_folder as metrics
from utils.storage.checkpoint import load_checkpoint
from utils.storage.paths import RunPaths
from utils.storage.provenance import environment, source_revision
from utils.storage.run_folder import RunFolder, read_epochs, read_summary, refuse_locked
from utils.training.display import EpochDisplay
from utils.training.engine import Progress

FIGURES = {"epoch": 1, "test_ra": 40.0, "test_sa": 80, "train_ra": 50.0}
FLOPS = {"training": 10**15, "inference": 1e9}
SUMMARY = {
    "method": "fb",
    "run": "fb_1",
    "best": FIGURES,
    "final": FIGURES,
    "diff": 1.5,
    "robust_gap": 2.0,
    "density": 0.2,
}
SUMMARY |= {"flops": {"real": FLOPS, "paper": FLOPS}}
TYPES = (torch.float32, torch.bfloat16, torch.bool, torch.int64)


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(RunPaths(tmp_path / "run"), {"a": 1})


def test_a_folder_keeps_what_it_is_given(folder, capsys):
    folder.say("hello")
    folder.append_epoch({"epoch": 1})
    folder.append_epoch({"epoch": 2})
    folder.write_json(folder.paths.summary, SUMMARY)
    folder.settle()
    paths = folder.paths
    assert json.loads(paths.config.read_text()) == {"a": 1}
    assert read_epochs(paths) == [{"epoch": 1}, {"epoch": 2}]
    assert read_summary(paths) == SUMMARY
    assert paths.log.read_text() == "hello\n" == capsys.readouterr().out
    folder.rewrite_epochs([{"epoch": 1}])
    assert read_epochs(paths) == [{"epoch": 1}]
    assert paths.holds_a_run()
    assert not RunPaths(paths.root.parent).holds_a_run()


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the run folder"):
        RunFolder.create(RunPaths(tmp_path / "file" / "run"), {})


@pytest.mark.parametrize("write", ["say", "append_epoch", "write_json", "save"])
def test_a_failing_disk_ends_the_run_with_one_error(folder, write, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", full)
    monkeypatch.setattr(metrics, "write_atomically", full)
    monkeypatch.setattr(metrics, "save_checkpoint", full)
    arguments = {
        "say": ["x"],
        "append_epoch": [{}],
        "write_json": [folder.paths.summary, {}],
        "save": [folder.paths.checkpoint, {}],
    }[write]
    with pytest.raises(RunError, match=r"No space left on device.*intact"), folder.settled():
        getattr(folder, write)(*arguments)


def test_writing_behind_keeps_the_order_and_the_moment(folder, monkeypatch):
    """On a slow disk, each save holds the network of its moment, writes keep their order, and
    memory is bounded."""
    written, waiting = [], []

    def slow(path, content, keep):
        time.sleep(0.02)
        waiting.append(len(folder._behind))
        written.append(content["weights"]["w"].item())

    monkeypatch.setattr(metrics, "save_checkpoint", slow)
    weight, done = torch.zeros(()), []
    with folder.settled():
        for _ in range(12):
            folder.save(
                folder.paths.checkpoint,
                {"weights": {"w": weight}},
                on_disk=lambda: done.append(len(written)),
            )
            weight += 1
        assert len(written) == 11
        folder.append_epoch({"epoch": 1})
    assert written == list(range(12))
    assert done == list(range(1, 13))
    assert max(waiting) == 1
    assert read_epochs(folder.paths) == [{"epoch": 1}]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_writing_behind_takes_one_thread(folder):
    """A second OpenMP thread team would slow training for good: an epoch took 6 s instead of 3."""
    weights = {
        f"w{dtype}": torch.zeros(512, 512, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        for dtype in TYPES
    }
    torch.zeros(2**22).add_(1)  # starts this thread's OpenMP team
    before = len(os.listdir("/proc/self/task"))
    with folder.settled():
        folder.save(folder.paths.checkpoint, {"state_dict": weights})
    assert len(os.listdir("/proc/self/task")) <= before + 1
    loaded = load_checkpoint(folder.paths.checkpoint)["state_dict"]
    assert all(loaded[name].dtype == weight.dtype for name, weight in weights.items())


def test_after_a_failure_nothing_more_is_written_behind(folder, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "save_checkpoint", full)
    held = threading.Event()
    folder._writer.submit(held.wait)  # so that both are queued before the first is tried
    folder.save(folder.paths.checkpoint, {})
    folder.append_epoch({"epoch": 1})
    held.set()
    folder._writer.submit(lambda: None).result()
    assert folder.has_failed()
    with pytest.raises(RunError, match="No space left"), folder.settled():
        pass
    assert not folder.paths.metrics.exists()


def test_one_process_at_a_time_trains_in_a_folder(folder):
    with pytest.raises(InputError, match="another process is training in"):
        RunFolder.create(folder.paths, {"a": 2})
    assert json.loads(folder.paths.config.read_text()) == {"a": 1}
    with folder.settled():
        pass
    with RunFolder.create(folder.paths, {"a": 2}).settled():
        assert json.loads(folder.paths.config.read_text()) == {"a": 2}


def test_a_released_lock_is_the_file_that_others_wait_for(folder):
    """Removing and recreating the lock file would let two processes in."""
    before = folder.paths.lock.stat().st_ino
    with folder.settled():
        pass
    with RunFolder.create(folder.paths, {}).settled():
        assert folder.paths.lock.stat().st_ino == before
    assert folder.paths.lock.stat().st_ino == before


def test_a_killed_process_leaves_its_folder_unlocked(tmp_path):
    """The lock file stays; the lock itself ends with the process."""
    paths = RunPaths(tmp_path)
    held = "; ".join(
        (
            "import sys, time",
            "from filelock import FileLock",
            "lock = FileLock(sys.argv[1])",
            "lock.acquire()",
            "print(flush=True)",
            "time.sleep(60)",
        )
    )
    command = [sys.executable, "-c", held, str(paths.lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is training in"):
            refuse_locked(paths)
        other.kill()
    assert paths.lock.exists()
    refuse_locked(paths)
    with RunFolder.create(paths, {}).settled():
        assert paths.config.exists()


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with RunFolder.create(RunPaths(tmp_path), {"a": 1}).settled():
        refuse_locked(RunPaths(tmp_path))
    assert json.loads(RunPaths(tmp_path).config.read_text()) == {"a": 1}


def test_folders_without_a_run_are_input_errors(tmp_path):
    for read in (read_epochs, read_summary):
        with pytest.raises(InputError):
            read(RunPaths(tmp_path))


def test_environment_names_versions_and_revision():
    facts = environment(torch.device("cpu"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["revision"] == source_revision()


def test_display_is_plain_lines_without_a_terminal(folder, capsys):
    with EpochDisplay(folder, "epoch 1/2", 100, print_freq=5) as display:
        display.training(Progress(4, 10, 2.0, 30.0, 1000, 1.0))
        display.training(Progress(5, 10, 2.0, 30.0, 1000, 1.0))
        display.training(Progress(10, 10, 1.5, 40.0, 1000, 1.0))
    captured = capsys.readouterr()
    assert captured.out == "epoch 1/2 step 5/10  loss 2.000  acc 30.00  1000 img/s\n"
    assert captured.err == ""


def test_display_is_a_bar_on_a_terminal(folder, monkeypatch):
    shown = tqdm(total=100, disable=False)
    monkeypatch.setattr("utils.training.display.tqdm", lambda **options: shown)
    with EpochDisplay(folder, "epoch 1/2", 100) as display:
        display.training(Progress(5, 10, 2.0, 30.0, 1000, 1.0))
        assert (shown.n, shown.postfix) == (50, "loss 2.000  acc 30.00")
        display.training(Progress(10, 10, 1.5, 40.0, 1000, 1.0))
    assert (shown.n, shown.postfix) == (100, "loss 1.500  acc 40.00")
    assert not folder.paths.log.exists()


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("3", "does not hold a JSON object"),
        ("[" * 100_000, "cannot be read (nested too deeply)"),
        ("\udcff", "cannot be read"),
        ("{}", "it has no epoch"),
        ('{"epoch": true}', "epoch is True"),
        ('{"epoch": 2, "layer_densities": 3}', "layer_densities is 3"),
        ('{"epoch": 2, "layer_densities": {"conv1": "much"}}', "layer_densities.conv1 is 'much'"),
        ('{"epoch": 2, "updates": [{"prune": true}]}', "it has no updates.grow"),
        ('{"epoch": 2, "test_ra": [1]}', "test_ra is a list"),
    ],
)
def test_a_line_that_is_of_no_epoch_is_named(tmp_path, line, wrong):
    paths = RunPaths(tmp_path)
    paths.metrics.write_bytes(
        b'{"epoch": 1, "test_ra": NaN, "density": 1}\n' + line.encode(errors="surrogateescape")
    )
    with pytest.raises(InputError, match=rf"^line 2 of .*metrics\.jsonl .*{re.escape(wrong)}"):
        read_epochs(paths)
