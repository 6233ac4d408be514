"""The shell scripts of tables and figures: their plans, and at toy size their results, interrupted
and resumed, and on a cluster."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import study_table
import tables
import torch

from tests import toy
from utils.errors import InputError
from utils.storage.checkpoint import save_checkpoint

ROOT = Path(__file__).parent.parent
RUNS = {
    "dense": ["dense"],
    "rb": ["rb"],
    "fb": ["fb"],
    "fbp": ["fbp"],
    "table1": ["dense", "rb", "fb", "fbp", "rb-channel"],
    "fig1": ["dense", *["rb", "fb"] * 6],
    "baselines": [*["static"] * 7, "dense"],
    "architectures": ["dense", "rb", "fb", "fbp"] * 2,
    "benchmark": ["rb", "fb", "fbp"] * 6,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five classes of 32x32 images: enough for VGG-16 and for AutoAttack."""
    return toy.write_image_tree(
        tmp_path_factory.mktemp("data") / "images", per_class=(20, 8), side=32, classes=5
    )


@pytest.fixture
def environment(tmp_path):
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMP"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", "OUT": str(tmp_path / "out")}


def script(name, data, environment, *flags, **variables):
    command = ["bash", f"scripts/{name}.sh", str(data), *flags]
    given = {**environment, **{key: str(value) for key, value in variables.items()}}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=900)


def planned(names):
    """Methods of the runs in a plan: the first parts of their folders' names."""
    return [name.split("_")[0] for name in names]


def names_in(plan):
    return [
        line.split()[0]
        for line in plan.splitlines()
        if re.match(r"[a-z-]+_(resnet|vgg|wide)", line)
    ]


@pytest.fixture
def plan_of(monkeypatch, capsys, environment):
    """What a table's script prints with PLAN=1, without the process that it would start."""

    def plan_of(name, *flags, **variables):
        for key, value in {**environment, "PLAN": "1", **variables}.items():
            monkeypatch.setenv(key, value)
        result = toy.Command("tables", monkeypatch, capsys)(name, *flags)
        assert result.code == 0, result.err
        assert not Path(environment["OUT"]).exists()
        return result.err

    return plan_of


@pytest.mark.parametrize("name", RUNS)
def test_what_each_script_would_run(name, images, plan_of):
    densities = "0.8 0.6 0.4 0.2 0.1 0.05" if name == "fig1" else ""
    plan = plan_of(name, images, SMOKE="1", DENSITIES=densities)
    expected = RUNS[name] if name != "benchmark" else RUNS[name][:6]  # a single density at toy size
    names = names_in(plan)
    assert planned(names) == expected
    assert len(set(names)) == len(expected)
    if name == "fig1":
        sparse = [
            part for run in names[1:] for part in run.split("_") if re.fullmatch(r"d0\.\d+", part)
        ]
        assert sparse == [
            density for d in "0.8 0.6 0.4 0.2 0.1 0.05".split() for density in [f"d{d}"] * 2
        ]
    if name in ("architectures", "benchmark"):
        assert [run.split("_")[1] for run in names].count("vgg16") == len(expected) / 2
    assert f"{len(expected)} of {len(expected)} runs to train, about" in plan


def test_the_study_sets_sparsity_against_capacity(images, environment, plan_of):
    flags = ["--train_subset", "50", "--image_size", "16"]
    names = names_in(plan_of("study", images, *flags, SMOKE="1", SEEDS="1"))
    assert (
        planned(names)
        == (
            "dense fb fbp dense dense dense fb-channel rb-channel rb static static"
            " dense fb fbp fb dense fb dense fb dense"
        ).split()
    )
    assert len(set(names)) == 20
    some = script("study", images, environment, "--train_subset", "50", PLAN=1, PARTS="small awp")
    assert some.returncode == 0, some.stderr
    assert planned(names_in(some.stderr)) == ["dense", "dense", "dense", "dense", "fb", "fbp"] * 3
    new = {**environment, "OUT": environment["OUT"] + "-new"}
    wrong = script("study", images, new, PLAN=1, PARTS="little")
    assert wrong.returncode == 2
    assert "PARTS are main, small" in wrong.stderr
    assert not Path(new["OUT"]).exists()


