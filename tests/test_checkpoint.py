import os
import resource
import signal
import stat
import struct
import sys
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from models import build_model
from utils.errors import BrokenCheckpointError, InputError
from utils.storage.checkpoint import (
    load_checkpoint,
    load_newest,
    load_weights,
    network_weights,
    refuse_unfit_training_state,
    save_checkpoint,
    unwrapped,
)
from utils.storage.files import write_atomically
from utils.storage.safetensors import load_safetensors


def test_what_is_saved_is_loaded(tmp_path):
    content = {
        "state_dict": {"w": torch.arange(3.0)},
        "epoch": 4,
        "history": [{"a": 1.5, "b": None}],
    }
    save_checkpoint(tmp_path / "c.pth.tar", content)
    loaded = load_checkpoint(tmp_path / "c.pth.tar")
    assert torch.equal(loaded.pop("state_dict")["w"], torch.arange(3.0))
    assert loaded == {"format": 1, "epoch": 4, "history": [{"a": 1.5, "b": None}]}


def test_numpy_numbers_of_older_code_are_read(tmp_path):
    torch.save(
        {"state_dict": {"w": torch.zeros(1)}, "best_ra": np.float64(51.5), "epoch": np.int64(3)},
        tmp_path / "c.pth.tar",
    )
    assert load_checkpoint(tmp_path / "c.pth.tar")["best_ra"] == 51.5


def test_another_format_is_refused(tmp_path):
    torch.save({"format": 99, "state_dict": {}}, tmp_path / "c.pth.tar")
    with pytest.raises(InputError, match="format 99"):
        load_checkpoint(tmp_path / "c.pth.tar")


