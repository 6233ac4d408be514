import dataclasses
import json
import math
import shlex

import pytest

from utils.early_bird import KINDS
from utils.errors import InputError
from utils.report.runs import (
    METHOD_NAMES,
    FinishedRun,
    Measured,
    command_of,
    find_runs,
    grouped,
    lines_by_density,
)
from utils.settings.adversarial import AdversarialSettings
from utils.settings.command_line import parse_settings
from utils.settings.robust_bird import EarlyBirdSettings, TicketSettings

FLAGS = {
    "dense": {},
    "fb": {"fb": True, "dynamic_fre": True},
    "fbp": {"fbp": True, "dynamic_fre": True},
}
FLAGS |= {"static": {"fix": True}, "rb": {}, "rb-channel": {"pruning": "channel"}}


def figures(ra, train_ra=60.0, sa=80.0):
    return {
        "epoch": 2,
        "val_ra": ra,
        "test_ra": ra,
        "test_sa": sa,
        "train_ra": train_ra,
        "robust_gap": train_ra - ra,
    }


def row(epoch, live, stage=None):
    accuracies = dict.fromkeys(("train_ra", "val_ra", "test_ra", "val_sa", "test_sa"), 10.0 * epoch)
    layers = {"conv.weight": live, "linear.weight": live} if live < 1 else {}
    found = {
        "epoch": epoch,
        "density": live,
        "layer_densities": layers,
        "updates": [],
        **accuracies,
    }
    first = {"stage": 1, "mask_distances": [0.3] * (epoch - 1), "ticket": False, "train_sa": 50.0}
    return {**found, **(first if stage == 1 else {} if stage is None else {"stage": stage})}


def write_run(root, method, seed, ra=50.0, live=None, name=None, finished=True, flops=1.0, **flags):
    """Write a made-up run of two epochs: best RA ``ra``, final RA ``ra - 5``, training RA 60, best
    SA 80, final SA 82."""
    kind = EarlyBirdSettings if method.startswith("rb") else AdversarialSettings
    settings = dataclasses.asdict(
        kind(**{"dataset": "cifar10", "seed": seed, **FLAGS[method], **flags})
    )
    live = live or (1.0 if method == "dense" else settings["density"])
    name = name or f"{method}_{seed}_{'_'.join(map(str, flags.values()))}".replace("/", "-")
    folder = root / name
    folder.mkdir(parents=True)
    network = {"image_size": 32, "num_classes": 10}
    versions = {"versions": {"torch": "2"}, "revision": "abc", "hardware": "a machine"}
    images = {"train": 45_000, "val": 5_000, "test": 10_000}
    config = {
        "method": method,
        "settings": settings,
        "network": network,
        "images": images,
        "precision": "float32",
        **versions,
    }
    (folder / "config.json").write_text(json.dumps(config))
    birds = (
        [row(epoch, 1.0, stage=1) for epoch in (1, 2)]
        if method.startswith("rb") and not flags.get("stage1_pretrained")
        else []
    )
    rows = [*birds, *(row(epoch, live, 2 if method.startswith("rb") else None) for epoch in (1, 2))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    summary = {
        "method": method,
        "run": name,
        "settings": settings,
        "best": figures(ra),
        "final": figures(ra - 5, sa=82.0),
        "diff": 5.0,
        "robust_gap": 65.0 - ra,
        "density": live,
        "flops": {
            "real": {"inference": 5.7e8 * flops, "training": 3.4e16 * flops},
            "paper": {"inference": 80e9 * flops, "training": 239e17 * flops},
        },
        "seconds": 7200.0,
    }
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def labels(root):
    return [group.label for group in grouped(find_runs([root])[0])[0]]


def test_the_spread_is_the_sample_standard_deviation():
    assert Measured.of([1.0, 2.0, 6.0]) == Measured(3.0, math.sqrt((4 + 1 + 9) / 2), 3)
    assert Measured.of([4.0]) == Measured(4.0, None, 1)


def test_runs_that_differ_only_in_the_seed_are_a_group(tmp_path):
    for seed in (3, 1, 2):
        write_run(
            tmp_path,
            "fb",
            seed,
            save_dir=f"somewhere{seed}",
            decreasing_lr="0.5,0.75" if seed == 2 else "100,150",
        )
    write_run(tmp_path, "fb", 1, growth="gradient")
    write_run(tmp_path, "dense", 1, test_every=5)
    groups, notes = grouped(find_runs([tmp_path])[0])
    assert [(group.label, group.seeds) for group in groups] == [
        ("Dense", [1]),
        ("Flying Bird (growth gradient)", [1]),
        ("Flying Bird (growth random)", [1, 2, 3]),
    ]
    assert not notes


def test_labels_say_what_tells_the_groups_of_a_method_apart(tmp_path):
    write_run(tmp_path, "fb", 1, density=0.1, epochs=100, decreasing_lr="0.5,0.75")
    write_run(tmp_path, "fb", 1, density=0.05, epochs=200, decreasing_lr="0.5,0.75")
    write_run(tmp_path, "rb", 1)
    write_run(tmp_path, "rb-channel", 1, density=0.5)
    assert labels(tmp_path) == [
        "Robust Bird",
        "Robust Bird, channels",
        "Flying Bird (density 0.05, 200 epochs)",
        "Flying Bird (density 0.1, 100 epochs)",
    ]


def test_of_many_differences_a_label_says_those_that_suffice(tmp_path):
    for density in (0.1, 0.2):
        write_run(
            tmp_path, "fb", 1, dataset="digits", width=0.5, lr=0.2, batch_size=64, density=density
        )
        write_run(tmp_path, "fb", 1, density=density)
    write_run(tmp_path, "fbp", 1, epochs=250, batch_size=64)
    assert sorted(labels(tmp_path)) == [
        f"Flying Bird (data set {name}, density {d})"
        for name in ("cifar10", "digits")
        for d in (0.1, 0.2)
    ] + ["Flying Bird+ (data set cifar10, width factor 1)"]


def test_labels_say_the_scale_where_it_differs_anywhere(tmp_path):
    write_run(tmp_path, "dense", 1, width=0.5)
    write_run(tmp_path, "fb", 1, width=0.25)
    assert labels(tmp_path) == ["Dense (width factor 0.5)", "Flying Bird (width factor 0.25)"]


def add_config(root, **facts):
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, **facts}))