def test_the_papers_commands_are_what_a_full_run_asks_for(plan_of):
    """Nothing is shortened unless asked: the run names are those of the README's commands."""
    from data import load_data
    from utils.settings.adversarial import AdversarialSettings
    from utils.settings.applied import placed
    from utils.settings.command_line import parse_settings
    from utils.settings.robust_bird import EarlyBirdSettings

    plan = plan_of("table1", "digits", CHANNELS="0", SEEDS="1 2")
    names = [line.split()[0] for line in plan.splitlines()[:-1]]
    sparse = ["--density", "0.2", "--dynamic_fre"]
    paper = [
        AdversarialSettings,
        [],
        EarlyBirdSettings,
        ["--density", "0.2"],
        AdversarialSettings,
        [*sparse, "--fb"],
        AdversarialSettings,
    ]
    paper.append([*sparse, "--fbp"])
    device = torch.device("cpu")
    digits = load_data("digits")
    expected = [
        placed(
            parse_settings(kind, [*flags, "--seed", seed], "", lambda given: {}), digits, device
        )[1].root.name
        for seed in ("1", "2")
        for kind, flags in zip(paper[::2], paper[1::2], strict=True)
    ]
    assert names == expected


def test_a_table_from_nothing_again_and_after_a_kill(images, environment):
    out = Path(environment["OUT"])
    command = ["bash", "scripts/table1.sh", str(images)]
    given = {**environment, "SMOKE": "1", "JOBS": "2", "EPOCHS": "3", "PAPER": "cifar10"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    while not list(out.glob("*/checkpoint.pth.tar")):
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "report").exists()

    first = script("table1", images, given)
    assert first.returncode == 0, first.stderr
    assert len(list(out.glob("*/summary.json"))) == 5
    assert {path.name for path in (out / "report").iterdir()} >= {
        "table.md",
        "table.csv",
        "index.html",
        "curves.png",
    }
    table = (out / "report" / "table.md").read_text()
    assert "the paper" in table.lower()

    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.pth.tar")}
    again = script("table1", images, given)
    assert "0 of 5 runs to train" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*.pth.tar")} == before


def test_a_failed_run_is_named_and_the_others_go_on(images, environment):
    # The dense run's folder has metrics and no checkpoint, so that run cannot be resumed; Flying
    # Bird's is not affected.
    plan = script("fig1", images, environment, PLAN=1, SMOKE=1, METHODS="fb", DENSITIES="0.5")
    dense = Path(environment["OUT"]) / plan.stderr.split()[0]
    dense.mkdir(parents=True)
    (dense / "metrics.jsonl").write_text("{}\n")
    result = script("fig1", images, environment, SMOKE=1, METHODS="fb", DENSITIES="0.5")
    assert result.returncode == 2
    assert f"2  {dense}" in result.stderr.split("not finished")[1]
    assert len(list(Path(environment["OUT"]).glob("fb_*/summary.json"))) == 1
    assert (Path(environment["OUT"]) / "report" / "index.html").exists()


