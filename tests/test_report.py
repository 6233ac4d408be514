import subprocess
import sys

from tests import toy
from utils.config_adv import AdversarialSettings
from utils.config_rb import EarlyBirdSettings, TicketSettings
from utils.early_bird import KINDS
from utils.report import METHOD_NAMES, compared_curves, mask_distances, summary_table, summary_text, training_curves


def row(epoch, prune=False, grow=False):
    accuracies = dict.fromkeys(("train_ra", "val_ra", "test_ra", "val_sa", "test_sa"), 10.0 * epoch)
    return {"epoch": epoch, **accuracies, "updates": [{"prune": prune, "grow": grow}, {"prune": False, "grow": False}]}


ROWS = [row(1), row(2, prune=True), row(3, prune=True, grow=True), row(4)]


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


def lines_at(axes, colour):
    return [line.get_xdata()[0] for line in axes.lines if line.get_color() == colour]


def test_curves_mark_prune_epochs_black_and_grow_epochs_red():
    (axes,) = training_curves(ROWS, "title").axes
    assert [round(x) for x in lines_at(axes, "black")] == [2, 3]
    assert [round(x) for x in lines_at(axes, "red")] == [3]
    labels = axes.get_legend_handles_labels()[1]
    assert {"training RA", "validation RA", "test RA", "test SA", "prune epoch", "grow epoch"} <= set(labels)
    assert list(axes.lines[0].get_ydata()) == [10, 20, 30, 40]


def stage_rows():
    first = {"train_sa": 10.0, "val_sa": 20.0, "updates": []}
    return [{"stage": 1, "epoch": 1, **first}, {"stage": 1, "epoch": 2, **first}, *({"stage": 2, **r} for r in ROWS)]


def test_two_stages_have_a_panel_each_and_compared_curves_show_the_second():
    one, two = training_curves(stage_rows(), "title").axes
    assert (one.get_title(), two.get_title()) == ("stage 1", "stage 2")
    assert [line.get_label() for line in one.lines] == ["training SA", "validation SA"]
    assert list(one.lines[0].get_xdata()) == [1, 2]
    assert list(two.lines[0].get_ydata()) == [10, 20, 30, 40]
    (axes,) = compared_curves([("Robust Bird", stage_rows())]).axes
    assert list(axes.lines[0].get_ydata()) == [10, 20, 30, 40]


def test_the_mask_distances_are_symmetric_and_the_ticket_is_framed():
    figure = mask_distances([[], [0.3], [0.4, 0.1]], drawn=3, watched=(2, 0.2, True))
    axes = figure.axes[0]
    matrix = axes.images[0].get_array()
    assert matrix.tolist() == [[0.0, 0.3, 0.4], [0.3, 0.0, 0.1], [0.4, 0.1, 0.0]]
    (frame,) = axes.patches
    assert (frame.get_xy(), frame.get_width()) == ((1.5, 1.5), 2)
    assert "ticket after epoch 3" in axes.get_title()
    late = mask_distances([[], [0.3]], drawn=2, watched=(5, 0.2, False))
    assert "no ticket, drawn after epoch 2" in late.axes[0].get_title()
    assert not mask_distances([[]], drawn=None, watched=(5, 0.2, False)).axes[0].patches
    unwatched = mask_distances([[], [0.3]], drawn=2, watched=None).axes[0]
    assert unwatched.get_title() == "masks of stage 1, drawn after epoch 2"
    assert not unwatched.patches


def test_curves_skip_epochs_that_have_no_such_figure():
    rows = [{"epoch": 1, "val_sa": 1.0, "updates": []}, {"epoch": 2, "val_sa": 2.0, "val_ra": 3.0, "updates": []}]
    (axes,) = training_curves(rows, "title").axes
    assert [line.get_label() for line in axes.lines] == ["validation RA", "validation SA"]


def test_compared_curves_have_a_panel_a_run():
    figure = compared_curves([("Dense", ROWS[:1]), ("Flying Bird+", ROWS)])
    assert [axes.get_title() for axes in figure.axes] == ["Dense", "Flying Bird+"]
    five = compared_curves([(str(number), ROWS) for number in range(5)])
    assert [axes.get_title() for axes in five.axes] == list("01234")
    assert [bool(axes.get_ylabel()) for axes in five.axes] == [True, False, False, True, False]


def test_the_table_has_a_line_a_run_in_aligned_columns():
    lines = summary_table([summary("dense"), summary("static", 9.5)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("|")[1:4] == [" method        ", " RA best ", " RA final "]
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == "Dense 50.00 45.00 5.00 80.00 80.00 15.00 0.2000 3.4e+16 5.7e+08".split()
    assert "Static (snip)" in lines[3]


def test_the_end_of_a_run_names_every_figure():
    text = summary_text(summary())
    for part in ("test RA 50.00", "test RA 45.00", "Diff. (best - final RA) 5.00", "gap 15.00", "density 0.2000", "real", "paper"):
        assert part in text


def test_every_method_has_a_name():
    methods = {AdversarialSettings(**flags).method for flags in ({}, {"fb": True}, {"fbp": True}, {"fix": True})}
    methods |= {kind(pruning=pruning).method for kind in (EarlyBirdSettings, TicketSettings) for pruning in KINDS}
    assert set(METHOD_NAMES) == methods


def test_the_script_makes_a_table_and_a_picture(run_adv, tmp_path):
    for flags in ([], ["--fb", *toy.TOY_MASKS]):
        assert run_adv(*toy.TOY_RUN, "--save_dir", tmp_path / "runs", *flags).code == 0
    command = [sys.executable, "scripts/report.py", *map(str, (tmp_path / "runs").iterdir()), "--figure", str(tmp_path / "f.png")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line.split("|")[1].strip() for line in result.stdout.splitlines()[2:4]] == ["Dense", "Flying Bird"]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_refuses_what_is_no_run(tmp_path):
    for argument in (tmp_path, tmp_path / "nowhere"):
        result = subprocess.run([sys.executable, "scripts/report.py", str(argument)], capture_output=True, text=True)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1