def test_nothing_is_left_beside_the_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        write_atomically(tmp_path / "pipe", b"one")
    (tmp_path / "pipe").unlink()
    write_atomically(tmp_path / "f", b"one")
    write_atomically(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.fixture
def small_disk():
    """Limits files to 10,000 bytes: a larger write fails as on a full disk."""
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
    """The two good files stay, and stay different, until the new one is on disk."""
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
    with pytest.raises(
        InputError,
        match=(
            r"c\.pth\.tar$"
            if fault in ("missing", "folder")
            else r"not a checkpoint or is damaged$"
        ),
    ):
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


def with_a_flipped_bit(path, text):
    """Flip one bit of ``text`` in the file's pickle."""
    content = bytearray(path.read_bytes())
    content[content.index(text)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "text", [b"torch._utils", b"_rebuild_tensor_v2", b"collections", b"FloatStorage"]
)
def test_a_bit_flipped_in_the_pickle_falls_back_to_the_checkpoint_before(tmp_path, text):
    newest, previous = tmp_path / "checkpoint.pth.tar", tmp_path / "previous.pth.tar"
    content = torch.nn.Linear(2, 2).state_dict()  # an OrderedDict
    for epoch in (1, 2):
        save_checkpoint(newest, {"state_dict": content, "epoch": epoch}, previous)
    with_a_flipped_bit(newest, text)
    with pytest.raises(BrokenCheckpointError, match=r"is damaged$"):
        load_checkpoint(newest)
    loaded, path, warning = load_newest(newest, previous)
    assert (loaded["epoch"], path) == (1, previous)
    assert "resuming from the previous checkpoint previous.pth.tar" in warning


def test_an_unsafe_pickle_does_not_fall_back(tmp_path):
    save_checkpoint(tmp_path / "previous", {"state_dict": {"w": torch.zeros(1)}})
    for zipped in (True, False):
        torch.save(
            {"state_dict": Malicious()}, tmp_path / "newest", _use_new_zipfile_serialization=zipped
        )
        with pytest.raises(InputError, match="could run code"):
            load_newest(tmp_path / "newest", tmp_path / "previous")


@pytest.mark.parametrize(
    ("kind", "why"), [("deflated", "compressed records"), ("larger", "larger than the file")]
)
def test_records_that_unfold_are_refused_before_they_are_read(tmp_path, monkeypatch, kind, why):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(tmp_path / "plain", {"state_dict": {"w": torch.zeros(100_000)}})
    if kind == "deflated":
        with (
            zipfile.ZipFile(tmp_path / "plain") as plain,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for record in plain.infolist():
                archive.writestr(record.filename, plain.read(record))
    else:
        content = bytearray((tmp_path / "plain").read_bytes())
        # the uncompressed size of the first record, in the central directory
        at = content.index(b"PK\x01\x02") + 24
        content[at : at + 4] = struct.pack("<I", 3_000_000_000)
        path.write_bytes(content)

    def read(*args, **kwargs):
        raise AssertionError("the file is read")

    monkeypatch.setattr(torch, "load", read)
    with pytest.raises(BrokenCheckpointError, match=why):
        load_checkpoint(path)


WEIGHTS = {"normalize.mean": torch.zeros(3), "conv1.weight": torch.tensor([1.0, -2.0, 3.0])}


def prefixed(prefix):
    return {prefix + name: value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        (WEIGHTS, []),
        ({"state_dict": WEIGHTS, "epoch": 3, "model": "resnet18"}, []),
        ({"state_dict": prefixed("module.")}, ["stripped module."]),
        (prefixed("_orig_mod."), ["stripped _orig_mod."]),
        (
            {"state_dict": prefixed("model."), "pytorch-lightning_version": "2.5"},
            ["stripped model."],
        ),
        (
            {"n_averaged": torch.tensor(4), **prefixed("module.")},
            ["dropped n_averaged", "stripped module."],
        ),
        ({"net": prefixed("module."), "acc": 93.0}, ["opened net", "stripped module."]),
        ({"model": WEIGHTS}, ["opened model"]),
        (
            {"model_state_dict": prefixed("module._orig_mod.")},
            ["opened model_state_dict", "stripped module.", "stripped _orig_mod."],
        ),
        (
            {
                "normalize.mean": torch.zeros(3),
                "conv1.weight_orig": torch.tensor([1.0, -2, 3]),
                "conv1.weight_mask": torch.ones(3),
            },
            ["multiplied 1 pruned weights by their masks"],
        ),
    ],
)
def test_what_others_wrap_around_weights_is_taken_off_and_said(content, notes):
    state, said = unwrapped(content)
    assert said == notes
    assert state.keys() == WEIGHTS.keys()
    assert all(torch.equal(state[name], value) for name, value in WEIGHTS.items())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network_weights(content, "f")
    assert [str(warning.message) for warning in caught] == (
        [f"f: {', '.join(notes)}"] if notes else []
    )


def test_pruned_weights_are_multiplied_and_half_of_one_is_named():
    weight, mask = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    pruned = {"module.a.weight_orig": weight, "module.a.weight_mask": mask, "module.a.bias": weight}
    state = network_weights(pruned, "f")
    assert {name: value.tolist() for name, value in state.items()} == {
        "a.weight": [0, 2],
        "a.bias": [1, 2],
    }
    for bad, message in [
        ({"a.weight_orig": weight}, r"f has a\.weight_orig without a\.weight_mask"),
        ({"a.weight_mask": weight}, r"f has a\.weight_mask without a\.weight_orig"),
        ({"a.weight": weight, "a.weight_mask": weight}, "without a.weight_orig"),
        (
            {"a.weight": weight, "a.weight_orig": weight, "a.weight_mask": mask},
            r"a\.weight_orig and a\.weight:",
        ),
        (
            {"a.weight_orig": weight, "a.weight_mask": mask[:1]},
            r"shape \[2\] and a mask of shape \[1\]",
        ),
        ({"net": {"a": weight}, "model": {"a": weight}}, "under net and model"),
    ]:
        with pytest.raises(InputError, match=message):
            network_weights(bad, "f")


def test_names_are_left_where_not_all_have_the_prefix_and_in_our_own_checkpoints():
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert unwrapped(mixed) == (mixed, [])
    spectral = {
        "a.weight_orig": torch.zeros(1),
        "a.weight_u": torch.zeros(1),
        "a.weight_v": torch.zeros(1),
    }
    assert unwrapped(spectral) == (spectral, [])
    state = {"model.a": torch.zeros(1), "model.weight_mask": torch.ones(1)}
    assert network_weights({"state_dict": state, "network": {"arch": "mine"}}, "f") == state
    itself = {}
    itself["state_dict"] = itself
    with pytest.raises(InputError, match="no state_dict"):
        network_weights(itself, "f")


@pytest.mark.parametrize("prefix", ["model.", "module."])
def test_a_network_whose_own_names_have_a_prefix(prefix):
    model = torch.nn.ModuleDict({prefix[:-1]: torch.nn.Linear(2, 2)})
    state = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    load_weights(model, network_weights(state, "f"), "f", "mine")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_are_found_with_and_without_the_parallel_prefix():
    state = {"conv.weight": torch.zeros(1)}
    assert network_weights({"state_dict": state}, "f").keys() == state.keys()
    assert (
        network_weights({"state_dict": {"module.conv.weight": torch.zeros(1)}}, "f").keys()
        == state.keys()
    )
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


def itself():
    content = {}
    content["state_dict"] = content
    return content


def deep():
    content = []
    for _ in range(5000):
        content = [content]
    return {"history": content}


def doubled():
    content = []
    for _ in range(60):
        content = [content, content]
    return {"history": content}


@pytest.mark.parametrize("checksum", [{}, {"checksum": "0"}])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            lambda: {"state_dict": {"w": torch.zeros(1).as_strided((10**11,), (0,))}},
            "far larger than the file",
        ),
        (lambda: {"history": [torch.zeros(1 << 20)] * 10_000}, "far larger than the file"),
        (lambda: {"state_dict": {"w": torch.eye(2).to_sparse()}}, "odd tensor"),
        (itself, "more than 100 deep"),
        (deep, "more than 100 deep"),
        (doubled, "more values than the file has bytes"),
        (lambda: {"format": torch.zeros(3)}, "has format"),
    ],
)
def test_content_that_cannot_be_walked_through_is_refused_at_once(tmp_path, content, why, checksum):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)  # only needed to write such a file
    try:
        torch.save({**content(), **checksum}, tmp_path / "c.pth.tar")
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(InputError, match=why):
        load_checkpoint(tmp_path / "c.pth.tar")


