import importlib
import json
import subprocess
import sys

import pytest
import torch

from models import build_model
from models.flops import layer_costs, real_inference
from utils.errors import InputError, RunError
from utils.execution import cuda_graph
from utils.execution.forward import Execution, Forward
from utils.execution.hardware import best_precision


@pytest.mark.long  # a timing, reliable only on an idle machine
def test_masks_cost_little_beside_a_step():
    """The targets of benchmarks/parts.py: applying the masks takes at most 3 % of a step, a mask
    update at most two steps."""
    command = [sys.executable, "benchmarks/parts.py", "--quick", "--device", "cpu", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ms = json.loads(result.stdout)["ms"]
    step = ms.pop("training step")
    assert ms.pop("masks on") < 0.03 * step
    updates = [time for name, time in ms.items() if name.startswith("mask update")]
    assert len(updates) == 3
    assert max(updates) < 2 * step


def test_the_step_is_timed_beside_the_papers_loop():
    command = [
        sys.executable,
        "benchmarks/step.py",
        "--quick",
        "--width",
        "0.125",
        "--side",
        "8",
        "--channels",
        "1",
        "--device",
        "cpu",
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    first, second, *others = record["rows"]
    assert (first["name"], first["ratio"]) == ("the paper's loop", 1.0)
    assert second["name"] == "ours: float32, channels-last"
    precision = best_precision(torch.device("cpu"))
    remedies = [f"{precision}, {remedy}" for remedy in ("AWP", "EMA", "TRADES", "N-FGSM")]
    faster = ["+ bf16"] if precision == "bf16" else []
    assert [row["name"] for row in others] == [*faster, *remedies]
    for row in record["rows"]:
        assert row["ratio"] * row["ms"] == pytest.approx(first["ms"])
        assert row["images_per_second"] * row["ms"] == pytest.approx(32_000)
        assert row["share"] > 0
    # Two attack steps (forward, backward) and an update (forward, backward to the images and to the
    # weights): 2 x 2 + 3 inferences.
    assert first["gflops"] * first["ms"] * 1e6 == pytest.approx(
        7 * 32 * real_inference_of_the_network(), rel=1e-9
    )
    assert set(record["ceilings"]) == {f"{name} matrix product" for name in (precision, "float32")}


def real_inference_of_the_network():
    return real_inference(
        layer_costs(
            build_model("resnet18", 10, width=0.125, mean=[0.5], std=[0.5]), torch.Size((1, 8, 8))
        )
    )


@pytest.mark.long
def test_the_parts_of_an_epoch_add_up():
    """The targets hold even with short steps: batches below 2 % of a step, masks below 3 %, a
    checkpoint below 1 % of the epoch."""
    command = [
        sys.executable,
        "benchmarks/parts.py",
        "--quick",
        "--device",
        "cpu",
        "--repeats",
        "3",
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    ms, seconds = record["ms"], record["epoch_seconds"]
    # 45,000 images in batches of 64
    assert seconds["training step"] == pytest.approx(704 * ms["training step"] / 1e3)
    assert seconds["PGD-20 test of a batch"] == pytest.approx(
        (20 + 40) * ms["PGD-20 test of a batch"] / 1e3
    )
    assert ms["batch"] < 0.02 * ms["training step"]
    assert ms["masks on"] < 0.03 * ms["training step"]
    assert seconds["checkpoint"] < 0.01 * sum(seconds.values())


NETWORKS = [
    "dense",
    "Flying Bird, density 0.2",
    "Flying Bird, density 0.1",
    "0.5 of the channels",
    "0.25 of the channels",
]


def test_inference_is_timed_for_every_network_and_engine():
    flags = "--quick --repeats 1 --json".split()
    command = [sys.executable, "benchmarks/inference.py", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert list(record["speed"]) == list(record["bytes"]) == NETWORKS
    for row in record["speed"].values():
        assert sorted(row) == sorted(
            f"{engine} {what}"
            for engine in ("PyTorch", "onnxruntime")
            for what in ("latency", "throughput")
        )
        assert all(value > 0 for value in row.values())
    size = record["bytes"]
    for density, name in ((0.2, NETWORKS[1]), (0.1, NETWORKS[2])):
        # zeros are stored too
        assert size[name]["float32"] == pytest.approx(size["dense"]["float32"], rel=0.01)
        assert size[name]["xz"] < (density + 0.15) * size["dense"]["xz"]
        assert size[name]["checkpoint"] < (density + 0.15) * size["dense"]["checkpoint"]
    for name in NETWORKS[3:]:
        assert size[name]["float32"] < 0.4 * size["dense"]["float32"]


def test_a_network_too_narrow_to_cut_is_one_line():
    command = [sys.executable, "benchmarks/inference.py", "--quick", "--width", "0.125"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --width 0.125 is too narrow: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--quick --arch vgg16", "--side 8: vgg16 cannot take 8x8 images"),
        ("--repeats 0", "--repeats must be at least 1"),
        pytest.param(
            "--device cuda",
            "--device cuda: there is no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU"),
        ),
    ],
)
def test_flags_that_cannot_be_timed_are_one_line(flags, message, monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    timing = importlib.import_module("timing")
    monkeypatch.setattr(sys, "argv", ["channels.py", *flags.split()])
    with pytest.raises(InputError, match=message):
        timing.parse(timing.parser(""))


def test_a_row_named_after_a_graph_must_use_one(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    step, timing = importlib.import_module("step"), importlib.import_module("timing")
    monkeypatch.setattr(
        sys, "argv", "step.py --quick --width 0.0625 --batch_size 2 --device cpu".split()
    )
    options = timing.parse(timing.parser(""))

    def uncaptured(*_):
        raise cuda_graph.UncapturedError("out of memory")

    monkeypatch.setattr(cuda_graph, "may_capture", lambda device: True)
    monkeypatch.setattr("utils.execution.forward.GraphedAttack", uncaptured)
    monkeypatch.setattr(Forward, "_memory", lambda self, device: None)
    once = step._step(options, timing.synthetic(options), Execution())
    with pytest.raises(RunError, match="no CUDA graph of the attack"):
        once()


def test_inference_prints_markdown(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    inference = importlib.import_module("inference")
    rows = {
        name: {f"{engine} latency": 2.0, f"{engine} throughput": 100.0}
        for name in ("dense", "narrow")
        for engine in ("PyTorch",)
    }
    rows = {
        name: {**row, "onnxruntime latency": 1.0, "onnxruntime throughput": 200.0}
        for name, row in rows.items()
    }
    rows["narrow"]["PyTorch latency"], rows["narrow"]["onnxruntime throughput"] = 0.5, 500.0
    assert inference.speed_table(rows, 64).splitlines() == [
        (
            "| network | PyTorch, 1 image | onnxruntime, 1 image | PyTorch, batch 64 | onnxruntime,"
            " batch 64 |"
        ),
        "| --- | ---: | ---: | ---: | ---: |",
        "| dense | 2.00 ms (1.00x) | 1.00 ms (1.00x) | 100 img/s (1.00x) | 200 img/s (1.00x) |",
        "| narrow | 0.50 ms (4.00x) | 1.00 ms (1.00x) | 100 img/s (1.00x) | 500 img/s (2.50x) |",
    ]
    size = {"checkpoint": 8e6, "float32": 4e6, "gzip": 3e6, "xz": 2e6}
    table = inference.size_table({"dense": size, "masked": {**size, "xz": 5e5}}).splitlines()
    assert (
        table[0]
        == "| network | checkpoint to resume from | float32 weights | the same, gzip | the same,"
        " xz |"
    )
    assert table[3].endswith("| 3.00 MB (1.00x smaller) | 0.50 MB (4.00x smaller) |")


def test_channels_cost_less_than_the_dense_network():
    command = [sys.executable, "benchmarks/channels.py", "--quick", "--repeats", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dense, half, _ = json.loads(done.stdout)["rows"]
    assert dense["faster"] == 1
    assert half["fewer FLOPs"] > 3.5
    assert half["network file"] < 0.3
    assert half["update in steps"] > 0
