import copy

import pytest
import torch

from sparse_core import Masking, MaskingConfig
from tests import toy
from utils.storage.packing import compact, expand


def parts(density=0.3, momentum=0.9):
    model = toy.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
    masking = Masking(model, optimizer, MaskingConfig(density, 10, update_frequency=1))
    x, y = toy.images()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    masking.step()
    return model, optimizer, masking


def content_of(model, optimizer, masking):
    return {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "masking": masking and masking.state_dict(),
        "epoch": 3,
    }


def flat(value, name=""):
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}
    return {name: value}


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_what_is_packed_comes_back(momentum):
    model, optimizer, masking = parts(momentum=momentum)
    content = content_of(model, optimizer, masking)
    before = copy.deepcopy(content)
    again = expand(compact(content, [name for name, _ in model.named_parameters()]))
    one, two, untouched = flat(content), flat(again), flat(before)
    assert list(one) == list(two)
    for name, value in one.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, two[name]), name
        assert same(value, untouched[name]), name


def test_only_what_lives_is_kept():
    model, optimizer, masking = parts()
    packed = compact(
        content_of(model, optimizer, masking), [name for name, _ in model.named_parameters()]
    )
    live = masking.live_counts()
    assert {name: packed["state_dict"][name].numel() for name in live} == live
    momenta = [state["momentum_buffer"].numel() for state in packed["optimizer"]["state"].values()]
    assert momenta == [live["0.weight"], 4, 4, live["5.weight"], 3]
    assert packed["masking"]["masks"]["0.weight"].dtype == torch.uint8
    assert packed["masking"]["masks"]["0.weight"].numel() == (4 * 3 * 9 + 7) // 8


def test_without_masks_nothing_is_packed():
    model, optimizer, _ = parts()
    content = content_of(model, optimizer, None)
    assert compact(content, []).keys() == content.keys()
    assert expand(content) == content


def test_a_sparse_checkpoint_is_a_quarter_of_the_dense_one(run_adv, tmp_path):
    flags = (
        "--dataset digits --width 0.25 --epochs 1 --batch_size 50 --train_subset 100 --test_subset"
        " 20 --train_step 1 --test_step 1".split()
    )
    assert run_adv(*flags, "--save_dir", tmp_path / "dense").code == 0
    assert (
        run_adv(
            *flags, "--save_dir", tmp_path / "fb", "--fb", "--density", 0.2, "--update_frequency", 1
        ).code
        == 0
    )
    (dense,), (sparse,) = (
        (tmp_path / name).glob("*/checkpoint.pth.tar") for name in ("dense", "fb")
    )
    assert sparse.stat().st_size <= 0.25 * dense.stat().st_size
    (plain,) = (tmp_path / "fb").glob("*/model_RA_best.pth.tar")
    weights = torch.load(plain, weights_only=True)["state_dict"]
    assert weights["conv1.weight"].shape == (16, 1, 3, 3)
    evaluated = run_adv("--eval", "--pretrained", sparse)
    assert evaluated.code == 0, evaluated.err
