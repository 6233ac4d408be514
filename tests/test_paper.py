import csv
from pathlib import Path

import pytest

from tests.test_runs import write_run
from utils.report.runs import find_runs, grouped
from utils.report.tables import paper

STORED = Path(__file__).parent.parent / "results" / "paper"


def group(root, method, **flags):
    return grouped(
        find_runs(
            [write_run(root, method, 1, name=f"{method}{len(list(root.iterdir()))}", **flags)]
        )[0]
    )[0][0]


def test_a_row_is_chosen_by_method_and_data(tmp_path):
    for dataset, method, ra in (
        ("cifar10", "dense", 51.10),
        ("cifar100", "rb", 25.54),
        ("tinyimagenet", "fbp", 20.36),
    ):
        assert paper.table1(group(tmp_path, method, dataset=dataset))["ra_best"] == ra


def test_flops_are_unscaled(tmp_path):
    row = paper.table1(group(tmp_path, "dense"))
    assert (row["train_flops"], row["inference_flops"]) == (
        pytest.approx(772.41e17),
        pytest.approx(260.07e9),
    )


def test_other_methods_networks_densities_and_data_have_none(tmp_path):
    for method, flags in (
        ("static", {}),
        ("rb-channel", {}),
        ("fb", {"density": 0.1}),
        ("fb", {"arch": "vgg16"}),
        ("fb", {"dataset": "digits"}),
    ):
        assert paper.table1(group(tmp_path, method, **flags)) == {}, (method, flags)
    assert paper.table1(group(tmp_path, "fb", width=0.5))["ra_best"] == 51.62
    assert paper.table1(group(tmp_path, "fb", dataset="digits"), "cifar100")["ra_best"] == 26.64
    # the run's own data set takes precedence
    assert paper.table1(group(tmp_path, "fb"), "cifar100")["ra_best"] == 51.62


def test_the_benchmark_has_ten_methods_at_each_sparsity():
    for sparsity in (90, 95, 99):
        rows = paper.benchmark("cifar10", "resnet18", "weights", sparsity)
        assert len(rows) == len({row.method for row in rows}) == 10
    weights = paper.benchmark("cifar10", "resnet18", "weights", 95)
    assert paper.Published("FlyingBird", 77.42, 46.10) in weights
    assert paper.benchmark("cifar100", "resnet18", "weights", 90) == []
    assert paper.benchmark(None, "resnet18", "weights", 90) == []


def test_the_benchmarks_structured_rows_are_apart():
    for sparsity in (50, 75, 90):
        rows = paper.benchmark("cifar10", "resnet18", "channels", sparsity)
        assert {row.method for row in rows} == {"TwinRep", "HARP", "PwoA"}
    assert paper.Published("HARP", None, 42.09) in paper.benchmark(
        "cifar10", "resnet18", "channels", 75
    )


def test_the_papers_own_set_up_differs_in_nothing(tmp_path):
    for method in ("dense", "fb", "fbp", "rb"):
        assert paper.differences(group(tmp_path, method), "cifar10") == []


def test_differences_in_plain_words(tmp_path):
    run = group(
        tmp_path,
        "fb",
        epochs=16,
        decreasing_lr="0.5,0.75",
        test_step=50,
        train_randinit=False,
        attack_mode="eval",
    )
    assert paper.differences(run, "cifar100") == [
        "data set cifar10",
        "classes 10 (paper: 100)",
        "no random start in training (paper: on)",
        "attacked in eval mode (paper: the usual)",
        "PGD-50 tests (paper: 20)",
        "16 epochs (paper: 200)",
    ]
    milestones = group(tmp_path, "fb", epochs=16, decreasing_lr="8,14")
    assert "learning rate falls at epochs 8,14 (paper: 100,150)" in paper.differences(
        milestones, "cifar10"
    )


def test_the_stored_tables_are_whole():
    counts = {
        name: len(list(csv.DictReader((STORED / name).open())))
        for name in ("table1.csv", "adversarial_pruning_benchmark.csv")
    }
    assert counts == {"table1.csv": 12, "adversarial_pruning_benchmark.csv": 69}
    text = (STORED / "README.md").read_text()
    assert all(name in text for name in (*counts, "arXiv 2202.09844", "arXiv 2409.01249"))
