"""CUDA graphs without a GPU: like a real one, a fake graph repeats its work and writes into the
outputs of its capture. Its steps must equal plain ones to the bit."""

import contextlib

import pytest
import torch
from torch import nn

from data import Augmentation, TrainLoader
from sparse_core import Masking, MaskingConfig
from tests import toy
from tests.test_resume import FBP, assert_equal
from tests.toy import only_run
from utils.attacks import PGD, attack_draws
from utils.errors import RunError
from utils.evaluation.scores import evaluate
from utils.execution import cuda_graph, forward
from utils.execution.forward import Execution, Forward
from utils.training.engine import sgd, train_step
from utils.training.schedule import set_learning_rate

ATTACK = PGD(8 / 255, 2 / 255, 3)
TEST = PGD(8 / 255, 2 / 255, 2, random_start=False)


class Fakes:
    """Counts of captures, replays and waits."""

    def __init__(self):
        self.captures = self.replays = self.waits = 0
        self.watched = []  # networks and optimizers that a capture must not change


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes()

    class Memory:
        def __init__(self, device):
            self.device = device

        @contextlib.contextmanager
        def beside(self):
            try:
                yield
            finally:
                fakes.waits += 1

    class Captured:
        def __init__(self, work, memory):
            fakes.captures += 1
            self.rates = [group["lr"] for group in self.groups()]
            before = self.state()
            self.work, self.outputs = work, work()
            for value, old in before:
                value.copy_(old)
            self.gradients = [p.grad for p in self.parameters()]

        def groups(self):
            return [group for _, optimizer in fakes.watched for group in optimizer.param_groups]

        def parameters(self):
            return [p for model, _ in fakes.watched for p in model.parameters()]

        def state(self):
            values = [v for model, _ in fakes.watched for v in model.state_dict().values()]
            for _, optimizer in fakes.watched:
                values += [s["momentum_buffer"] for s in optimizer.state.values()]
            return [(value, value.clone()) for value in values]

        def replay(self):
            fakes.replays += 1
            now = [group["lr"] for group in self.groups()]
            for group, rate in zip(self.groups(), self.rates, strict=True):
                group["lr"] = rate  # a graph reads the tensor of its capture
            news = self.work()
            for group, rate in zip(self.groups(), now, strict=True):
                group["lr"] = rate
            for old, new in zip(tensors(self.outputs), tensors(news), strict=True):
                old.copy_(new)
            for parameter, old in zip(self.parameters(), self.gradients, strict=True):
                if old is not None:
                    old.copy_(parameter.grad)

    monkeypatch.setattr(cuda_graph, "may_capture", lambda device: True)
    monkeypatch.setattr(forward, "GraphMemory", Memory)
    monkeypatch.setattr(cuda_graph, "Captured", Captured)
    return fakes