def test_a_time_limit_stops_the_script_and_the_next_call_goes_on(images, environment):
    cut = script("fb", images, environment, "--time_limit", "0.0001", SMOKE=1)
    assert cut.returncode == 75, cut.stderr
    assert "the same command resumes" in cut.stderr
    assert script("fb", images, environment, SMOKE=1).returncode == 0


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_a_signal_stops_the_script_once_its_runs_have_saved(
    images, environment, number, whole_group
):
    """Ctrl-C reaches every process, ``kill`` the script alone."""
    out, given = Path(environment["OUT"]), {**environment, "SMOKE": "1", "JOBS": "2"}
    command = ["bash", "scripts/table1.sh", str(images), "--train_step", "5"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(out.glob("*/checkpoint.pth.tar")):
        assert process.poll() is None
        time.sleep(0.02)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "the same command resumes" in error
    assert not (out / "report").exists()
    assert subprocess.run(["pgrep", "-f", f"save_dir {out}"], capture_output=True).stdout == b""


def test_the_benchmark_evaluates_what_it_trained(images, environment):
    given = {"ARCHS": "resnet18", "METHODS": "fb", "AA_IMAGES": 6, "PAPER": "cifar10"}
    result = script("benchmark", images, environment, SMOKE=1, **given)
    assert result.returncode == 0, result.stderr
    (found,) = Path(environment["OUT"]).glob("fb_resnet18_*/evaluations/*autoattack*.json")
    assert json.loads(found.read_text())["images"] == {"test": 6}
    assert "AutoAttack" in (Path(environment["OUT"]) / "report" / "evaluations.md").read_text()


@pytest.mark.parametrize(("gpus", "seen"), [("3,5", {"3", "5"}), ("", {"none"})])
def test_runs_side_by_side_share_gpus_or_cores(gpus, seen, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "visible_gpus", lambda: gpus.split(",") if gpus else [])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    note = (
        "import os, sys, time; time.sleep(0.5); e = os.environ.get; open(sys.argv[1], 'w').write("
        "e('CUDA_VISIBLE_DEVICES', 'none') + ' ' + e('OMP_NUM_THREADS', 'none'))"
    )
    names = [str(tmp_path / name) for name in "abcd"]
    assert tables.run_all({name: ["-c", note, name] for name in names}, jobs=2) == []
    found = [Path(name).read_text().split() for name in names]
    assert {gpu for gpu, _ in found} == seen
    assert {threads for _, threads in found} == {"none" if gpus else "4"}


def test_failures_keep_their_exit_codes_and_a_time_limit_starts_nothing_more(tmp_path, capsys):
    ends = {str(code): ["-c", f"raise SystemExit({code})"] for code in (3, 0, 2)}
    killed = {"killed": ["-c", "import os; os.kill(os.getpid(), 9)"]}
    assert tables.run_all(ends | killed, jobs=1) == [(3, "3"), (2, "2"), (137, "killed")]
    later = {"later": ["-c", f"open({str(tmp_path / 'begun')!r}, 'w')"]}
    with pytest.raises(SystemExit, match="75"):
        tables.run_all({"late": ["-c", "raise SystemExit(75)"]} | later, jobs=1)
    assert "75  late" in capsys.readouterr().err
    assert not (tmp_path / "begun").exists()


SBATCH = """#!/usr/bin/env bash
# Does at once what a cluster would do later: a task for each number, in order.
echo "$*" >> "$CALLS"
numbers=0
while [ $# -gt 0 ]; do
    case $1 in
        --array) array=1 numbers=${2%%%*}; shift ;;
        --wrap) wrap=$2; shift ;;
    esac
    shift
done
for number in ${numbers//,/ }; do
    unset SLURM_ARRAY_TASK_ID
    [ -z "${array:-}" ] || export SLURM_ARRAY_TASK_ID=$number
    bash -c "$wrap" >> "$CALLS.out" 2>&1 || exit
done
echo 77
"""


def test_a_cluster_gets_an_array_job_and_a_report(images, environment, tmp_path):
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    given = {
        **environment,
        "PATH": f"{sbatch.parent}:{environment['PATH']}",
        "CALLS": str(tmp_path / "calls"),
    }
    result = script(
        "dense",
        images,
        given,
        "--lr",
        "0.05",
        SLURM=1,
        SMOKE=1,
        SEEDS="1 2",
        JOBS=4,
        SBATCH="--gres=gpu:1 --time=1:00:00",
    )
    assert result.returncode == 0, result.stderr + (tmp_path / "calls.out").read_text()
    array, report = (tmp_path / "calls").read_text().splitlines()
    assert "--array 0,1%4" in array
    assert "--gres=gpu:1 --time=1:00:00" in array
    assert "--dependency afterany:77" in report
    assert len(list(Path(environment["OUT"]).glob("dense_*/summary.json"))) == 2
    assert (Path(environment["OUT"]) / "report" / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "the folder of the data is missing"),
        (["/nowhere"], {}, "DATASET=... says what it is"),
        (
            ["digits"],
            {"SEEDS": "1,2"},
            "SEEDS are numbers with spaces between, as in \"1 2 3\", not '1,2'",
        ),
        (["digits"], {"EPOCHS": "two"}, "EPOCHS is a number"),
        (["digits", "--densty", "2"], {}, "did you mean --density"),
        (["digits"], {"JOBS": "0"}, "JOBS must be at least 1"),
    ],
)
def test_bad_calls_are_one_line(environment, arguments, variables, message):
    command = ["bash", "scripts/fb.sh", *arguments]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not Path(environment["OUT"]).exists()