def test_a_data_set_is_its_content(tmp_path):
    for seed, data, content in ((1, "a/birds", "x"), (2, "b/vogels", "x"), (3, "b/birds", "y")):
        write_run(tmp_path, "dense", seed, dataset="imagefolder", data=data, name=str(seed))
        add_config(tmp_path / str(seed), digests={"test pixels": content})
    groups, _ = grouped(find_runs([tmp_path])[0])
    assert [group.seeds for group in groups] == [[1, 2], [3]]
    told = [group.label.removeprefix("Dense (images of birds ") for group in groups]
    assert [len(text) for text in told] == [9, 9], (
        "eight digits of the digest, as both are called birds"
    )
    assert told[0] != told[1]


def test_of_older_image_folders_only_the_names_are_known(tmp_path):
    for data in ("a/birds", "b/birds", "a/fish"):
        write_run(tmp_path, "dense", 1 if data[0] == "a" else 2, dataset="imagefolder", data=data)
    assert sorted(labels(tmp_path)) == ["Dense (images of birds)", "Dense (images of fish)"]


def test_precision_and_processes_keep_runs_apart_and_versions_are_said(tmp_path):
    entry = {"processes": 1, "versions": {"torch": "2.13.0"}}
    facts = [
        {"precision": "bf16", "made_by": [entry]},
        {"precision": "bf16", "made_by": [{**entry, "versions": {"torch": "2.11.0"}}]},
        {"precision": "float32", "made_by": [entry]},
        {"precision": "bf16", "made_by": [{**entry, "processes": 4}, entry]},
        {"precision": "bf16", "processes": 4},
    ]
    for seed, fact in enumerate(facts, 1):
        write_run(tmp_path, "fb", seed, name=str(seed))
        add_config(tmp_path / str(seed), **fact)
    groups, notes = grouped(find_runs([tmp_path])[0])
    assert [(group.seeds, group.label) for group in groups] == [
        ([1, 2], "Flying Bird (trained in bf16, in 1 process(es))"),
        ([3], "Flying Bird (trained in float32, in 1 process(es))"),
        ([4], "Flying Bird (trained in bf16, in 4, 1 process(es))"),
        ([5], "Flying Bird (trained in bf16, in 4 process(es))"),
    ]
    assert notes == [
        "Flying Bird (trained in bf16, in 1 process(es)): trained by torch 2.11.0 and 2.13.0"
    ]


