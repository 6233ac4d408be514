import csv
import io
import json
import math
import re

import pytest

from tests import toy
from tests.test_runs import write_run
from utils.errors import InputError
from utils.report.runs import FinishedRun, Measured, find_runs, grouped
from utils.report.tables import (
    NOTHING,
    Comparison,
    Table,
    benchmark_tables,
    comparison_csv,
    comparison_table,
    evaluation_csv,
    evaluation_table,
    markdown,
    stale_evaluations,
    strong_evaluations,
    summary_table,
)
from utils.training.summary import summary_text


def summary(method="fb", ra=50.0):
    figures = {"test_ra": ra, "test_sa": 80.0, "train_ra": 60.0, "epoch": 3}
    return {
        "method": method,
        "settings": {"sparse_init": "snip"},
        "best": figures,
        "final": {**figures, "test_ra": ra - 5},
        "diff": 5.0,
        "robust_gap": 15.0,
        "density": 0.2,
        "flops": {count: {"inference": 5.7e8, "training": 3.4e16} for count in ("real", "paper")},
    }


def test_the_table_has_a_line_a_run_in_aligned_columns():
    lines = summary_table([summary("dense"), summary("static", 9.5)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("|")[1:4] == [" method        ", " RA best ", " RA final "]
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == "Dense 50.00 45.00 5.00 80.00 80.00 15.00 0.2000 3.4e+16 5.7e+08".split()
    assert "Static (snip)" in lines[3]


def test_the_end_of_a_run_names_every_figure():
    text = summary_text(summary())
    for part in (
        "test RA 50.00",
        "test RA 45.00",
        "Diff. (best - final RA) 5.00",
        "gap 15.00",
        "density 0.2000",
        "real",
        "paper",
    ):
        assert part in text


# ---------------------------------------------------------------- compared with the paper


def groups_in(root):
    return grouped(find_runs([root])[0])[0]


def compared(root, paper_dataset=None):
    return [Comparison.of(group, paper_dataset) for group in groups_in(root)]


def records(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_means_spreads_and_differences_by_hand(tmp_path):
    for seed, ra in ((1, 50.0), (2, 52.0), (3, 54.0)):
        write_run(tmp_path, "fb", seed, ra=ra, flops=seed)
    table = comparison_table(compared(tmp_path))
    ours, paper, difference = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (ours["whose"], ours["seeds"], paper["whose"], difference["whose"]) == (
        "ours",
        "3",
        "paper",
        "ours - paper",
    )
    cells = [
        (line["RA best"], line["SA Diff."], line["robust gap"])
        for line in (ours, paper, difference)
    ]
    assert cells == [
        ("52.00 ± 2.00", "-2.00 ± 0.00", "13.00 ± 2.00"),
        ("51.62", "-2.62", "28.90"),
        ("+0.38", "+0.62", "-15.90"),
    ]
    assert ours["train FLOPs (paper's count)"] == "4.780e+19 ± 2.4e+19"
    assert paper["train FLOPs (paper's count)"] == "2.394e+19"
    assert difference["infer FLOPs (paper's count)"] == f"{160e9 - 80.60e9:+.2e}"
    assert ours["train FLOPs (real count)"] == "6.800e+16 ± 3.4e+16"
    assert (
        paper["train FLOPs (real count)"],
        difference["infer FLOPs (real count)"],
        paper["density"],
    ) == (NOTHING,) * 3
    assert not any("set-up" in note for note in table.notes)


def test_the_csv_parses_back_unrounded(tmp_path):
    for seed, ra in ((1, 50.0), (2, 51.0)):
        write_run(tmp_path, "fb", seed, ra=ra)
    write_run(tmp_path, "static", 4)
    fb, static = records(comparison_csv(compared(tmp_path)))
    assert (fb["method"], fb["seeds"], fb["asked_density"], fb["paper_dataset"]) == (
        "fb",
        "1 2",
        "0.2",
        "cifar10",
    )
    assert float(fb["ra_best"]) == 50.5
    assert float(fb["ra_best_spread"]) == pytest.approx(0.5**0.5)
    assert float(fb["ra_best_paper"]) == 51.62
    assert float(fb["ra_best_difference"]) == pytest.approx(-1.12)
    assert float(fb["inference_flops_paper_count_paper"]) == pytest.approx(80.6e9)
    assert (float(fb["train_flops_paper_count"]), float(fb["train_flops_real_count"])) == (
        239e17,
        3.4e16,
    )
    assert [
        static[name]
        for name in ("ra_best_spread", "ra_best_paper", "ra_best_difference", "paper_dataset")
    ] == [""] * 4


def test_the_notes_say_where_the_paper_has_no_row_and_what_is_other(tmp_path):
    common = {"dataset": "imagefolder", "data": "data/birds", "width": 0.5}
    write_run(tmp_path, "dense", 1, epochs=16, decreasing_lr="0.5,0.75", **common)
    write_run(tmp_path, "fb", 1, density=0.1, **common)
    write_run(tmp_path, "fbp", 1, **common)
    table = comparison_table(compared(tmp_path, "cifar10"))
    assert [row[1] for row in table.rows] == [
        "ours",
        "paper",
        "ours - paper",
        "ours",
        "ours",
        "paper",
        "ours - paper",
    ]
    notes = table.notes[2:]
    assert notes == [
        (
            "The paper's rows are of CIFAR-10 and these runs are of other data or scale: Dense;"
            " Flying Bird+."
        ),
        "The paper's table has no row for: Flying Bird.",
        (
            "All runs differ from the paper's set-up: data set imagefolder birds; width factor 0.5"
            " (paper: 1)."
        ),
        "Beyond that, Dense: 16 epochs (paper: 200).",
    ]
    # without --paper there is nothing to compare with
    assert len(comparison_table(compared(tmp_path)).rows) == 3


def test_markdown_keeps_its_columns_whatever_is_in_a_cell():
    text = markdown(
        Table(
            "a title",
            ("method", "whose", "RA"),
            [["a|b\nc", "ours", "1.00"]],
            ["a note"],
            marked=frozenset({0}),
        )
    )
    assert text.splitlines()[4] == r"| **a\|b c** | **ours** | **1.00** |"
    assert text.endswith("- a note\n")


# ---------------------------------------------------------------- strong evaluations


def write_evaluation(run, name="a", **changed):
    content = {
        "checkpoint": "model_RA_best.pth.tar",
        "attack": "autoattack",
        "title": "AutoAttack",
        "norm": "linf",
        "eps": 8.0,
    }
    content |= {
        "images": {"test": 1000},
        "test_sa": 80.0,
        "test_ra": 44.0,
        "train_ra": None,
        "robust_gap": None,
        "trials": {},
    }
    (run / "evaluations").mkdir(exist_ok=True)
    (run / "evaluations" / f"{name}.json").write_text(json.dumps(content | changed))


def test_strong_evaluations_are_means_over_seeds_by_checkpoint_and_attack(tmp_path):
    for seed, ra in ((1, 43.0), (2, 45.0)):
        run = write_run(tmp_path, "fb", seed)
        write_evaluation(run, test_ra=ra)
        write_evaluation(
            run,
            "b",
            checkpoint="checkpoint.pth.tar",
            attack="pgd",
            title="PGD-20 x 5",
            train_ra=60.0,
            robust_gap=60 - ra,
        )
        write_evaluation(
            run, "c", attack="masking", title="signs of gradient masking", test_ra=None
        )
    write_evaluation(run, "d", title="CW-20", attack="cw", eps=4)
    found = strong_evaluations(groups_in(tmp_path))
    table = evaluation_table(found)
    assert [row[1:] for row in table.rows] == [
        ["best", "AutoAttack", "linf 8/255", "2", "1000", "80.00 ± 0.00", "44.00 ± 1.41", NOTHING],
        ["best", "CW-20", "linf 4/255", "1", "1000", "80.00", "44.00", NOTHING],
        [
            "final",
            "PGD-20 x 5",
            "linf 8/255",
            "2",
            "1000",
            "80.00 ± 0.00",
            "44.00 ± 0.00",
            "16.00 ± 1.41",
        ],
    ]
    first, *_ = records(evaluation_csv(found))
    assert (first["checkpoint"], first["ra"], first["robust_gap"]) == ("best", "44.0", "")


def test_an_evaluation_of_a_network_that_was_trained_on_is_left_out(tmp_path):
    run = write_run(tmp_path, "fb", 1)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(
        json.dumps({**summary, "weights": {"model_RA_best.pth.tar": "new"}})
    )
    for name, weights in (("a", "new"), ("b", "old")):
        write_evaluation(
            run, name, title=name, network={"weights": weights, "epoch": 1, "val_ra": 40.0}
        )
    write_evaluation(run, "c", title="from before networks were named")
    groups = groups_in(tmp_path)
    assert [found.title for found in strong_evaluations(groups)] == [
        "a",
        "from before networks were named",
    ]
    (note,) = stale_evaluations(groups)
    assert note == (
        f"{run.name}: 1 evaluation(s) left out: their networks have been trained further since."
    )
    assert note in markdown(evaluation_table(strong_evaluations(groups), [note]))


def test_evaluations_that_differ_in_data_or_training_images_are_not_mixed(tmp_path):
    run = write_run(tmp_path, "fb", 1)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "digests": {"test pixels": "own"}}))
    write_evaluation(run, "a", digests={"test pixels": "other"}, test_ra=10.0)
    write_evaluation(run, "b", digests={"test pixels": "own"}, test_ra=20.0)
    write_evaluation(run, "c", test_ra=30.0, images={"test": 1000, "train": 500})
    write_evaluation(run, "d", test_ra=40.0, images={"test": 1000, "train": 500}, when="2026")
    write_evaluation(run, "e", test_ra=50.0, images={"test": 1000, "train": 500}, when="2025")
    write_evaluation(run, "f", digests={"test pixels": "third"}, test_ra=15.0)
    found = strong_evaluations(groups_in(tmp_path))
    assert [(one.title, one.ra.mean) for one in found[:2]] == [
        ("AutoAttack", 20.0),
        ("AutoAttack", 40.0),
    ]
    assert [one.title[:26] for one in found[2:]] == ["AutoAttack on other data ("] * 2
    assert sorted(one.ra.mean for one in found[2:]) == [10.0, 15.0]
    images = [row[5] for row in evaluation_table(found).rows]
    assert images == ["1000 (training: none)", "1000 (training: 500)", "1000", "1000"]