def test_help_is_what_stands_at_the_top(environment):
    result = subprocess.run(
        ["bash", "scripts/fig1.sh", "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert "Fig. 1" in result.stdout
    assert "JOBS=1" in result.stdout
    assert "tables.sh" not in result.stdout


SHELL = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("*/*.sh")
    if path.stem not in ("tables", "help")
)


@pytest.mark.parametrize("name", SHELL)
def test_help_starts_nothing(name, environment):
    result = subprocess.run(
        ["bash", name, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert f"bash {name}" in result.stdout
    assert "set -" not in result.stdout


def test_a_variable_of_another_name_is_told(plan_of):
    assert "note: " not in plan_of("fb", "digits", SMOKE="1")
    again = plan_of("fb", "digits", SMOKE="1", EPOCH="2")
    assert again.startswith("note: EPOCH is ignored; did you mean EPOCHS?\n")


def test_setting_up_says_what_to_do_next(environment):
    """It does when called by hand; scripts call it with QUIET=1."""
    for quiet, said in (("", "source .venv/bin/activate"), ("1", "")):
        given = {**environment, "QUIET": quiet}
        result = subprocess.run(
            ["bash", "scripts/setup.sh"],
            cwd=ROOT,
            env=given,
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
        assert result.stdout.strip().endswith(said)
        assert bool(result.stdout) == bool(said)


@pytest.mark.parametrize(("name", "argument"), [("setup", "nothing.txt"), ("quickstart", "digits")])
def test_arguments_that_mean_nothing(name, argument, environment):
    result = subprocess.run(
        ["bash", f"scripts/{name}.sh", argument],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert f"'{argument}'" in result.stderr


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_every_script_at_toy_size(name, images, environment):
    start = time.monotonic()
    result = script(name, images, environment, SMOKE=1, JOBS=2)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < 180
    assert (Path(environment["OUT"]) / "report" / "index.html").exists()
    start = time.monotonic()
    assert script(name, images, environment, SMOKE=1, JOBS=2).returncode == 0
    assert time.monotonic() - start < 60


def test_a_speedrun_trains_and_evaluates(environment):
    small = "--width 0.125 --train_subset 200 --update_frequency 2 --channel_multiple 1".split()
    few = ["--test_subset", "10"]  # fewer than AutoAttack takes otherwise
    result = script("speedrun", "digits", environment, *small, *few, NETWORK="channels", EPOCHS=2)
    assert result.returncode == 0, result.stderr
    assert "AutoAttack" in result.stdout
    (run,) = (path for path in Path(environment["OUT"]).iterdir() if path.is_dir())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == "fb-channel"
    settings = summary["settings"]
    assert (settings["train_attack"], settings["lr_schedule"]) == ("n-fgsm", "onecycle")
    assert list((run / "evaluations").glob("*autoattack*.json"))
    for words, variables in (([], {}), (["digits"], {"NETWORK": "large"})):
        wrong = subprocess.run(
            ["bash", "scripts/speedrun.sh", *words],
            cwd=ROOT,
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )
        assert wrong.returncode == 2
        assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{images}"], "link_images.sh takes FOLDER OUT TRAIN TEST"),
        (["{images}", "{out}", "5"], "link_images.sh takes FOLDER OUT TRAIN TEST"),
        (["{images}", "{out}", "5", "many"], "link_images.sh takes FOLDER OUT TRAIN TEST"),
        (["{out}/nowhere", "{out}/links", "5", "2"], "is no folder of images"),
    ],
)
def test_what_cannot_be_linked_is_refused(arguments, reason, images, environment, tmp_path):
    words = [word.format(images=images, out=tmp_path) for word in arguments]
    result = script("link_images", words[0], environment, *words[1:])
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert reason in result.stderr
    assert not list(tmp_path.iterdir())


def test_links_to_other_images_are_not_taken_for_these(images, environment, tmp_path):
    for count, code in (("5", 0), ("5", 0), ("6", 2)):
        result = script("link_images", images, environment, str(tmp_path / "out"), count, "2")
        assert result.returncode == code, result.stderr
    assert "holds links to" in result.stderr
    (tmp_path / "out" / ".linked").unlink()  # as of an older version
    result = script("link_images", images, environment, str(tmp_path / "out"), "5", "2")
    assert result.returncode == 2
    assert len(list((tmp_path / "out" / "train").glob("*/*"))) == 5 * 5


def test_variables_that_turn_nothing_on(monkeypatch):
    for name in ("SMOKE", "PLAN", "SLURM"):
        monkeypatch.setenv(name, "0")
        assert not tables.switch(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert tables.visible_gpus() == []


def test_the_error_of_a_missing_driver_is_no_list_of_gpus(monkeypatch, tmp_path):
    query = tmp_path / "nvidia-smi"
    query.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    query.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert tables.visible_gpus() == []


def test_hidden_files_are_not_linked(images, environment, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    for folder in (tmp_path / "images").glob("*/*"):
        (folder / ".DS_Store").touch()
    out = tmp_path / "out"
    result = script("link_images", tmp_path / "images", environment, str(out), "3", "2")
    assert result.returncode == 0, result.stderr
    assert {len(list(folder.glob("*.png"))) for folder in out.glob("train/*")} == {3}


def test_the_length_of_a_table_leaves_its_recipe_and_shortness_no_late_milestone(monkeypatch):
    def flags(epochs, *extra):
        monkeypatch.setenv("EPOCHS", epochs)
        call = tables.Call("dense", "digits", "digits", "out", 1, extra)
        return tables.command(call, tables.Run("dense", seed="1"))

    assert "0.5,0.75" in flags("100")
    assert "0.5" in flags("2")
    assert "--decreasing_lr" not in flags("1")
    assert "--decreasing_lr" not in flags("100", "--recipe", "modern")
    assert "--decreasing_lr" not in flags("100", "--lr-schedule=cosine")
    assert "0.5,0.75" in flags("100", "--recipe", "paper", "--lr_schedule=step")


def test_an_environment_that_is_ready_needs_no_other_python(environment):
    command = ["bash", "scripts/setup.sh", "requirements-dev.txt"]
    given = {**environment, "PYTHON": "/nowhere/python", "QUIET": "1"}
    assert subprocess.run(command, cwd=ROOT, env=given).returncode == 0


def test_the_page_of_results_is_what_the_summaries_say():
    runs = study_table.read(ROOT / "results" / "study")
    assert study_table.page(ROOT / "results") == (ROOT / "results" / "README.md").read_text()
    assert study_table.main_table(runs).count("\n") == 1 + len(runs)
    folders = {path.parent.name for path in (ROOT / "results" / "study").glob("*/summary.json")}
    assert {f"{name}-s{seed}" for name, seeds in runs.items() for seed in seeds} == folders


def test_the_interval_over_seeds_and_images_covers_both():
    """Of one seed, the standard error of a proportion; equal seeds add none; the seeds' own spread
    shows when all images of a seed agree."""
    one = np.zeros((1, 1000))
    one[:, :200] = 1
    mean, low, high = study_table.bootstrap(one)
    assert mean == pytest.approx(20.0)
    half = 196 * math.sqrt(0.2 * 0.8 / 1000)
    assert (high - mean, mean - low) == (pytest.approx(half, rel=0.1),) * 2
    same = study_table.bootstrap(np.repeat(one, 3, axis=0))
    assert same[1:] == pytest.approx((low, high), abs=0.3)
    assert study_table.bootstrap(np.repeat([[0.0], [1.0]], 50, axis=1)) == (50.0, 0.0, 100.0)


def test_answers_by_image_are_kept_bit_by_bit(tmp_path):
    random = np.random.default_rng(1)
    first = {("dense", seed, "final"): random.random(77) < 0.3 for seed in (1, 2)}
    study_table.keep(first, tmp_path / "answers.npz")
    study_table.keep({("fb", 2, "final"): ~first["dense", 2, "final"]}, tmp_path / "answers.npz")
    found = study_table.stored_answers(tmp_path / "answers.npz")
    assert len(found) == 3
    for key, right in first.items():
        assert np.array_equal(found[key], right)
    # a pair is compared on its common seeds
    pair = study_table.images_table(found).splitlines()[-1].split(" | ")
    difference = 100 * (1 - 2 * first["dense", 2, "final"].mean())
    assert pair[:2] == ["| Flying Bird - Dense", "2"]
    assert pair[3].startswith(f"{difference:+.2f} [")


def evaluated(answers, **changed):
    """Writes the summary of an evaluation whose answers by image these are."""
    name = re.split("_(pgd-20|autoattack)_", answers.name)[0] + ".pth.tar"
    weights = json.loads((answers.parent.parent / "summary.json").read_text())["weights"][name]
    told = {"checkpoint": name, "network": {"weights": weights}, "digests": {}}
    told |= {"norm": "linf", "eps": 8.0, "step_size": 2.0, **changed}
    answers.with_name(answers.name.replace(".pth.tar", ".json")).write_text(json.dumps(told))


def test_answers_are_those_of_the_best_and_the_final_network(tmp_path):
    for name in ("one", "older-two"):
        shutil.copytree(ROOT / "results" / "study" / "dense-s1", tmp_path / name)
        for n, stem in enumerate(("model_RA_best", "checkpoint", "model_SA_best", "model_average")):
            content = {
                "outcomes": {"predicted": {"PGD-20": torch.full((4,), n)}},
                "labels": {"test": torch.arange(4)},
            }
            path = tmp_path / name / "evaluations" / f"{stem}_pgd-20_ab.pth.tar"
            path.parent.mkdir(exist_ok=True)
            save_checkpoint(path, content)
            evaluated(path)
        # another evaluation goes on, and one is of a network that was trained on
        half = path.with_name("checkpoint_pgd-20_half.pth.tar")
        save_checkpoint(half, {"outcomes": {"predicted": {}}, "labels": {"test": torch.arange(4)}})
        older = path.with_name("model_RA_best_pgd-20_old.pth.tar")
        shutil.copy(path, older)
        evaluated(older, network={"weights": "another"})
    found = study_table.answers_in(tmp_path)
    assert {key: list(right).index(True) for key, right in found.items()} == {
        ("dense", 1, "best"): 0,
        ("dense", 1, "final"): 1,
        ("older-dense", 1, "best"): 0,
        ("older-dense", 1, "final"): 1,
    }
    final = path.with_name("checkpoint_pgd-20_ab.pth.tar")
    evaluated(final, norm="l2")
    with pytest.raises(InputError, match="of another ball or other data"):
        study_table.answers_in(tmp_path)
    evaluated(final)
    shutil.copy(final, path.with_name("checkpoint_pgd-20_c.pth.tar"))
    evaluated(path.with_name("checkpoint_pgd-20_c.pth.tar"))
    with pytest.raises(InputError, match="not the only PGD-20 evaluation"):
        study_table.answers_in(tmp_path)


def test_answers_to_autoattack_are_those_that_all_attacks_left(tmp_path):
    shutil.copytree(ROOT / "results" / "study" / "dense-s1", tmp_path / "one")
    path = tmp_path / "one" / "evaluations" / "checkpoint_autoattack_ab.pth.tar"
    path.parent.mkdir()
    predicted = {"clean": [0, 1, 2, 0], "apgd-ce": [0, 0, 2, -1], "square": [0, -1, 1, -1]}
    tensors = {name: torch.tensor(row) for name, row in predicted.items()}
    content = {"outcomes": {"predicted": tensors}, "labels": {"test": torch.arange(4)}}
    save_checkpoint(path, content)
    evaluated(path, step_size=None)
    found = study_table.answers_in(tmp_path, "AutoAttack")
    assert {key: right.tolist() for key, right in found.items()} == {
        ("dense", 1, "final"): [True, False, False, False]
    }
    assert study_table.answers_in(tmp_path) == {}


def test_answers_of_other_images_or_none_are_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "answers.npz"
    with pytest.raises(InputError, match="needs answers"):
        study_table.keep({}, path)
    study_table.keep({("dense", 1, "final"): np.ones(9, bool)}, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="one number of test images"):
        study_table.keep({("fb", 1, "final"): np.ones(8, bool)}, path)
    assert path.read_bytes() == before
    outcome = toy.Command("study_table", monkeypatch, capsys)("--keep_answers")
    assert (outcome.code, outcome.err) == (2, "error: --keep_answers needs a folder\n")


def test_what_is_no_run_of_the_study_is_refused(tmp_path):
    with pytest.raises(InputError, match="no dense run"):
        study_table.read(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(ROOT / "results" / "study" / "dense-s1", tmp_path / name)
    with pytest.raises(InputError, match="there twice"):
        study_table.read(tmp_path)
    summary = tmp_path / "two" / "summary.json"
    summary.write_text(summary.read_text().replace('"width": 0.125', '"width": 0.3'))
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(InputError, match="not of the study"):
        study_table.read(tmp_path)


def test_paired_differences_have_the_interval_of_their_mean():
    """By hand: 1, 2, 3 have mean 2, standard deviation 1 and so 2 +- 4.303 / sqrt(3)."""

    def summary(ra):
        network = {"test_ra": ra, "train_ra": 40.0, "test_sa": 50.0}
        return {"best": network, "final": network, "diff": 0.0, "robust_gap": 40.0 - ra}

    runs = {
        "fb": {seed: summary(20.0 + seed) for seed in (1, 2, 3, 4)},
        "dense": {seed: summary(20.0) for seed in (1, 2, 3)},
    }
    row = study_table.paired_table(runs).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["Flying Bird - Dense", "1, 2, 3", "+1.0, +2.0, +3.0 [-0.5, +4.5]"]
    assert cells[-1] == "-1.0, -2.0, -3.0 [-4.5, +0.5]"