def test_masks_with_another_number_of_bits_are_refused(tmp_path):
    masking = {kind: {"w": torch.zeros(2, dtype=torch.uint8)} for kind in ("masks", "explored")}
    for shape in ([10**11], [3], [-1, -16], ["a"]):
        packed = {"shapes": {"w": shape}, "parameters": ["w"]}
        save_checkpoint(
            tmp_path / "c",
            {"state_dict": {}, "optimizer": {"state": {}}, "masking": masking, "packed": packed},
        )
        with pytest.raises(BrokenCheckpointError, match="do not fit"):
            load_checkpoint(tmp_path / "c")


def test_deep_metadata_of_safetensors_is_one_line(tmp_path):
    for text in ("[" * 100_000, "{", "NaN]"):
        safetensors.torch.save_file(
            {"w": torch.zeros(1)}, tmp_path / "m.safetensors", {"arch": text}
        )
        with pytest.raises(
            BrokenCheckpointError, match=r"m\.safetensors is not a safetensors file of ours"
        ):
            load_safetensors(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda c: c["optimizer"]["state"][1].update(momentum_buffer=torch.zeros(3)),
            "momentum_buffer of bias",
        ),
        (lambda c: c["optimizer"]["state"].update({7: {}, 8: {"x": 1}}), "x of 8"),
        (lambda c: c["masking"]["masks"].update(weight=torch.ones(2, 3)), "masks of weight"),
        (
            lambda c: c["masking"]["explored"].update(weight=torch.ones(3, 2, dtype=torch.bool)),
            "explored of weight",
        ),
        (
            lambda c: c["masking"]["masks"].update(other=torch.ones(2, dtype=torch.bool)),
            "masks of other",
        ),
    ],
)
def test_training_state_that_does_not_fit_its_weights_is_named(change, named):
    model = torch.nn.Linear(3, 2)
    state = {
        0: {"momentum_buffer": torch.zeros(2, 3), "step": torch.tensor(1.0)},
        1: {"momentum_buffer": torch.zeros(2)},
    }
    masks = {kind: {"weight": torch.ones(2, 3, dtype=torch.bool)} for kind in ("masks", "explored")}
    content = {"optimizer": {"state": state}, "masking": masks}
    refuse_unfit_training_state(model, content)
    change(content)
    with pytest.raises(ValueError, match=named):
        refuse_unfit_training_state(model, content)