def test_evaluations_say_what_tells_them_apart_and_what_was_warned_of(tmp_path):
    run = write_run(tmp_path, "fb", 1)
    for name, size, ra in (("a", 1.0, 30.0), ("b", 2.0, 20.0)):
        write_evaluation(run, name, title="PGD-20", step_size=size, test_ra=ra)
    for name, weights in (("c", "abcdef01"), ("d", "12345678")):
        title = "transfer from fb/model_RA_best"
        write_evaluation(run, name, title=title, source_weights=weights, warnings=["it is weak"])
    found = strong_evaluations(groups_in(tmp_path))
    table = evaluation_table(found)
    assert [row[2:4] for row in table.rows] == [
        ["PGD-20", "linf 8/255, steps of 1/255"],
        ["PGD-20", "linf 8/255, steps of 2/255"],
        ["transfer from fb/model_RA_best (123456)", "linf 8/255"],
        ["transfer from fb/model_RA_best (abcdef)", "linf 8/255"],
    ]
    assert sum(note.endswith("(abcdef): it is weak.") for note in table.notes) == 1
    sizes = [line.split(",")[6] for line in evaluation_csv(found).splitlines()]
    assert sizes == ["step_size", "1.0", "2.0", "", ""]


def test_runs_that_were_rolled_back_are_named(tmp_path):
    flags = {"train_attack": "n-fgsm", "on_collapse": "rollback"}
    for seed in (1, 2):
        run = write_run(tmp_path, "dense", seed, **flags)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["step_size"] = 6.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = comparison_table(Comparison.all_of(groups_in(tmp_path), None)).notes
    assert (
        sum(note.endswith("rolled back to smaller steps: seed 2 with 6/255.") for note in notes)
        == 1
    )


