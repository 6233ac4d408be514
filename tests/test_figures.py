import pytest

from tests.test_runs import write_run
from utils.report.figures import (
    compared_curves,
    gap_bars,
    layer_densities,
    ra_against_sparsity,
    report_pictures,
)
from utils.report.runs import find_runs, grouped, lines_by_density
from utils.storage.files import write_figure
from utils.training.curves import mask_distances, training_curves


def row(epoch, prune=False, grow=False):
    accuracies = dict.fromkeys(("train_ra", "val_ra", "test_ra", "val_sa", "test_sa"), 10.0 * epoch)
    return {
        "epoch": epoch,
        **accuracies,
        "updates": [{"prune": prune, "grow": grow}, {"prune": False, "grow": False}],
    }


ROWS = [row(1), row(2, prune=True), row(3, prune=True, grow=True), row(4)]


def lines_at(axes, colour):
    return [line.get_xdata()[0] for line in axes.lines if line.get_color() == colour]


def test_curves_mark_prune_epochs_black_and_grow_epochs_red():
    (axes,) = training_curves(ROWS, "title").axes
    assert [round(x) for x in lines_at(axes, "black")] == [2, 3]
    assert [round(x) for x in lines_at(axes, "red")] == [3]
    labels = axes.get_legend_handles_labels()[1]
    assert {
        "training RA",
        "validation RA",
        "test RA",
        "test SA",
        "prune epoch",
        "grow epoch",
    } <= set(labels)
    assert list(axes.lines[0].get_ydata()) == [10, 20, 30, 40]


def stage_rows():
    first = {"train_sa": 10.0, "val_sa": 20.0, "updates": []}
    return [
        {"stage": 1, "epoch": 1, **first},
        {"stage": 1, "epoch": 2, **first},
        *({"stage": 2, **r} for r in ROWS),
    ]


def test_two_stages_have_a_panel_each_and_compared_curves_show_the_second():
    one, two = training_curves(stage_rows(), "title").axes
    assert (one.get_title(), two.get_title()) == ("stage 1", "stage 2")
    assert [line.get_label() for line in one.lines] == ["training SA", "validation SA"]
    assert list(one.lines[0].get_xdata()) == [1, 2]
    assert list(two.lines[0].get_ydata()) == [10, 20, 30, 40]
    (axes,) = compared_curves([("Robust Bird", [stage_rows()])]).axes
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
    rows = [
        {"epoch": 1, "val_sa": 1.0, "updates": []},
        {"epoch": 2, "val_sa": 2.0, "val_ra": 3.0, "updates": []},
    ]
    (axes,) = training_curves(rows, "title").axes
    assert [line.get_label() for line in axes.lines] == ["validation RA", "validation SA"]


def test_compared_curves_have_a_panel_a_run():
    figure = compared_curves([("Dense", [ROWS[:1]]), ("Flying Bird+", [ROWS])])
    assert [axes.get_title() for axes in figure.axes] == ["Dense", "Flying Bird+"]
    five = compared_curves([(str(number), [ROWS]) for number in range(5)])
    assert [axes.get_title() for axes in five.axes] == list("01234")
    assert [bool(axes.get_ylabel()) for axes in five.axes] == [True, False, False, True, False]


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_several_seeds_are_a_mean_in_a_band_from_the_lowest_to_the_highest():
    other = [{**line, "test_ra": line["test_ra"] + 6, "updates": []} for line in ROWS]
    # not measured at epoch 4
    third = [{**line, "test_ra": line["test_ra"] + 3} for line in ROWS[:3]]
    figure = compared_curves([("Flying Bird+", [ROWS, other, third])])
    (axes,) = figure.axes
    (line,) = (line for line in axes.lines if line.get_label() == "test RA")
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 3], [13, 23, 33])
    heights = {
        tuple(vertex)
        for path in axes.collections[axes.lines.index(line)].get_paths()
        for vertex in path.vertices
    }
    assert {(1, 10), (1, 16), (3, 30), (3, 36)} <= heights
    assert [round(x) for x in lines_at(axes, "black")] == [2, 3]
    assert {"prune epoch (first seed)", "lowest to highest seed"} <= set(texts(figure.legends[0]))
    assert "lowest to highest seed" not in texts(
        compared_curves([("Flying Bird+", [ROWS])]).legends[0]
    )


