import os
import pwd
import tempfile

import pytest
import torch
from torch import nn

from data.sources import default_cache
from models import CUSTOM_ARCHITECTURES, build_model, load_model
from models.loading import _hub_folder
from tests import toy
from utils.errors import InputError
from utils.export import export
from utils.storage.checkpoint import load_checkpoint


@pytest.fixture
def trained(finished, tmp_path):
    """The folder of a toy Flying Bird run."""
    return finished(*toy.TOY_RUN, *toy.TOY_MASKS, "--fb", to=tmp_path / "runs")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def save_plain(path, prefix="", **options):
    """Save a state dict as the paper's code does; returns its network."""
    model = build_model(
        "resnet18", 7, width=0.0625, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2], seed=5
    )
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "best_sa": 3.0, **options} if options else state, path)
    return model.eval()


DESCRIBED = {"arch": "resnet18", "num_classes": 7, "width": 0.0625}


@pytest.mark.parametrize(
    "name", ["model_RA_best.pth.tar", "model_SA_best.pth.tar", "checkpoint.pth.tar"]
)
def test_a_run_s_checkpoints(trained, name):
    model = load_model(trained / name)
    assert not model.training
    state = load_checkpoint(trained / name)["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    if name.startswith("checkpoint"):
        assert "packed" in torch.load(trained / name, weights_only=True)  # live weights alone


def test_narrow_checkpoints_and_their_safetensors(run_eb, tmp_path):
    flags = [
        *toy.TOY_BIRD,
        *toy.EASY_TICKET,
        "--pruning",
        "channel",
        "--density",
        0.5,
        "--save_dir",
        tmp_path,
    ]
    assert run_eb(*flags).code == 0
    checkpoint = next(tmp_path.glob("*/model_RA_best.pth.tar"))
    path, _ = export(checkpoint, "safetensors")
    images = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_model(path)(images), load_model(str(checkpoint))(images))


@pytest.mark.parametrize(
    "options", [{}, {"prefix": "module."}, {"epoch": 3}, {"prefix": "module.", "epoch": 3}]
)
def test_the_papers_state_dicts(options, tmp_path):
    model = save_plain(tmp_path / "paper.pth.tar", **options)
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(
            load_model(tmp_path / "paper.pth.tar", **DESCRIBED)(images), model(images), atol=1e-6
        )


def test_what_other_code_leaves_out_or_wraps(tmp_path):
    """No ``num_batches_tracked``, mean and std of shape ``[1, 3, 1, 1]``, weights pruned by torch,
    Lightning's names."""
    model = save_plain(tmp_path / "plain.pth")
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    state |= {name: state[name].reshape(1, 3, 1, 1) for name in ("normalize.mean", "normalize.std")}
    weight = state.pop("conv1.weight")
    mask = (torch.arange(weight.numel()) % 2).reshape(weight.shape).float()
    state |= {"conv1.weight_orig": weight, "conv1.weight_mask": mask}
    torch.save(
        {"state_dict": {f"model.{name}": value for name, value in state.items()}},
        tmp_path / "other.pth",
    )
    with pytest.warns(
        UserWarning,
        match=r"other\.pth: stripped model\., multiplied 1 pruned weights by their masks$",
    ):
        loaded = load_model(tmp_path / "other.pth", **DESCRIBED)
    assert torch.equal(loaded.conv1.weight, weight * mask)
    exported = tmp_path / "exported.pth"
    with pytest.warns(UserWarning, match="stripped"):
        export(tmp_path / "other.pth", "state_dict", exported, **DESCRIBED)
    assert torch.load(exported).keys() == model.state_dict().keys()
    with torch.no_grad():
        model.conv1.weight.mul_(mask)
        images = torch.rand(3, 3, 8, 8)
        assert torch.allclose(loaded(images), model(images), atol=1e-6)


def test_a_url_is_downloaded_once_and_two_of_one_name_are_two_files(tmp_path, hub):
    urls = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        save_plain(tmp_path / folder / "best model.pth")
        urls.append((tmp_path / folder / "best model.pth").as_uri())
    first = load_model(urls[0], **DESCRIBED)
    (kept,) = hub.iterdir()
    assert kept.name.endswith("_best model.pth")
    (tmp_path / "one" / "best model.pth").unlink()
    again = load_model(urls[0], **DESCRIBED)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    load_model(urls[1], **DESCRIBED)
    assert len(list(hub.iterdir())) == 2