def test_metrics_that_end_before_the_run_did_are_refused(tmp_path):
    run = FinishedRun.read(write_run(tmp_path, "fb", 1))
    assert run.epochs
    lines = run.paths.metrics.read_text().splitlines(keepends=True)
    run.paths.metrics.write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match=r"metrics\.jsonl ends with epoch \d+ of"):
        _ = FinishedRun.read(run.paths.root).epochs


def test_a_spread_of_what_is_not_finite_is_none():
    assert math.isnan(Measured.of([1.0, math.nan]).spread)


def test_a_file_that_is_no_evaluation_is_named(tmp_path):
    run = write_run(tmp_path, "fb", 1)
    write_evaluation(run, test_sa=None, images={})
    with pytest.raises(InputError, match="not an evaluation"):
        strong_evaluations(groups_in(tmp_path))
    (run / "evaluations" / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json cannot be read"):
        strong_evaluations(groups_in(tmp_path))


def test_autoattack_stands_among_the_benchmark(tmp_path):
    write_evaluation(write_run(tmp_path, "fb", 1, density=0.1), test_ra=46.0)
    # a sparsity that the benchmark does not have
    write_evaluation(write_run(tmp_path, "fb", 1, density=0.2))
    (table,) = benchmark_tables(strong_evaluations(groups_in(tmp_path)), None)
    assert "CIFAR-10, resnet18, 90 % of the weights pruned" in table.title
    assert [row[0] for row in table.rows[:3]] == [
        "FlyingBird",
        "Flying Bird (density 0.1), best",
        "HARP",
    ]
    assert table.marked == {1}
    assert len(table.rows) == 10 + 1
    assert "**Flying Bird (density 0.1), best**" in markdown(table)


def test_channels_stand_among_channels_and_at_the_benchmarks_radius(tmp_path):
    run = write_run(tmp_path, "rb-channel", 1, density=0.5)
    write_evaluation(run, test_ra=43.0, eps=7.905)
    (table,) = benchmark_tables(strong_evaluations(groups_in(tmp_path)), None)
    assert "50 % of the channels pruned" in table.title
    methods = [row[0].split(" (")[0] for row in table.rows]
    assert methods == ["TwinRep", "PwoA", "Robust Bird, channels, best", "HARP"]
    by_name = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert {row["eps"] for row in by_name.values()} == {"0.031"}
    assert by_name["HARP"]["clean accuracy"] == NOTHING


def test_the_benchmark_needs_its_ball_and_its_data(tmp_path):
    other = write_run(tmp_path, "fb", 1, density=0.1, dataset="digits")
    write_evaluation(other)
    write_evaluation(write_run(tmp_path, "fbp", 1, density=0.1), eps=4.0)
    found = strong_evaluations(groups_in(tmp_path))
    assert benchmark_tables(found, None) == []
    (table,) = benchmark_tables(found, "cifar10")
    assert any("other data or scale" in note for note in table.notes)


# ---------------------------------------------------------------- the script


@pytest.fixture
def report(monkeypatch, capsys):
    return toy.Command("report", monkeypatch, capsys)


def test_the_script_makes_a_table_and_a_picture(report, run_adv, tmp_path):
    for flags in ([], ["--fb", *toy.TOY_MASKS]):
        assert run_adv(*toy.TOY_RUN, "--save_dir", tmp_path / "runs", *flags).code == 0
    result = report(*(tmp_path / "runs").iterdir(), "--figure", tmp_path / "f.png")
    assert result.code == 0, result.err
    assert [line.split("|")[1].strip() for line in result.out.splitlines()[2:4]] == [
        "Dense",
        "Flying Bird",
    ]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_refuses_what_is_no_run(report, tmp_path):
    for argument in (tmp_path, tmp_path / "nowhere"):
        result = report(argument)
        assert result.code == 2
        assert len(result.err.strip().splitlines()) == 1


def test_a_toy_report_of_two_seeds(report, run_adv, tmp_path):
    for flags in ([], ["--fbp", "--dynamic_epoch", "1", *toy.TOY_MASKS]):
        for seed in (1, 2):
            assert (
                run_adv(*toy.TOY_RUN, "--save_dir", tmp_path / "runs", "--seed", seed, *flags).code
                == 0
            )
    result = report(tmp_path / "runs", "--out", tmp_path / "out", "--paper", "cifar10")
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == f"page: {tmp_path / 'out' / 'index.html'}"
    assert (tmp_path / "out" / "table.md").read_text() in result.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    stems = ("curves", "sparsity", "gaps", "layer_densities_2_fbp")
    pictures = [f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf", "svg")]
    assert names == {"table.md", "table.csv", "index.html", *pictures}
    dense, fbp = records((tmp_path / "out" / "table.csv").read_text())
    stored = [
        json.loads(path.read_text()) for path in (tmp_path / "runs").glob("dense*/summary.json")
    ]
    assert float(dense["ra_final"]) == pytest.approx(sum(s["final"]["test_ra"] for s in stored) / 2)
    # the toy runs have density 0.3, the paper's 0.2
    assert (dense["seeds"], dense["ra_best_paper"], fbp["ra_best_paper"]) == ("1 2", "51.1", "")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_lines_that_are_not_comparable_are_told_apart(report, tmp_path):
    for name, eps in (("a", 8.0), ("b", 32.0)):
        write_run(tmp_path, "dense", 1, name=name, train_eps=eps)
    lines = report(tmp_path).out.splitlines()
    at = lines.index("The lines differ in their settings:")
    assert [line.split(": ")[1] for line in lines[at + 1 :]] == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    ]
    assert all(
        re.match(rf"  {n}  Dense \(.*{eps}.*\): ", lines[at + n]) for n, eps in ((1, 8), (2, 32))
    )
    write_run(tmp_path, "fb", 1, name="c")
    assert "differ in their settings" not in report(tmp_path / "a", tmp_path / "c").out


def test_several_seeds_are_compared_on_the_terminal_too(report, tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "fb", seed)
    write_run(tmp_path, "fb", 3, name="cut", finished=False)
    result = report(tmp_path)
    assert "50.00 ± 0.00" in result.out
    assert result.err == "note: left out, as they are not finished: cut\n"


def test_the_script_refuses_where_it_cannot_write_and_what_has_no_effect(report, tmp_path):
    run = write_run(tmp_path / "runs", "fb", 1)
    (tmp_path / "file").write_text("")
    for arguments, words in (
        ([run, "--out", tmp_path / "file" / "out"], "cannot write into"),
        ([run, "--paper", "cifar100"], "has no effect"),
        ([run, "--paper", "digits"], "invalid choice"),
        ([run, "--figure", tmp_path / "c.txt"], "written as PNG"),
    ):
        result = report(*arguments)
        assert (result.code, result.out) == (2, "")
        assert words in result.err
        assert len(result.err.strip().splitlines()) == 1