def tensors(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def trained(execution, fakes, *, epochs=3, masked=True):
    """Train a few epochs of 4 batches and a smaller one, with tests in between."""
    model = toy.network().train()
    optimizer = sgd(model, lr=0.1, momentum=0.9, weight_decay=5e-4)
    fakes.watched = [(model, optimizer)]
    config = MaskingConfig(0.3, 40, update_frequency=3, growth="gradient")
    masking = Masking(model, optimizer, config) if masked else None
    loader = TrainLoader(toy.split(70), 16, Augmentation(1), seed=1)
    computed, losses, tests = Forward(model, execution, [16, 20]), [], []
    for epoch in range(epochs):
        for step, batch in enumerate(loader.epoch(epoch)):
            set_learning_rate(optimizer, 0.1 / (1 + step + epoch))
            key = (1, "attack", epoch)
            done = train_step(
                model,
                optimizer,
                batch,
                attack=ATTACK,
                attack_training=True,
                key=key,
                forward=computed,
            )
            losses.append(done.loss)
            if masking is not None:
                masking.step()
            if step == 2:  # between two replays of the training graph
                scores = evaluate(model, toy.split(30, seed=5), TEST, forward=computed)
                tests.append(scores.loss)
                model.train()
    return torch.stack(losses), tests, model.state_dict(), optimizer, computed


@pytest.mark.parametrize("graphs", ["auto", "full"])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_by_graphs_have_the_bits_of_plain_ones(fakes, graphs, masked):
    losses, tests, state, optimizer, plain = trained(
        Execution(graphs="off"), fakes, epochs=4, masked=masked
    )
    assert plain.graphs == fakes.captures == 0
    found = trained(Execution(graphs=graphs), fakes, epochs=4, masked=masked)
    assert found[-1].graphs == fakes.captures
    assert fakes.replays > 8
    assert torch.equal(found[0], losses)
    assert found[1] == tests
    assert all(torch.equal(value, state[name]) for name, value in found[2].items())
    for ours, theirs in zip(found[3].state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    assert isinstance(found[3].param_groups[0]["lr"], float)


def test_graphs_of_several_sizes_and_modes_take_turns(fakes):
    model, other = toy.network(), toy.network()
    ours, plain = Forward(model, Execution(), [8, 12]), Forward(other, Execution(graphs="off"))
    for turn in range(4):
        for n, training in ((8, True), (12, False), (8, False)):
            x, y = toy.images(n, seed=turn)
            draws = attack_draws(ATTACK, torch.arange(n), x.shape[1:], 1, turn)
            found, expected = (
                one.attack(x, y, ATTACK, training=training, draws=draws) for one in (ours, plain)
            )
            assert torch.equal(found, expected)
            for one, two in zip(model.buffers(), other.buffers(), strict=True):
                assert torch.equal(one, two)
            with torch.no_grad():  # in-place changes must take effect
                for parameter in (*model.parameters(), *other.parameters()):
                    parameter.mul_(1.01)
    assert ours.graphs == fakes.captures == 3
    assert fakes.replays == 12


def attacked(model, execution):
    computed = Forward(model, execution, [12])
    x, y = toy.images(12)
    draws = attack_draws(ATTACK, torch.arange(12), x.shape[1:], 1)
    return computed, lambda: computed.attack(x, y, ATTACK, training=True, draws=draws)


def test_too_little_memory_to_warm_up_is_said_and_done_without(fakes, monkeypatch):
    model = toy.network()
    computed, attack = attacked(model, Execution())
    expected = attacked(toy.network(), Execution(graphs="off"))[1]()

    def no_memory(work):
        work()
        raise cuda_graph.UncapturedError("CUDA out of memory")

    monkeypatch.setattr(cuda_graph, "_warm_up", no_memory)
    assert torch.equal(attack(), expected)
    attack()
    assert computed.notes() == [
        "warning: no CUDA graph of the attack (CUDA out of memory); continuing without it"
    ]
    assert computed.notes() == []
    assert (fakes.captures, fakes.waits) == (0, 1)


def test_a_failed_capture_ends_the_run_and_leaves_the_network_as_it_was(fakes, monkeypatch):
    def fails(self, work, memory):
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graph.Captured, "__init__", fails)
    model = toy.network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, attack = attacked(model, Execution())
    with pytest.raises(RunError, match=r"not permitted.*--resume --cuda_graphs off") as raised:
        attack()
    assert "\n" not in str(raised.value)
    assert fakes.waits == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Dropping(nn.Module):
    """Draws on the host, from a generator that no graph captures."""

    def __init__(self):
        super().__init__()
        self.inner = toy.network()

    def forward(self, x):
        return self.inner(x) * torch.rand(())


def test_a_network_that_draws_on_the_host_is_not_captured(fakes):
    computed, attack = attacked(Dropping(), Execution())
    attack()
    (note,) = computed.notes()
    assert "draws on the host" in note
    assert fakes.captures == 0


# ---------------------------------------------------------------- in runs


@pytest.mark.parametrize("graphs", ["auto", "full"])
def test_a_run_by_graphs_is_the_plain_run(run_adv, tmp_path, fakes, monkeypatch, graphs):
    from utils.training import stage

    original = stage.Stage.__init__

    def watching(self, *arguments, **options):
        original(self, *arguments, **options)
        fakes.watched = [(self.model, self.optimizer)]

    monkeypatch.setattr(stage.Stage, "__init__", watching)
    flags = [*toy.TOY_RUN, *FBP, "--epochs", 4, "--ema", 0.9]
    assert run_adv(*flags, "--cuda_graphs", "off", "--save_dir", tmp_path / "plain").code == 0
    assert fakes.captures == 0
    outcome = run_adv(*flags, "--cuda_graphs", graphs, "--save_dir", tmp_path / "graphs")
    assert outcome.code == 0, outcome.err
    assert fakes.replays > 4
    assert_equal(tmp_path / "plain", tmp_path / "graphs")


def test_off_goes_on_after_a_failed_capture(run_adv, tmp_path, fakes, monkeypatch):
    flags = [*toy.TOY_RUN, "--fb", *toy.TOY_MASKS]
    flags += ["--save_dir", tmp_path / "cut"]
    assert run_adv(*flags, "--cuda_graphs", "off").code == 0

    def fails(self, work, memory):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(cuda_graph.Captured, "__init__", fails)
    root = only_run(tmp_path / "cut").root
    outcome = run_adv("--resume_dir", root, "--epochs", 3, "--cuda_graphs", "auto")
    assert outcome.code == 3, outcome.out
    assert "--resume --cuda_graphs off continues without" in outcome.err
    assert "checkpoint.pth.tar (epoch 2)" in outcome.err
    outcome = run_adv("--resume_dir", root, "--epochs", 3, "--cuda_graphs", "off")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--awp", ".01"], "cannot take --awp"),
        (["--fb", "--structure", "channel"], "cannot take --structure channel"),
    ],
)
def test_what_a_whole_graph_cannot_take_is_refused(run_adv, tmp_path, flags, reason):
    outcome = run_adv(*toy.TOY_RUN, *flags, "--cuda_graphs", "full", "--save_dir", tmp_path)
    assert (outcome.code, reason in outcome.err) == (2, True), outcome.err
    assert not list(tmp_path.iterdir())
