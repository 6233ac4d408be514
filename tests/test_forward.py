"""Faster execution (bf16, compiled) computes the same network: here on CPUs, in test_cuda.py on
GPUs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import utils.evaluation.scores
import utils.training.stage
import utils.training.testing
from data import Augmentation, TrainLoader
from models import build_model
from tests import toy
from tests.test_attacks import L2, LINF, oracle_network
from tests.test_resume import METHODS
from tests.toy import only_run
from utils.attacks import PGD, attack_draws, pgd_attack
from utils.evaluation.scores import EVAL_BATCH, evaluate
from utils.execution.forward import Execution, Forward
from utils.execution.hardware import best_precision
from utils.storage.checkpoint import load_checkpoint
from utils.storage.run_folder import read_epochs, read_summary
from utils.training.engine import sgd, train_step

ATTACK = PGD(8 / 255, 2 / 255, 3)
BF16 = Execution("bf16")
COMPILED = Execution(compile=True)


def network():
    return build_model("resnet18", 3, width=0.125).to(memory_format=torch.channels_last).train()


def batches(size=16, steps=3):
    return TrainLoader(toy.split(size * steps), size, Augmentation(1), seed=1).epoch(0)


def stepped(execution, model, size=16, steps=3):
    """Losses of ``steps`` steps, and the model and optimizer after them."""
    optimizer = sgd(model, lr=0.05, momentum=0.9, weight_decay=5e-4)
    forward = Forward(model, execution, [size])
    options = {
        "attack": ATTACK,
        "attack_training": True,
        "key": (1, "attack", 0),
        "forward": forward,
    }
    losses = [
        train_step(model, optimizer, batch, **options)[0].item() for batch in batches(size, steps)
    ]
    return torch.tensor(losses), model, optimizer


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_chosen_where_the_hardware_has_it(monkeypatch, supported):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert best_precision(torch.device("cpu")) == ("bf16" if supported else "float32")


def test_float32_is_the_network_itself():
    model, (x, _) = network().eval(), toy.images(8)
    assert torch.equal(Forward(model)(x), model(x))
    with pytest.raises(ValueError, match="unknown precision"):
        Execution("half")


def test_bf16_keeps_weights_statistics_and_losses_in_float32():
    (plain, _, _), (fast, other, optimizer) = (
        stepped(Execution(), network()),
        stepped(BF16, network()),
    )
    assert torch.allclose(plain[0], fast[0], rtol=0.03)
    # differences add up over three steps from random weights
    assert torch.allclose(plain, fast, rtol=0.15)
    assert not torch.equal(plain, fast)
    tensors = [
        *other.state_dict().values(),
        *(p.grad for p in other.parameters()),
        *(s["momentum_buffer"] for s in optimizer.state.values()),
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}
    assert Forward(other, BF16)(toy.images(4)[0]).dtype == torch.float32


def test_bf16_measures_the_same_statistics():
    """After one step: later ones depend on the order of sums, and so on the number of threads."""
    before, after = (
        stepped(execution, network(), steps=1)[1].state_dict() for execution in (Execution(), BF16)
    )
    for name in [name.removesuffix("_var") for name in before if name.endswith("running_var")]:
        deviation = before[f"{name}_var"].sqrt()  # the scale of the comparison
        assert ((before[f"{name}_mean"] - after[f"{name}_mean"]).abs() / deviation).median() < 0.01
        assert ((deviation - after[f"{name}_var"].sqrt()).abs() / deviation).median() < 0.01


def test_bf16_attacks_are_attacks():
    """In the ball, with nearly all steps alike, and as strong on the float32 network."""
    model = network().eval()
    x, y = toy.images(32)
    attack = PGD(8 / 255, 2 / 255, 10)
    draws = attack_draws(attack, torch.arange(32), x.shape[1:], 1)
    plain = pgd_attack(model, x, y, attack, draws=draws)
    fast = Forward(model, BF16).attack(x, y, attack, training=False, draws=draws)
    assert (fast - x).abs().max() <= attack.eps + 1e-6
    assert ((fast - x).sign() == (plain - x).sign()).float().mean() > 0.9
    clean, one, two = (F.cross_entropy(model(images), y).item() for images in (x, plain, fast))
    assert one > clean
    assert two - clean > 0.95 * (one - clean)


# ---------------------------------------------------------------- compiled


def test_compiled_steps_are_the_same_steps():
    """On a network so small that rounding flips no step of the attack."""
    steps = [
        stepped(execution, toy.network().to(memory_format=torch.channels_last))
        for execution in (Execution(), COMPILED)
    ]
    (plain, model, _), (fast, other, _) = steps
    assert torch.allclose(plain, fast, rtol=1e-5)
    before, after = model.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=1e-4, atol=1e-6) for name in before)


@pytest.mark.parametrize(("attack", "expected"), [(LINF, "adv_linf"), (L2, "adv_l2")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_attacks_equal_the_oracle(attack, expected, dtype, golden):
    arrays = np.load(golden / "pgd.npz")
    x, y = torch.from_numpy(arrays["x"]).to(dtype), torch.from_numpy(arrays["y"]).long()
    forward = Forward(oracle_network(arrays).to(dtype), COMPILED, [len(x)])
    adversarial = forward.attack(x, y, attack, training=False, draws=None)
    close = (adversarial - torch.from_numpy(arrays[expected])).abs() <= 1e-5
    assert close.double().mean() >= 0.999


@pytest.fixture
def compiled_graphs(monkeypatch):
    """torch.compile without code generation: lists the input shape of every graph that it would
    compile."""
    graphs, original = [], torch.compile

    def backend(graph, inputs):
        graphs.append(tuple(inputs[-1].shape))
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda module, dynamic: original(module, dynamic=dynamic, backend=backend)
    )
    yield graphs
    torch.compiler.reset()


@pytest.mark.parametrize("channels", [1, 3])
def test_all_that_an_epoch_needs_is_compiled_before_it(compiled_graphs, channels):
    """On a network that, unlike ``nn.Sequential``, has no length; one-channel images come with two
    kinds of strides."""
    mean = (0.5,) * channels
    model = (
        build_model("resnet18", 3, width=0.0625, mean=mean, std=mean)
        .to(memory_format=torch.channels_last)
        .train()
    )
    forward = Forward(model, COMPILED, [16, EVAL_BATCH])
    loader = TrainLoader(toy.split(32, channels=channels), 16, Augmentation(1), seed=1)
    assert forward.prepare(next(iter(loader.epoch(0))).x, True, True, EVAL_BATCH).startswith(
        "compiled in "
    )
    assert len(compiled_graphs) == 4  # an attack's step and an update; a test, clean and attacked
    options = {
        "attack": ATTACK,
        "attack_training": True,
        "key": (1, "attack", 0),
        "forward": forward,
    }
    optimizer = sgd(model, lr=0.05, momentum=0.9, weight_decay=5e-4)
    for batch in loader.epoch(1):
        train_step(model, optimizer, batch, **options)
    evaluate(model, toy.split(EVAL_BATCH + 3, channels=channels), ATTACK, forward=forward)
    assert len(compiled_graphs) == 4


def test_updates_of_channels_compile_nothing_anew(compiled_graphs, run_adv, tmp_path):
    """The counts of each group stay the same, and so do shapes."""
    common = [*toy.TOY_RUN, "--structure", "channel", "--channel_multiple", 1, "--compile", "on"]
    counts = []
    for method in (["--fix"], ["--fb", "--update_frequency", 2]):
        compiled_graphs.clear()
        torch.compiler.reset()
        done = run_adv(*common, *method, "--save_dir", tmp_path / method[0])
        assert done.code == 0, done.err
        counts.append(len(compiled_graphs))
    assert counts[0] == counts[1] > 0
    (root,) = (tmp_path / "--fb").iterdir()
    assert load_checkpoint(root / "checkpoint.pth.tar")["masking"]["steps"] >= 4


class Counting:
    """Stands in for torch.compile: counts calls and computes without compiling."""

    def __init__(self, fails=False):
        self.calls, self.fails = 0, fails

    def __call__(self, module, dynamic):
        def call(x):
            self.calls += 1
            if self.fails:
                raise RuntimeError("no C++ compiler found. There is none")
            return module(x)

        return call


def test_odd_batches_are_not_compiled_for(monkeypatch):
    count = Counting()
    monkeypatch.setattr(torch, "compile", count)
    forward = Forward(network(), COMPILED, [16])
    assert (forward(toy.images(16)[0]).shape, count.calls) == ((16, 3), 1)
    assert (forward(toy.images(7)[0]).shape, count.calls) == ((7, 3), 1)
    Forward(network(), Execution(), [16])(toy.images(16)[0])
    assert count.calls == 1


@pytest.mark.parametrize(("flops", "compile"), [(1e12, False), (9e14, False), (1.1e15, True)])
def test_compiling_is_for_long_trainings(flops, compile):
    device = torch.device("cpu")
    assert Execution(compile=None).for_training(flops, device) == Execution(compile=compile)
    assert Execution("bf16", compile=None).for_training(flops, torch.device("meta")) == Execution(
        "bf16"
    )
    for asked in (True, False):
        assert Execution(compile=asked).for_training(flops, device).compile is asked


@pytest.mark.parametrize("fails", [False, True])
def test_preparing_leaves_everything_as_it_was(monkeypatch, fails):
    count = Counting(fails)
    monkeypatch.setattr(torch, "compile", count)
    model = network()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    forward = Forward(model, COMPILED, [16])
    said = forward.prepare(next(iter(batches())).x, attacked=True, training=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
    if fails:
        failed = "warning: torch.compile failed (no C++ compiler found)"
        assert said == f"{failed}; continuing without it"
        forward(toy.images(16)[0])
    else:
        assert said.startswith("compiled in ")
    assert count.calls == (1 if fails else 2)


# ---------------------------------------------------------------- in runs


def test_a_run_says_and_keeps_its_precision(run_adv, tmp_path, monkeypatch):
    """Begun in bf16 by ``auto``, it resumes in bf16 where ``auto`` would give float32."""
    flags = [flag for flag in toy.TOY_RUN if flag not in ("--precision", "float32")]
    monkeypatch.setattr("utils.settings.common.best_precision", lambda device: "bf16")
    outcome = run_adv(*flags, "--save_dir", tmp_path)
    assert (outcome.code, "in bf16 on cpu" in outcome.out) == (0, True), outcome.err
    root = only_run(tmp_path).root
    content = load_checkpoint(root / "checkpoint.pth.tar")
    assert content["settings"]["precision"] == "bf16"
    again = run_adv(*flags, "--save_dir", tmp_path, "--precision", "bf16")
    assert (again.code, f"{root} already holds a run" in again.err) == (2, True), (
        "auto and what it means are one run"
    )
    monkeypatch.setattr("utils.settings.common.best_precision", lambda device: "float32")
    found = run_adv(*flags, "--save_dir", tmp_path, "--resume")
    assert (found.code, f"{root} is finished" in found.out) == (0, True), found.err
    grown = run_adv("--resume_dir", root, "--epochs", 3)
    assert (grown.code, "in bf16 on cpu" in grown.out) == (0, True), grown.err
    other = run_adv("--resume_dir", root, "--precision", "float32")
    assert (
        other.code,
        "--precision float32 contradicts the checkpoint, which has bf16" in other.err,
    ) == (2, True)


def test_the_figures_that_end_a_run_are_float32(run_adv, tmp_path, monkeypatch):
    seen, ending, original = set(), [], utils.training.testing.final_scores

    def final(*arguments, **options):
        ending.append(1)
        return original(*arguments, **options)

    class Watching(Forward):
        def _logits(self, module, x):
            hook = self.model.register_forward_pre_hook(
                lambda *_: seen.add((bool(ending), torch.is_autocast_enabled("cpu")))
            )
            try:
                return super()._logits(module, x)
            finally:
                hook.remove()

    monkeypatch.setattr(utils.training.testing, "final_scores", final)
    monkeypatch.setattr(utils.training.stage, "Forward", Watching)
    monkeypatch.setattr(utils.evaluation.scores, "Forward", Watching)
    assert run_adv(*toy.TOY_RUN, "--precision", "bf16", "--save_dir", tmp_path).code == 0
    assert seen == {(False, True), (True, False)}


def test_both_stages_compile_their_network(run_eb, tmp_path, compiled_graphs):
    flags = [
        "--dataset",
        "digits",
        "--width",
        0.0625,
        "--stage1",
        "sgd",
        "--pruning",
        "channel",
        "--density",
        0.5,
        "--compile",
        "on",
    ]
    short = [
        "--epochs1",
        2,
        "--epochs2",
        2,
        "--decreasing_lr",
        "0.5",
        "--train_step",
        1,
        "--test_step",
        1,
    ]
    outcome = run_eb(*flags, *short, "--save_dir", tmp_path)
    assert (
        outcome.code,
        outcome.out.count("compiled in"),
        "continuing without" in outcome.out,
    ) == (0, 2, False), outcome.err
    assert len(compiled_graphs) == 2 + 4  # stage 1 is not attacked


@pytest.mark.parametrize("fails", [False, True])
def test_compiling_is_asked_for_and_may_fail(run_adv, tmp_path, monkeypatch, fails):
    assert run_adv(*toy.TOY_RUN, "--save_dir", tmp_path / "plain").code == 0
    count = Counting(fails)
    monkeypatch.setattr(torch, "compile", count)
    outcome = run_adv(*toy.TOY_RUN, "--compile", "on", "--save_dir", tmp_path / "fast")
    assert outcome.code == 0, outcome.err
    assert ("continuing without it" in outcome.out) == fails
    assert ("compiled in" in outcome.out) != fails
    assert (count.calls > 5) != fails
    first, second = (
        load_checkpoint(only_run(tmp_path / name).checkpoint)["state_dict"]
        for name in ("plain", "fast")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tests_may_be_thinned_out(run_adv, tmp_path):
    """Training is the same; tests are rarer, but always follow the last epoch."""
    assert run_adv(*METHODS["fb"], "--save_dir", tmp_path / "all").code == 0
    outcome = run_adv(
        *METHODS["fb"], "--eval_every", 2, "--test_every", 3, "--save_dir", tmp_path / "some"
    )
    assert outcome.code == 0, outcome.err
    whole, rows = (read_epochs(only_run(tmp_path / name)) for name in ("all", "some"))
    assert [("val_ra" in row, "test_ra" in row) for row in rows] == [
        (False, False),
        (True, False),
        (False, True),
        (True, False),
        (True, True),
    ]
    measured = "val_sa val_ra val_loss test_sa test_ra".split()
    for row, full in zip(rows, whole, strict=True):
        assert {name: row[name] for name in measured if name in row} == {
            name: full[name] for name in measured if name in row
        }
        assert (row["train_loss"], row["layer_densities"], row["updates"]) == (
            full["train_loss"],
            full["layer_densities"],
            full["updates"],
        )
    best = read_summary(only_run(tmp_path / "some"))["best"]["epoch"]
    assert (
        best
        == max((row for row in rows if "val_ra" in row), key=lambda row: row["val_ra"])["epoch"]
    )


def test_flying_bird_plus_must_see_every_epoch(run_adv, tmp_path):
    outcome = run_adv(*METHODS["fbp"], "--eval_every", 2, "--save_dir", tmp_path)
    assert (outcome.code, "--eval_every must stay 1" in outcome.err) == (2, True)
