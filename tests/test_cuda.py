"""A GPU must give what a CPU gives; skipped without one. ``benchmarks/gpu.sh`` runs these first."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import Augmentation, Split, TrainLoader
from models import build_model
from sparse_core import Masking, MaskingConfig, mask_hash
from tests import toy
from tests.test_resume import FBP, LONGER, assert_equal, stop_at
from utils.attacks import PGD, attack_draws, pgd_attack
from utils.execution.forward import Execution, Forward
from utils.execution.hardware import full_precision
from utils.training.engine import sgd, train_step

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROOT = Path(__file__).parent.parent
ATTACK = PGD(8 / 255, 2 / 255, 4)


def on_gpu(split):
    device = torch.device("cuda")
    return Split(split.images.to(device), split.labels.to(device), split.indices.to(device), device)


def network():
    return (
        build_model("resnet18", 3, width=0.25).cuda().to(memory_format=torch.channels_last).train()
    )


def stepped(execution, steps=3):
    """Losses of a few steps, and the network after them."""
    model = network()
    optimizer = sgd(model, lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = TrainLoader(on_gpu(toy.split(64 * steps, side=16)), 64, Augmentation(1), seed=1)
    forward = Forward(model, execution, [64])
    losses = []
    for batch in loader.epoch(0):
        loss, *_ = train_step(
            model,
            optimizer,
            batch,
            attack=ATTACK,
            attack_training=True,
            key=(1, "attack", 0),
            forward=forward,
        )
        losses.append(loss.item())
    assert forward.graphs == (execution.graphs != "off")
    assert not forward.notes()
    return torch.tensor(losses), model


@pytest.fixture
def deterministic(monkeypatch):
    """Deterministic kernels, as with ``--deterministic``."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bf16", 0.05)])
def test_a_step_is_that_of_a_cpu(deterministic, precision, tolerance):
    """Without TF32, and without an attack, whose steps flip where a gradient is near zero."""
    found = []
    with full_precision():
        for device in ("cpu", "cuda"):
            model = network().to(device)
            optimizer = sgd(model, lr=0.05, momentum=0.9, weight_decay=5e-4)
            split = toy.split(64, side=16)
            split = on_gpu(split) if device == "cuda" else split
            (batch,) = TrainLoader(split, 64, Augmentation(1), seed=1).epoch(0)
            key, forward = (1, "attack", 0), Forward(model, Execution(precision, graphs="off"))
            done = train_step(
                model, optimizer, batch, attack=None, attack_training=True, key=key, forward=forward
            )
            found.append((done.loss.cpu(), {n: v.cpu() for n, v in model.state_dict().items()}))
    (loss, state), (other_loss, other) = found
    assert torch.allclose(loss, other_loss, rtol=tolerance)
    for name, value in state.items():
        difference = (value.double() - other[name].double()).norm()
        assert difference <= tolerance * value.double().norm().clamp_min(1e-3), name


@pytest.mark.parametrize("graphs", ["auto", "full"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_graph_gives_the_bits_of_eager_steps(deterministic, precision, graphs):
    plain, model = stepped(Execution(precision, graphs="off"), steps=6)
    fast, graphed = stepped(Execution(precision, graphs=graphs), steps=6)
    assert torch.equal(plain, fast)
    for (name, one), two in zip(
        model.state_dict().items(), graphed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-2), ("bf16", 0.1)])
def test_a_compiled_step_is_the_same_step(deterministic, precision, tolerance):
    """Up to rounding, which flips the sign of some gradients in the attack: so a single step."""
    plain, model = stepped(Execution(precision, graphs="off"), steps=1)
    fast, compiled = stepped(Execution(precision, compile=True), steps=1)
    assert torch.allclose(plain, fast, rtol=tolerance)
    for (name, one), two in zip(model.named_buffers(), compiled.buffers(), strict=True):
        if one.is_floating_point():
            assert (one - two).norm() <= tolerance * one.norm(), name
        else:
            assert torch.equal(one, two), name


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_attacks_as_the_plain_attack_does(training):
    model, other = network(), network()
    other.load_state_dict(model.state_dict())
    split = on_gpu(toy.split(64, side=16))
    x, y = split.images.permute(0, 3, 1, 2).float() / 255, split.labels
    graphed, plain = Forward(model, Execution(), [64]), Forward(other, Execution(graphs="off"))
    for epoch in range(3):
        draws = attack_draws(ATTACK, split.indices, x.shape[1:], 1, epoch)
        one = graphed.attack(x, y, ATTACK, training=training, draws=draws).clone()
        two = plain.attack(x, y, ATTACK, training=training, draws=draws)
        # gradients near zero may differ in sign
        assert (one - two).abs().gt(1e-6).float().mean() < 0.02
        assert (one - x).abs().max() <= ATTACK.eps + 1e-6
        with torch.no_grad():  # in-place changes must take effect
            for parameter in [*model.parameters(), *other.parameters()]:
                parameter.mul_(1.01)
            for one_buffer, other_buffer in zip(model.buffers(), other.buffers(), strict=True):
                one_buffer.copy_(
                    other_buffer.mul_(1.1) if other_buffer.is_floating_point() else other_buffer
                )
    assert graphed.graphs == 1