@pytest.mark.parametrize("home", [None, ""])
def test_a_user_without_a_home_has_downloads_with_the_temporary_files(tmp_path, monkeypatch, home):
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is None:  # nor does the system know the user
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    else:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "temporary" / f"sparse-adversarial-{os.getuid()}"
    assert (_hub_folder(), default_cache()) == (cache, cache)
    save_plain(tmp_path / "plain.pth")
    load_model((tmp_path / "plain.pth").as_uri(), **DESCRIBED)
    assert len(list((cache / "checkpoints").iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.pth", "temporary"]
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):  # explicit settings win
        monkeypatch.setenv(name, str(tmp_path / name))
        assert tmp_path in _hub_folder().parents
        assert _hub_folder() != cache


def test_what_cannot_be_loaded_says_why(tmp_path, hub, trained):
    save_plain(tmp_path / "paper.pth")
    torch.save({"linear.bias": torch.zeros(7)}, tmp_path / "other.pth")
    torch.save({"state_dict": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")
    for path, given, message in [
        ("paper.pth", {}, "give its arch and num_classes"),
        ("paper.pth", {"arch": "resnet18"}, "give its num_classes"),
        ("paper.pth", {**DESCRIBED, "num_classes": 10}, "linear.weight has shape"),
        ("paper.pth", {**DESCRIBED, "arch": "resnet19"}, "unknown architecture"),
        ("paper.pth", {**DESCRIBED, "width": -1}, "width must be positive"),
        ("other.pth", DESCRIBED, "no normalize.mean"),
        ("code.pth", DESCRIBED, "could run code"),
        ("none.pth", DESCRIBED, "no such checkpoint"),
        (
            trained / "model_RA_best.pth.tar",
            {"num_classes": 10},
            "num_classes would have no effect",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / path, **given)
    for url in ((tmp_path / "none.pth").as_uri(), "nothing://here/x.pth"):
        with pytest.raises(InputError, match="cannot download"):
            load_model(url, **DESCRIBED)
    for url in ("http://localhost/my model.pt", "http://[bad/x.pt"):
        with pytest.raises(InputError, match=r"cannot download|is not a URL"):
            load_model(url, **DESCRIBED)
    assert not hub.exists() or not list(hub.iterdir())


def plain(classes, normalize):
    """As in docs/extending.md."""
    convolution = nn.Conv2d(normalize.mean.numel(), 8, 3, padding=1)
    return nn.Sequential(
        normalize,
        convolution,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def test_a_network_of_ones_own_is_loaded_where_it_is_registered(run_adv, tmp_path, monkeypatch):
    monkeypatch.setitem(CUSTOM_ARCHITECTURES, "plain", plain)
    flags = [flag for flag in toy.TOY_RUN if flag not in ("--width", "0.0625")]
    assert run_adv(*flags, "--arch", "plain", "--save_dir", tmp_path / "runs").code == 0
    (best,) = (tmp_path / "runs").glob("*/model_RA_best.pth.tar")
    outcome = run_adv("--eval", "--pretrained", best)
    assert (outcome.code, "test RA (PGD-1, linf 8/255)" in outcome.out) == (0, True), outcome.err
    assert load_model(best)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    exported, _ = export(best, "safetensors", tmp_path / "m.safetensors")
    monkeypatch.delitem(CUSTOM_ARCHITECTURES, "plain")
    outcome = run_adv("--eval", "--pretrained", best)
    why = "the script that adds it to models.CUSTOM_ARCHITECTURES, so load it there"
    assert (outcome.code, outcome.err.count("\n"), why in outcome.err) == (2, 1, True)
    for path in (best, exported):
        with pytest.raises(InputError, match=r"unknown architecture 'plain'.*so load it there"):
            load_model(path)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"image_size": 20000}, "describes an impossible network: image_size 20000"),
        ({"num_classes": 10**12}, "impossible network: num_classes"),
        ({"num_classes": 10**7}, r"describes a network of \d+ values but holds"),
        ({"width": 64.0}, r"describes a network of \d+ values but holds"),
        ({"width": float("inf")}, "impossible network: width inf"),
        (
            {"arch": "wideresnet", "width": 1.0, "depth_factor": 1000, "width_factor": 100},
            r"describes a network of \d+ values but holds",
        ),
        ({"mean": ["a", 0.5, 0.5]}, "which network it holds .mean"),
        ({"kept": {"bn1": [0]}}, "which network it holds .kept"),
        ({"channels": {"conv1": [[0]]}}, "which channels its network kept"),
        ({"channels": {"conv1": [[0.5], None]}}, "which network it holds .channels"),
        (
            {"num_classes": 10**7, "channels": {"conv1": [[0], None]}},
            r"describes a network of \d+ values but holds",
        ),
    ],
)
def test_a_description_cannot_ask_for_more_than_its_file_holds(tmp_path, changed, reason):
    """Refused without building it, which would take too much memory or time."""
    spec = {
        "arch": "resnet18",
        "num_classes": 10,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "width": 0.0625,
        "depth_factor": 34,
    }
    spec |= {"width_factor": 10, "image_size": 32}
    state = build_model(**spec).state_dict()
    torch.save({"network": {**spec, **changed}, "state_dict": state}, tmp_path / "odd.pth.tar")
    with pytest.raises(InputError, match=reason):
        load_model(tmp_path / "odd.pth.tar")
