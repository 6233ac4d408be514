"""scripts/export.py on toy runs: every format computes what the checkpoint's network does."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch
from PIL import Image
from torch import nn

from data import load_data, plain_batches
from models import Normalize, build_model, load_model
from models.channels import narrow, plan_largest
from models.loading import build_network
from models.resnet import BasicBlock, PreActResNet
from sparse_core import prunable
from tests import toy
from utils import export as exporting
from utils.errors import InputError
from utils.export import FORMATS, Trained, default_path, export
from utils.storage.checkpoint import load_checkpoint
from utils.storage.paths import RunPaths
from utils.storage.safetensors import load_safetensors, safetensors_bytes

SUFFIXES = {
    "onnx": ".onnx",
    "safetensors": ".safetensors",
    "torch_export": ".pt2",
    "state_dict": ".pth",
    "packed": ".pt",
}


@pytest.fixture
def run_export(monkeypatch, capsys):
    return toy.Command("export", monkeypatch, capsys)


@pytest.fixture
def flying_run(finished, tmp_path):
    return finished(*toy.TOY_RUN, *toy.TOY_MASKS, "--fb", to=tmp_path / "fb")


@pytest.fixture
def flying(flying_run):
    """The best model of a toy Flying Bird run."""
    return flying_run / "model_RA_best.pth.tar"


@pytest.fixture
def narrow_bird(finished, tmp_path):
    """The best model of a toy Robust Bird run with half of the channels removed."""
    flags = [*toy.TOY_BIRD, *toy.EASY_TICKET, "--pruning", "channel", "--density", 0.5]
    return finished(*flags, to=tmp_path / "rb", script="train_eb") / "model_RA_best.pth.tar"


@pytest.fixture(params=["flying", "narrow_bird"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def plain(tmp_path):
    """A VGG with random statistics, as a state dict without a description."""
    path = tmp_path / "vgg.pth"
    torch.save(
        moved(build_model("vgg16", 7, width=0.0625, mean=[0.4] * 3, std=[0.2] * 3)).state_dict(),
        path,
    )
    return path


PLAIN = {"arch": "vgg16", "num_classes": 7, "width": 0.0625}


def moved(model):
    """Draw batch-norm means, scales and shifts at random, so that a misplaced one shows."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean):
                value.data.copy_(torch.randn(value.shape, generator=generator))
    return model.eval()


def flags_of(given):
    return [text for name, value in given.items() for text in (f"--{name}", value)]


def digits():
    return load_data("digits", "", device=torch.device("cpu")).test


def flat(content):
    """A file's content, comparable by value."""
    return {
        **content,
        "state_dict": {name: value.tolist() for name, value in content["state_dict"].items()},
    }