def test_no_step_waits_for_the_device():
    model = network()
    optimizer = sgd(model, lr=0.05, momentum=0.9, weight_decay=5e-4)
    masking = Masking(model, optimizer, MaskingConfig(0.2, 100))
    loader = TrainLoader(on_gpu(toy.split(64 * 6, side=16)), 64, Augmentation(1, flip=True), seed=1)
    forward = Forward(model, Execution("bf16"), [64])
    try:
        for step, batch in enumerate(loader.epoch(0)):
            # the first steps select kernels and capture the graph
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            train_step(
                model,
                optimizer,
                batch,
                attack=ATTACK,
                attack_training=True,
                key=(1, "attack", 0),
                forward=forward,
            )
            masking.step()
        assert forward.graphs == 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_masks_are_those_of_a_cpu():
    """Random draws and ties agree on every device, and so do magnitudes of equal weights."""
    hashes = []
    for device in ("cpu", "cuda"):
        model = build_model("resnet18", 3, width=0.25).to(device)
        masking = Masking(
            model,
            sgd(model, lr=0.1, momentum=0.9, weight_decay=0.0),
            MaskingConfig(0.2, 100, update_frequency=1),
        )
        for _ in range(3):
            masking.step()
        hashes.append(mask_hash(masking.masks))
    assert hashes[0] == hashes[1]


def test_attacks_agree_with_a_cpu():
    model, split = toy.network().double().eval(), toy.split(20)
    x, y = split.images.permute(0, 3, 1, 2).double() / 255, split.labels
    draws = attack_draws(ATTACK, split.indices, x.shape[1:], 1)
    there = pgd_attack(model.cuda(), x.cuda(), y.cuda(), ATTACK, draws=draws.cuda()).cpu()
    assert torch.allclose(pgd_attack(model.cpu(), x, y, ATTACK, draws=draws), there, atol=1e-9)


def test_images_that_do_not_fit_arrive_as_those_that_do():
    split = toy.split(200, side=16)
    device = torch.device("cuda")
    travelling = Split(split.images, split.labels.to(device), split.indices.to(device), device)
    loaders = [
        TrainLoader(one, 32, Augmentation(1, flip=True), seed=1)
        for one in (on_gpu(split), travelling)
    ]
    for epoch in range(2):
        for one, other in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.y, other.y)
            assert torch.equal(one.indices, other.indices)


def test_one_process_by_nccl_is_the_run_without(tmp_path):
    flags = [*toy.TOY_RUN, "--fb", *toy.TOY_MASKS, "--device", "cuda", "--deterministic"]
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 1".split()
    for name, program in (("alone", []), ("nccl", launcher)):
        command = [sys.executable, *program, "main_adv.py", *flags, "--save_dir", tmp_path / name]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
    assert_equal(tmp_path / "alone", tmp_path / "nccl")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_deterministic_runs_resume_to_the_bit(run_adv, tmp_path, monkeypatch, precision):
    flags = [
        *LONGER,
        *FBP,
        "--test_subset",
        300,
        "--device",
        "cuda",
        "--deterministic",
        "--precision",
        precision,
        "--compile",
        "off",
    ]
    assert run_adv(*flags, "--save_dir", tmp_path / "whole").code == 0
    codes = []
    while not codes or codes[-1] == 75:
        stop_at(monkeypatch, 3)
        codes.append(run_adv(*flags, "--save_dir", tmp_path / "cut", "--resume").code)
        assert len(codes) < 40
    assert codes[-1] == 0
    assert len(codes) > 3
    assert_equal(tmp_path / "whole", tmp_path / "cut")