@pytest.fixture
def groups(tmp_path):
    for seed, ra in ((1, 40.0), (2, 44.0)):
        write_run(tmp_path, "dense", seed, ra=ra)
        write_run(tmp_path, "fbp", seed, ra=ra + 4, density=0.2, live=0.1)
    write_run(tmp_path, "fbp", 1, ra=50.0, density=0.1)
    return grouped(find_runs([tmp_path])[0])[0]


def test_ra_and_gap_by_sparsity_begin_with_the_dense_network(groups):
    figure = ra_against_sparsity(lines_by_density(groups))
    left, right = figure.axes
    train, test = (
        line
        for line in left.lines
        if len(line.get_xdata()) == 3 and line.get_linestyle() in ("-", "--")
    )
    assert [round(x) for x in test.get_xdata()] == [0, 90, 90]
    assert list(test.get_ydata()) == [42 - 5, 50 - 5, 46 - 5]
    assert list(train.get_ydata()) == [60, 60, 60]
    assert [list(line.get_ydata()) for line in right.lines if line.get_linestyle() == "-"] == [
        [60 - 37, 60 - 45, 60 - 41]
    ]
    assert "Flying Bird+" in texts(figure.legends[0])
    bars = [path.vertices for collection in left.collections for path in collection.get_paths()]
    assert any(b[1, 1] - b[0, 1] == pytest.approx(2 * 8**0.5) for b in bars)  # 35 and 39


def test_the_bars_are_gap_and_diff_by_group(groups):
    (axes,) = gap_bars(groups).axes
    assert [round(bar.get_width(), 6) for bar in axes.patches] == [23, 15, 19, 5, 5, 5]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        group.label for group in groups
    ]


def test_the_density_of_layers_is_a_line_a_layer_and_a_column_an_epoch():
    rows = [
        {
            "epoch": 1,
            "density": 0.4,
            "layer_densities": {"conv.weight": 0.5, "linear.weight": 0.25},
        },
        {"epoch": 2, "density": 0.3, "layer_densities": {"conv.weight": 0.4, "linear.weight": 0.0}},
    ]
    above, below, _ = layer_densities(rows, "Flying Bird+").axes
    assert above.images[0].get_array().tolist() == [[0.5, 0.4], [0.25, 0.0]]
    assert [label.get_text() for label in above.get_yticklabels()] == ["conv", "linear"]
    assert list(below.lines[0].get_ydata()) == [0.4, 0.3]
    assert above.get_title() == "Flying Bird+"


def test_a_report_draws_what_its_groups_give(groups, tmp_path):
    stems = [picture.stem for picture in report_pictures(groups)]
    assert stems == ["curves", "sparsity", "gaps", "layer_densities_2_fbp", "layer_densities_3_fbp"]
    assert [picture.stem for picture in report_pictures(groups[:1])] == ["curves", "gaps"]
    write_run(tmp_path / "birds", "rb", 1)
    write_run(tmp_path / "birds", "rb", 1, stage1_pretrained="dense.pth.tar")
    birds, _ = grouped(find_runs([tmp_path / "birds"])[0])
    (distances,) = (
        picture for picture in report_pictures(birds) if picture.stem.startswith("mask_distances")
    )
    assert (
        distances.figure.axes[0].get_title()
        == "masks of stage 1, window 5, tolerance 0.08, no ticket, drawn after epoch 2"
    )
    assert all(
        picture.caption.endswith(".") and picture.alternative for picture in report_pictures(birds)
    )


def test_a_figure_is_written_in_the_format_of_its_suffix(tmp_path):
    """And with the same bytes each time."""
    for suffix, begins in (
        (".png", b"\x89PNG"),
        (".pdf", b"%PDF"),
        (".svg", b"<?xml"),
        (".PDF", b"%PDF"),
    ):
        first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
        for path in (first, second):
            write_figure(path, training_curves(ROWS, "title"))
        assert first.read_bytes().startswith(begins)
        assert first.read_bytes() == second.read_bytes()