def test_of_a_seed_the_first_run_counts_and_the_other_is_named(tmp_path):
    write_run(tmp_path, "fb", 1, name="a")
    write_run(tmp_path, "fb", 1, name="b")
    (group,), (note,) = grouped(find_runs([tmp_path / "a", tmp_path / "b", tmp_path / "a"])[0])
    assert group.seeds == [1]
    assert str(tmp_path / "b") in note


def test_a_folder_of_runs_stands_for_its_finished_ones(tmp_path):
    write_run(tmp_path, "fb", 1)
    write_run(tmp_path, "dense", 1)
    write_run(tmp_path, "fb", 2, name="cut", finished=False)
    (tmp_path / "logs").mkdir()
    runs, (note,) = find_runs([tmp_path])
    assert [run.method for run in runs] == ["dense", "fb"]
    assert "cut" in note
    with pytest.raises(InputError, match=r"no summary\.json"):
        find_runs([tmp_path / "cut"])
    with pytest.raises(InputError, match=r"no summary\.json"):
        find_runs([tmp_path / "logs"])
    write_run(tmp_path / "cuts", "fb", 2, name="cut", finished=False)
    with pytest.raises(InputError, match="no finished run"):
        find_runs([tmp_path / "cuts"])


def test_a_summary_without_method_or_settings_is_refused(tmp_path):
    folder = write_run(tmp_path, "fb", 1)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "method": "unheard of"}))
    with pytest.raises(InputError, match="unknown method"):
        FinishedRun.read(folder)
    (folder / "summary.json").write_text(json.dumps(summary))
    for settings in ({"density": 7.0}, {"density": "much"}, None):
        (folder / "summary.json").write_text(json.dumps({**summary, "settings": settings}))
        with pytest.raises(InputError, match="does not hold the settings"):
            grouped([FinishedRun.read(folder)])


def test_lines_by_density_begin_with_the_dense_run_of_their_scale(tmp_path):
    for density in (0.05, 0.2, 0.1):
        write_run(tmp_path, "fb", 1, density=density)
    write_run(tmp_path, "fbp", 1, width=0.5, live=0.15)
    write_run(tmp_path, "dense", 1)
    groups, _ = grouped(find_runs([tmp_path])[0])
    (fb, line), (fbp, alone) = lines_by_density(groups)
    assert (fb, fbp) == ("Flying Bird (width factor 1)", "Flying Bird+ (width factor 0.5)")
    assert [group.density for group in line] == [1.0, 0.2, 0.1, 0.05]
    assert [group.method for group in alone] == ["fbp"]


def test_a_line_begins_with_the_dense_run_that_is_most_like_it(tmp_path):
    for awp in (0.01, 0.0):
        for method in ("dense", "fb"):
            write_run(tmp_path, method, 1, awp=awp)
    groups, _ = grouped(find_runs([tmp_path])[0])
    for _, (dense, sparse) in lines_by_density(groups):
        assert dense.settings.awp == sparse.settings.awp


@pytest.mark.parametrize(
    "line",
    [
        "--fb --structure channel",
        "--fb --structure channel --density 0.2 --death_rate 0.5",
        "--fb --structure channel --flops 0.3",
        "--fix --structure channel",
        "--fb --density 0.1",
        "--fix --sparse_init erk",
    ],
)
def test_the_command_of_a_run_trains_it_again(tmp_path, line):
    asked = parse_settings(
        AdversarialSettings, f"--dataset digits {line}".split(), "", lambda given: {}
    )
    folder = write_run(tmp_path, "fb", 1)
    summary = json.loads((folder / "summary.json").read_text())
    summary["settings"] = dataclasses.asdict(asked)
    (folder / "summary.json").write_text(json.dumps(summary))
    words = shlex.split(command_of(FinishedRun.read(folder)))[2:]
    assert parse_settings(AdversarialSettings, words, "", lambda given: {}) == asked


def test_every_method_has_a_name():
    methods = {
        AdversarialSettings(**flags, structure=structure).method
        for flags in ({}, {"fb": True}, {"fbp": True}, {"fix": True})
        for structure in ("weight", "channel")
    }
    methods |= {
        kind(pruning=pruning).method
        for kind in (EarlyBirdSettings, TicketSettings)
        for pruning in KINDS
    }
    assert set(METHOD_NAMES) == methods
