import os
import resource
import signal
import stat

import numpy as np
import pytest
import torch

from models import build_model
from utils.checkpoint import load_checkpoint, load_weights, network_weights, save_checkpoint, write_atomically
from utils.errors import InputError


def test_what_is_saved_is_loaded(tmp_path):
    content = {"state_dict": {"w": torch.arange(3.0)}, "epoch": 4, "history": [{"a": 1.5, "b": None}]}
    save_checkpoint(tmp_path / "c.pth.tar", content)
    loaded = load_checkpoint(tmp_path / "c.pth.tar")
    assert torch.equal(loaded.pop("state_dict")["w"], torch.arange(3.0))
    assert loaded == {"format": 1, "epoch": 4, "history": [{"a": 1.5, "b": None}]}


def test_numpy_numbers_of_older_code_are_read(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}, "best_ra": np.float64(51.5), "epoch": np.int64(3)}, tmp_path / "c.pth.tar")
    assert load_checkpoint(tmp_path / "c.pth.tar")["best_ra"] == 51.5


def test_another_format_is_refused(tmp_path):
    torch.save({"format": 99, "state_dict": {}}, tmp_path / "c.pth.tar")
    with pytest.raises(InputError, match="format 99"):
        load_checkpoint(tmp_path / "c.pth.tar")


def test_nothing_is_left_beside_the_file(tmp_path):
    write_atomically(tmp_path / "f", b"one")
    write_atomically(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.fixture
def small_disk():
    """Files may grow to 10,000 bytes: what a write meets on a full disk, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_checkpoint_intact(tmp_path, small_disk):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(path, {"state_dict": {"w": torch.zeros(3)}})
    with pytest.raises(OSError, match="File too large"):
        save_checkpoint(path, {"state_dict": {"w": torch.zeros(10_000)}})
    assert load_checkpoint(path)["state_dict"]["w"].shape == (3,)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_one_before_is_given_up_only_for_a_whole_new_one(tmp_path, monkeypatch):
    """Two good files stay two different ones as long as the new one is not on disk."""
    path, keep = tmp_path / "c.pth.tar", tmp_path / "previous.pth.tar"
    for number in range(3):
        save_checkpoint(path, {"state_dict": {"w": torch.full((3,), number)}}, keep)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"state_dict": {"w": torch.full((3,), 3)}}, keep)
    assert [load_checkpoint(file)["state_dict"]["w"][0].item() for file in (path, keep)] == [2, 1]


def test_a_file_system_that_syncs_no_folders_will_do(tmp_path, monkeypatch):
    original = os.fsync

    def picky(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", picky)
    write_atomically(tmp_path / "f", b"one")
    assert (tmp_path / "f").read_bytes() == b"one"


@pytest.mark.parametrize("fault", ["missing", "empty", "text", "truncated", "folder"])
def test_files_that_are_no_checkpoints_are_named(tmp_path, fault):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(path, {"state_dict": {"w": torch.zeros(1000)}})
    if fault == "missing":
        path.unlink()
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "text":
        path.write_text("hello")
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(InputError, match=r"c\.pth\.tar$" if fault in ("missing", "folder") else r"not a checkpoint, or a broken one$"):
        load_checkpoint(path)


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch was_run",))


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, tmp_path / "c.pth.tar")
    with pytest.raises(InputError, match="could run code"):
        load_checkpoint(tmp_path / "c.pth.tar")
    assert not (tmp_path / "was_run").exists()


def test_weights_are_found_with_and_without_the_parallel_prefix():
    state = {"conv.weight": torch.zeros(1)}
    assert network_weights({"state_dict": state}, "f").keys() == state.keys()
    assert network_weights({"state_dict": {"module.conv.weight": torch.zeros(1)}}, "f").keys() == state.keys()
    assert network_weights(state, "f").keys() == state.keys()
    for bad in ({"state_dict": {}}, {"epoch": 3}, {"state_dict": 3}):
        with pytest.raises(InputError, match="state_dict"):
            network_weights(bad, "f")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"arch": "resnet34"}, r"also has layer1\.2"),
        ({"arch": "vgg16"}, "it has no conv1.weight"),
        ({"width": 0.125}, r"conv1\.weight has shape \[8, 3, 3, 3\] there and \[4, 3, 3, 3\] here"),
        ({"num_classes": 5}, r"linear\.weight has shape"),
    ],
)
def test_weights_of_another_network_are_refused_by_the_first_difference(other, message):
    model = build_model("resnet18", 10, width=0.0625)
    options = {"arch": "resnet18", "num_classes": 10, "width": 0.0625} | other
    state = build_model(options.pop("arch"), options.pop("num_classes"), **options).state_dict()
    before = model.conv1.weight.clone()
    with pytest.raises(InputError, match=message):
        load_weights(model, state, "f", "resnet18")
    assert torch.equal(model.conv1.weight, before)
