"""Paths that a user may mistake for a checkpoint or a run folder are named as what they are."""

import pytest

from models import load_model
from tests import toy
from utils.errors import InputError
from utils.storage.inputs import read_checkpoint


@pytest.fixture
def run(run_adv, tmp_path):
    """The folder of a toy run."""
    assert (
        run_adv(
            *toy.TOY_RUN, "--epochs", 1, "--decreasing_lr", 0.5, "--save_dir", tmp_path / "runs"
        ).code
        == 0
    )
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_folders_and_files_are_named_as_what_they_are(run_adv, run_eb, run, tmp_path):
    best = f"{run} is a folder; its best model is {run / 'model_RA_best.pth.tar'}"
    (tmp_path / "empty").mkdir()
    common = ["--dataset", "digits", "--width", 0.0625, "--save_dir", tmp_path / "no"]
    before = sorted(tmp_path.rglob("*"))
    for outcome, words in (
        (run_adv("--eval", "--pretrained", run), best),
        (run_adv("--eval", "--pretrained", run / "model_RA_best.pth.tar", "--source", run), best),
        (run_eb(*common, "--stage1_pretrained", run), best),
        (
            run_adv("--eval", "--pretrained", tmp_path / "empty"),
            "is a folder; a checkpoint is a file, such as the model_RA_best.pth.tar",
        ),
        (
            run_adv("--resume_dir", run / "checkpoint.pth.tar"),
            f"is a file; give the folder of its run: {run}",
        ),
        (
            run_adv("--resume_dir", run.parent),
            f"is a folder of 1 run(s); give one of them, such as {run}",
        ),
        (run_eb("--resume_dir", run.parent), f"such as {run}"),
        (run_adv("--resume_dir", tmp_path / "empty"), "no such checkpoint"),
    ):
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert words in outcome.err
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="is a folder; its best model is"):
        load_model(run)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.onnx", "onnxruntime runs it"),
        ("m.pt2", "torch.export.load reads it"),
        ("m.safetensors", "load_model and"),
    ],
)
def test_files_made_of_a_checkpoint_are_no_checkpoints(tmp_path, name, words):
    with pytest.raises(InputError, match="no such checkpoint"):
        read_checkpoint(tmp_path / name)
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(InputError, match=rf"{words}.*docs/deploying\.md"):
        read_checkpoint(tmp_path / name)
    if name != "m.safetensors":
        with pytest.raises(InputError, match=words):
            load_model(tmp_path / name)