def with_onnxruntime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def assert_same(network, model, images):
    with torch.no_grad():
        expected, found = model(images), network(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_onnx_answers_as_the_network_on_the_whole_test_set(checkpoint, run_export):
    outcome = run_export(checkpoint, "--format", "onnx")
    assert outcome.code == 0, outcome.err
    path = checkpoint.with_name("model_RA_best.onnx")
    assert outcome.out.startswith(f"{path}: 0.")
    network, model = with_onnxruntime(path), load_model(checkpoint)
    batches = list(plain_batches(digits(), 64))
    # the last batch is smaller, so the batch axis is dynamic
    assert len({len(batch.x) for batch in batches}) == 2
    for batch in batches:
        assert_same(network, model, batch.x.contiguous())


def test_a_packed_network_is_small_and_keeps_its_zeros(flying_run, tmp_path):
    path, difference = export(RunPaths(flying_run).best_ra, "packed", tmp_path / "small.pt")
    assert 0 < difference < 1e-2
    trained, packed = Trained.read(RunPaths(flying_run).best_ra), Trained.read(path)
    weights = prunable(trained.model)
    live = sum(int(weight.count_nonzero()) for weight in weights.values())
    total = sum(weight.numel() for weight in weights.values())
    stored = torch.load(path, weights_only=True)
    kept = [stored["state_dict"][name] for name in weights]
    assert {value.dtype for value in kept} == {torch.float16}
    assert sum(value.numel() for value in kept) == live
    assert sum(bits.numel() for bits in stored["packed"]["live"].values()) < total / 8 + len(kept)
    for name, value in trained.state.items():
        again = packed.state[name]
        assert again.dtype == value.dtype
        if name in weights:
            assert torch.equal(again, value.half().float())
        else:
            assert torch.equal(again, value)
    # it holds the settings that an evaluation takes from the run
    assert packed.content["settings"] == trained.content["settings"]


def test_what_torch_load_reads_may_have_any_of_its_suffixes(flying_run, tmp_path):
    for kind, name in (("state_dict", "a.pt"), ("packed", "b.pth"), ("packed", "c.pth.tar")):
        path, _ = export(RunPaths(flying_run).best_ra, kind, tmp_path / name)
        assert torch.load(path, weights_only=True)


def test_a_packed_network_whose_bits_do_not_fit_is_refused(flying_run, tmp_path):
    path, _ = export(RunPaths(flying_run).best_ra, "packed", tmp_path / "small.pt")
    content = torch.load(path, weights_only=True)
    name = next(iter(content["packed"]["live"]))
    content["packed"]["live"][name] = content["packed"]["live"][name][:-2]
    torch.save(content, path)
    with pytest.raises(InputError, match="do not fit its masks"):
        load_model(path)


def test_onnx_of_a_narrow_network_is_narrow(narrow_bird):
    path, difference = export(narrow_bird, "onnx")
    assert difference <= 1e-5
    model = onnx.load(path)
    # convolutions, without mean and std
    kernels = [
        weights
        for weights in model.graph.initializer
        if len(weights.dims) == 4 and list(weights.dims) != [1] * 4
    ]
    stored = sum(onnx.numpy_helper.to_array(weights).size for weights in kernels)
    trained = Trained.read(narrow_bird)
    assert stored == sum(
        weight.numel() for weight in trained.model.parameters() if weight.ndim == 4
    )
    assert stored < 0.5 * sum(
        weight.numel() for weight in trained.full_size().parameters() if weight.ndim == 4
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_a_vgg_from_a_plain_state_dict(kind, plain, run_export, tmp_path):
    out = tmp_path / f"out{SUFFIXES[kind]}"
    outcome = run_export(plain, "--format", kind, "--out", out, *flags_of(PLAIN))
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, "vgg.pth"])
    trained = Trained.read(plain, **PLAIN)
    difference = exporting.largest_difference(FORMATS[kind].network(out, trained), trained)
    assert difference <= FORMATS[kind].tolerance


@pytest.mark.parametrize(
    ("arch", "kind"), [*(("wideresnet", kind) for kind in FORMATS), ("resnet50", "state_dict")]
)
def test_other_families_without_some_channels(arch, kind, tmp_path):
    spec = {
        "arch": arch,
        "num_classes": 5,
        "mean": [0.5],
        "std": [0.3],
        "width": 1.0,
        "depth_factor": 10,
        "width_factor": 1,
    }
    spec |= {"image_size": 8, **({"width": 0.0625} if arch == "resnet50" else {})}
    model = moved(build_network(spec, torch.device("cpu")))
    plan, live, _ = plan_largest(model, (1, 8, 8), 0.6, multiple=1)
    kept = plan.channels.kept(live)
    content = {
        "network": {**spec, "channels": kept},
        "state_dict": narrow(model, kept).state_dict(),
    }
    torch.save(content, tmp_path / "narrow.pth.tar")
    path, difference = export(tmp_path / "narrow.pth.tar", kind)
    assert path == tmp_path / f"narrow{SUFFIXES[kind]}"
    assert difference <= FORMATS[kind].tolerance


def test_tied_weights_are_written_twice():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert len(safetensors_bytes(model.state_dict(), {}, {})) > 0


@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_images_that_are_not_square_keep_their_shape(kind, run_adv, tmp_path):
    rng = np.random.RandomState(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.randint(0, 256, (12, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    flags = "--dataset imagefolder --width 0.0625 --epochs 1 --train_step 1 --test_step 1".split()
    flags += ["--data", tmp_path / "images", "--cache_dir", tmp_path / "cache"]
    assert run_adv(*flags, "--save_dir", tmp_path / "run").code == 0
    checkpoint = toy.only_run(tmp_path / "run").best_ra
    assert run_adv(*flags, "--save_dir", tmp_path / "run", "--resume").code == 0
    path, difference = export(checkpoint, kind)
    assert difference < 1e-4
    images = torch.rand(3, 3, 12, 8)
    expected = load_model(checkpoint)(images).detach()
    if kind == "onnx":
        session = onnxruntime.InferenceSession(path)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        found = torch.from_numpy(found)
    else:
        found = torch.export.load(path).module()(images)
    assert torch.allclose(found, expected, atol=1e-4)


def test_safetensors_rebuild_the_network_and_tell_of_it(checkpoint):
    path, difference = export(checkpoint, "safetensors")
    assert difference == 0.0
    with safetensors.safe_open(path, "pt") as file:
        told = {
            name: json.loads(text) for name, text in file.metadata().items() if name != "format"
        }
    content = load_checkpoint(checkpoint)
    assert {name: told[name] for name in content["network"]} == content["network"]
    assert (told["method"], told["dataset"]) == (
        "rb-channel" if "channels" in told else "fb",
        "digits",
    )
    state = load_model(path).state_dict()
    assert state.keys() == content["state_dict"].keys()
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in state.items())
    weights = [value for name, value in content["state_dict"].items() if value.ndim in (2, 4)]
    full = Trained.read(checkpoint).full_size()
    total = sum(value.numel() for value in full.state_dict().values() if value.ndim in (2, 4))
    assert told["density"] == sum(int(value.count_nonzero()) for value in weights) / total
    again, _ = export(path, "safetensors", path.with_name("again.safetensors"))
    # the library does not keep the order of metadata
    assert flat(load_safetensors(again)) == flat(load_safetensors(path))


def test_the_checkpoint_to_resume_from_has_the_same_network(flying):
    packed = flying.with_name("checkpoint.pth.tar")
    path, _ = export(packed, "onnx")
    assert_same(with_onnxruntime(path), load_model(packed), torch.rand(3, 1, 8, 8))


def test_torch_export_takes_any_batch(checkpoint):
    path, difference = export(checkpoint, "torch_export")
    assert path.suffix == ".pt2"
    assert difference <= 1e-5
    network, model = torch.export.load(path).module(), load_model(checkpoint)
    for batch in (1, 2, 7):
        assert_same(network, model, torch.rand(batch, 1, 8, 8))


class Submission(PreActResNet):
    """A class without arguments, as a model zoo registers it."""

    def __init__(self):
        widths = [round(channels * 0.0625) for channels in (64, 128, 256, 512)]
        super().__init__(BasicBlock, (2, 2, 2, 2), widths, 10, Normalize([0.0], [1.0]))


def robustbench_loader(path):
    """Load strictly, as RobustBench's ``load_model`` does, from the file's ``state_dict`` or the
    file itself."""
    model = Submission()
    checkpoint = torch.load(path, map_location="cpu")
    state = checkpoint.get("state_dict", checkpoint)
    model.load_state_dict(
        {name.replace("module.", ""): value for name, value in state.items()}, strict=True
    )
    return model.eval()


def clean_accuracy(model, split):
    """As RobustBench's ``clean_accuracy``: pixels in [0, 1], the class of the largest output."""
    right = sum(
        (model(batch.x).max(1)[1] == batch.y).float().sum().item()
        for batch in plain_batches(split, 100)
    )
    return right / len(split)


def pruned_share(model):
    """Share of zeros among convolution and linear weights: the sparsity of pruning benchmarks."""
    weights = [
        module.weight for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(
        weight.numel() for weight in weights
    )


def test_a_benchmarks_loader_takes_the_state_dict(checkpoint):
    path, _ = export(checkpoint, "state_dict")
    assert all(isinstance(value, torch.Tensor) for value in torch.load(path).values())
    model, ours = robustbench_loader(path), load_model(checkpoint)
    assert clean_accuracy(model, digits()) == clean_accuracy(ours, digits())
    assert_same(model, ours, next(iter(plain_batches(digits(), 300))).x)
    assert 1 - pruned_share(model) == pytest.approx(Trained.read(checkpoint).density)


def test_a_benchmarks_loader_takes_a_masked_checkpoint_as_it_is(flying):
    model = robustbench_loader(flying)
    assert pruned_share(model) >= 0.69
    assert_same(model, load_model(flying), torch.rand(3, 1, 8, 8))


# ---- what goes wrong


def refused(outcome, *words):
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in words), outcome.err


def test_bad_input_is_one_line_and_writes_nothing(plain, run_export, tmp_path):
    (tmp_path / "broken.pth.tar").write_bytes(plain.read_bytes()[:2000])
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    before = sorted(tmp_path.iterdir())
    described = flags_of(PLAIN)
    refused(run_export(tmp_path / "none.pth.tar", "--format", "onnx"), "no such checkpoint")
    refused(run_export(tmp_path / "none.safetensors", "--format", "onnx"), "no such file")
    refused(
        run_export(plain, "--format", "onnx", "--widht", 2),
        "unknown argument --widht; did you mean --width?",
    )
    refused(run_export(tmp_path / "broken.pth.tar", "--format", "onnx"), "broken")
    refused(run_export(tmp_path / "broken.safetensors", "--format", "onnx"), "broken")
    refused(run_export(plain, "--format", "onnx"), "arch and num_classes")
    refused(run_export(plain, "--format", "onnx", *described[:4]), "not a checkpoint of this vgg16")
    refused(
        run_export(plain, "--format", "onnx", *described, "--image_size", 8),
        "vgg16 cannot take 8x8",
    )
    aliased = flags_of({**PLAIN, "arch": "VGG16_BN"})
    refused(run_export(plain, "--format", "onnx", *aliased, "--image_size", 8), "cannot take 8x8")
    refused(run_export(plain, "--format", "tflite"), "--format", "onnx")
    refused(run_export(plain), "--format")
    refused(run_export(plain, "--format", "state_dict", *described), "the checkpoint itself")
    refused(run_export(plain, "--format", "onnx", "--out", tmp_path), "is a folder")
    for kind, name in (
        ("safetensors", "x.onnx"),
        ("onnx", "x.pth.tar"),
        ("state_dict", "x.pt2"),
        ("onnx", "x.safetensors"),
    ):
        refused(
            run_export(plain, "--format", kind, *described, "--out", tmp_path / name),
            "suffix of another format",
            kind,
        )
    refused(
        run_export(plain, "--format", "onnx", "--out", tmp_path / "no" / "x.onnx"), "no such folder"
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_description_beside_the_files_own_is_refused(flying, run_export):
    refused(
        run_export(flying, "--format", "onnx", "--arch", "resnet18"), "arch would have no effect"
    )


@pytest.mark.parametrize(
    "wrong", [lambda logits: logits * 1.001, lambda logits: logits * float("nan")]
)
def test_a_file_that_computes_something_else_is_not_kept(
    wrong, plain, run_export, monkeypatch, tmp_path
):
    network = exporting.FORMATS["onnx"].network
    broken = exporting.Format(
        ".onnx",
        exporting.FORMATS["onnx"].content,
        lambda path, trained: lambda images: wrong(network(path, trained)(images)),
    )
    monkeypatch.setitem(exporting.FORMATS, "onnx", broken)
    (tmp_path / "vgg.onnx").write_bytes(b"from before")
    outcome = run_export(plain, "--format", "onnx", *flags_of(PLAIN))
    assert outcome.code == 3
    assert "was not kept" in outcome.err
    assert (tmp_path / "vgg.onnx").read_bytes() == b"from before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vgg.onnx", "vgg.pth"]


def test_a_full_disk_leaves_nothing(plain, run_export, monkeypatch, tmp_path):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_atomically", full)
    refused(run_export(plain, "--format", "onnx", *flags_of(PLAIN)), "No space left")
    assert [path.name for path in tmp_path.iterdir()] == ["vgg.pth"]


def test_default_names():
    names = ["model_RA_best.pth.tar", "a.b.pt", "net.safetensors", "weights"]
    expected = ["model_RA_best.onnx", "a.b.onnx", "net.onnx", "weights.onnx"]
    assert [default_path(Path("run") / name, "onnx") for name in names] == [
        Path("run") / name for name in expected
    ]
