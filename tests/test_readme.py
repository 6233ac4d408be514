"""Runs the commands of the README and of the pages on recipes, evaluation, deploying and clusters
at toy size, trainings past their first mask update."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data.sources
from tests import toy
from tests.test_data import write_tinyimagenet
from utils.report.tables import summary_table
from utils.storage.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECIPES, EVALUATING, DEPLOYING, CLUSTERS, PRECISION, REPRODUCING = (
    (ROOT / "docs" / f"{name}.md").read_text()
    for name in "recipes evaluation deploying clusters precision reproducing".split()
)


def blocks(language, page):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.S)


def commands(program, page):
    lines = "\n".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0] for line in lines if line.startswith(program)]


BIRD = commands("python Robust-Bird/", README + RECIPES)
TRAINING = commands("python main_adv.py", README + RECIPES)
EVALUATION = commands("python main_adv.py", EVALUATING)


def arguments_of(command):
    return shlex.split(command)[2:]


def smaller(arguments):
    """The arguments for three epochs of a thin network, with a mask update every second step."""
    flags = dict.fromkeys(
        "--epochs --epochs1 --epochs2 --train_subset --batch_size --train_step --test_step"
        " --save_dir --decreasing_lr".split()
    )
    flags |= dict.fromkeys(
        "--width --depth_factor --width_factor --update_frequency --second_frequency"
        " --dynamic_epoch".split()
    )
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in flags:
            kept.append(argument)
        skip = argument in flags
    small = "--epochs 3 --batch_size 15 --train_step 1 --test_step 1 --decreasing_lr 1"
    small += " --depth_factor 10 --width_factor 1" if "wideresnet" in kept else " --width 0.0625"
    small += " --update_frequency 2" if {"--fb", "--fbp"} & set(kept) else ""
    small += " --second_frequency 1" if "--dynamic_fre" in kept else ""
    small += " --dynamic_epoch 1" if "--fbp" in kept else ""
    return kept + small.split()


@pytest.fixture
def toy_data(tmp_path, monkeypatch):
    """Small versions of the commands' data sets: stand-ins for downloads, folders for the rest."""
    rng = np.random.RandomState(0)
    classes = 10
    pixels, labels = rng.randint(0, 256, (60, 32, 32, 3)).astype(np.uint8), np.arange(60) % classes

    class Stored:
        def __init__(self, name):
            self.data = pixels.transpose(0, 3, 1, 2) if name == "SVHN" else pixels
            self.labels = self.targets = labels
            self.classes = [str(c) for c in range(classes)]

    monkeypatch.setattr(data.sources, "_torchvision", lambda name, place, **options: Stored(name))
    monkeypatch.chdir(tmp_path)
    toy.write_image_tree(tmp_path / "data" / "images", side=32)
    write_tinyimagenet(tmp_path / "data" / "tiny-imagenet-200", annotations=True)
    return tmp_path


def test_the_pages_have_their_commands():
    assert len(commands("python", README)) == 4  # the paper's methods
    assert len(TRAINING) == 9
    assert len(BIRD) == 4
    assert len(EVALUATION) == 6 == sum("--eval " in command for command in EVALUATION)


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands(command, run_adv, toy_data):
    outcome = run_adv(*smaller(arguments_of(command)), "--save_dir", "out")
    assert outcome.code == 0, outcome.err
    (run,) = (toy_data / "out").iterdir()
    masking = load_checkpoint(run / "checkpoint.pth.tar")["masking"]
    if {"--fb", "--fbp"} & set(arguments_of(command)):
        assert len(masking["events"]) >= 2
    else:
        assert masking is None or not masking["events"]


@pytest.fixture
def run_bird(run_eb, run_base):
    return {"train_eb.py": run_eb, "train_base.py": run_base}


def smaller_bird(arguments):
    """A ticket after the second epoch at the latest, and a short stage 2."""
    small = smaller(arguments)
    index = small.index("--epochs")
    small[index : index + 2] = (
        ["--epochs2", "3"]
        if "--stage1_pretrained" in arguments
        else ["--epochs1", "2", "--epochs2", "3"]
    )
    # wide enough that a tenth of the weights gives each layer more than one
    return [flag.replace("0.0625", "0.125") for flag in small]


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Folder of runs that several tests share, each trained once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def train_as(store, run_adv, run_eb, toy_data):
    """``train_as("fb")`` puts the run of the recipe with that name into ``experiment/fb/RUN``."""

    def train(name):
        if not (store / name).exists():
            (source,) = [c for c in TRAINING + BIRD if f"--save_dir experiment/{name} " in f"{c} "]
            run, small = (run_eb, smaller_bird) if source in BIRD else (run_adv, smaller)
            outcome = run(*small(arguments_of(source)), "--save_dir", "out")
            assert outcome.code == 0, outcome.err
            next((toy_data / "out").iterdir()).rename(store / name)
            (toy_data / "out").rmdir()
        shutil.copytree(store / name, toy_data / "experiment" / name / "RUN")

    return train


@pytest.mark.parametrize("command", BIRD)
def test_robust_bird_commands(command, run_bird, train_as, toy_data):
    script = Path(shlex.split(command)[1]).name
    if "--stage1_pretrained" in command:
        train_as("rb")
    outcome = run_bird[script](*smaller_bird(arguments_of(command)), "--save_dir", "out")
    assert outcome.code == 0, outcome.err
    assert "pruned: " in outcome.out
    (run,) = (toy_data / "out").iterdir()
    content = load_checkpoint(run / "checkpoint.pth.tar")
    assert ("channels" in content["network"]) == ("channel" in command)
    assert (content["masking"] is None) == ("channel" in command)


@pytest.mark.parametrize("command", EVALUATION)
def test_evaluation_commands(command, run_adv, train_as):
    train_as("fbp")
    if "--source" in command:
        train_as("dense")
    test_alone = any(word in command for word in ("autoattack", "masking", "--source"))
    subsets = ["--test_subset", 10, *([] if test_alone else ["--train_subset", 10])]
    outcome = run_adv(*arguments_of(command), *subsets)
    assert outcome.code == 0, outcome.err
    assert "test RA" in outcome.out


def test_the_command_that_explains(train_as, toy_data, monkeypatch, capsys):
    train_as("fbp")
    (command,) = commands("python scripts/explain.py", EVALUATING)
    outcome = toy.Command("explain", monkeypatch, capsys)(
        *arguments_of(command), "--grid", 3, "--explain_images", 2
    )
    assert outcome.code == 0, outcome.err
    assert (toy_data / "experiment" / "fbp" / "RUN" / "explain" / "landscape.png").exists()


EXPORTS = commands("python scripts/export.py", DEPLOYING)


def test_every_format_is_exported():
    from utils.export import FORMATS

    assert {arguments_of(command)[2] for command in EXPORTS} == set(FORMATS)


@pytest.mark.parametrize("command", EXPORTS)
def test_the_commands_that_export(command, train_as, monkeypatch, capsys):
    train_as("rb-channel" if "rb-channel" in command else "fb")
    outcome = toy.Command("export", monkeypatch, capsys)(*arguments_of(command))
    assert outcome.code == 0, outcome.err
    assert Path(outcome.out.split(": ")[0]).is_file()


def test_the_snippet_that_loads_a_network(train_as, capsys):
    train_as("fb")
    (snippet,) = [block for block in blocks("python", DEPLOYING) if "load_model" in block]
    names = {}
    exec(compile(snippet, "snippet", "exec"), names)
    assert names["model"](torch.rand(5, 3, 32, 32)).shape == (5, 10)
    assert capsys.readouterr().out.startswith("tensor([")


def rows_of(page, heading):
    """The rows of the tables under a heading, as lists of cells."""
    lines = page.split(heading)[1].split("\n## ")[0].splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| ")
    ]


def test_what_is_said_of_inference_is_what_was_measured():
    records = rows_of(
        (ROOT / "benchmarks" / "RECORDS.md").read_text(), "## Which sparsity makes inference faster"
    )
    speed, size = (
        {row[0]: row[1:] for row in half if len(row) == 5} for half in (records[:6], records[6:])
    )
    said = {
        row[0]: row[1:]
        for row in rows_of(DEPLOYING, "## Which sparsity makes inference faster")[1:]
    }
    assert set(said) == set(speed) - {"network"}
    ratios = {
        name: [float(ratio) for ratio in re.findall(r"\((.*?)x\)", " ".join(cells))]
        for name, cells in said.items()
    }
    for name, cells in said.items():
        assert [
            cell.split(" (1.00x)")[0] if name == "dense" else cell for cell in speed[name]
        ] == cells[:4]
        for cell, measured in zip(cells[4:], (size[name][1], size[name][3]), strict=True):
            assert float(cell.split()[0]) == pytest.approx(float(measured.split()[0]), rel=0.02)
    masked, narrow = (
        [ratios[name] for name in ratios if kind in name] for kind in ("density", "channels")
    )
    # Masks: as fast, as large, smaller when compressed. Channels: faster, and smaller either way.
    assert all(0.97 < speed < 1.05 for row in masked for speed in row[:5])
    assert all(row[5] > 3 for row in masked)
    assert all(min(row) > 2.5 for row in narrow)
    (claim,) = re.findall(r"inference is \[([\d.]+)\s+times\]", README)
    assert float(claim) == pytest.approx(min(ratios["0.5 of the channels"][:4]), abs=0.05)


def test_what_is_said_of_channels_is_what_was_measured():
    records = (ROOT / "benchmarks" / "RECORDS.md").read_text()
    (half, quarter) = re.findall(r"\| +\| +\| \.2?5 \| \d+ \| ([\d.]+)x \|", records)[:2]
    (claim,) = re.findall(r"\[([\d.]+)\s+times\]\(docs/channels.md\)", README)
    page = " ".join((ROOT / "docs" / "channels.md").read_text().split())
    assert float(claim) == float(half)
    assert f"is {claim} times as fast as the dense one, with a quarter {quarter} times" in page


def test_what_is_said_of_a_step_is_what_was_measured():
    (claim,) = re.findall(r"\[([\d.]+) times\]\(docs/precision", README)
    records = (ROOT / "benchmarks" / "RECORDS.md").read_text()
    (paper, compiled) = re.findall(
        r"PGD-10, `--repeats 3` \| ([\d,]+) ms .*?, [\d.]+x \| ([\d,]+) ms \(370\)", records
    )[0]
    seconds = [float(ms.replace(",", "")) / 1000 for ms in (paper, compiled)]
    assert seconds[0] / seconds[1] == pytest.approx(float(claim), abs=0.05)
    assert all(f"{second:.1f} s" in " ".join(PRECISION.split()) for second in seconds)


def test_the_scripts_in_the_table_are_those_there():
    named = set(
        re.findall(
            r"\b(\w+\.sh)\b",
            "\n".join(line for line in REPRODUCING.splitlines() if line.startswith("| ")),
        )
    )
    sourcing = {
        path.name for path in (ROOT / "scripts").glob("*.sh") if "/tables.sh" in path.read_text()
    }
    assert named == sourcing


def test_the_loop_for_schedulers_ends_with_a_finished_run(run_adv, tmp_path):
    """The shell repeats the command while it exits on its time limit, until the run is finished."""
    (loop,) = commands("until python main_adv.py", CLUSTERS)
    turns = "python() { echo turn; n=$((n + 1)); [ $n = 3 ] || return 75; }\n"
    result = subprocess.run(["bash", "-c", turns + loop], capture_output=True, text=True)
    assert result.stdout == "turn\n" * 3
    flags = shlex.split(loop.split(";")[0])[3:]
    assert flags[-3:] == ["--time_limit", "55", "--resume"]
    small = "--train_subset 50 --test_subset 20 --time_limit 0.0001"
    arguments = [*smaller(flags), *small.split(), "--save_dir", tmp_path]
    codes = []
    while not codes or codes[-1] == 75:
        outcome = run_adv(*arguments)
        codes.append(outcome.code)
    assert codes[-1] == 0, outcome.err
    assert len(codes) > 2
    (run,) = tmp_path.iterdir()
    assert (run / "summary.json").exists()
    assert load_checkpoint(run / "checkpoint.pth.tar")["masking"]["events"]


def test_the_commands_for_several_processes(tmp_path):
    from utils.settings.command_line import parse_settings
    from utils.settings.robust_bird import EarlyBirdSettings

    here, elsewhere, _ = (shlex.split(c)[3:] for c in commands("torchrun", CLUSTERS))
    assert (here[0], elsewhere[0]) == ("main_adv.py", "Robust-Bird/train_eb.py")
    assert parse_settings(EarlyBirdSettings, elsewhere[1:], "", lambda given: {}).sync_bn
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 main_adv.py"
    command = [sys.executable, *launcher.split()]
    small = [*smaller(here[1:]), *"--train_subset 60 --test_subset 20 --save_dir".split(), tmp_path]
    result = subprocess.run(
        [*command, *small], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.iterdir()
    assert len(load_checkpoint(run / "checkpoint.pth.tar")["masking"]["events"]) >= 2


def test_the_library_snippet_runs(capsys):
    (snippet,) = blocks("python", README)
    exec(compile(snippet, "README.md", "exec"), {})
    density, explored = map(float, capsys.readouterr().out.split())
    assert density == pytest.approx(0.1, abs=1e-4)
    assert explored > density


def test_the_table_is_that_of_the_stored_runs():
    methods = ("dense", "rb", "rb-channel", "fb", "fbp", "fb-channel")
    stored = [
        json.loads((ROOT / "results" / "quickstart" / method / "summary.json").read_text())
        for method in methods
    ]
    assert summary_table(stored) in README
    assert summary_table(stored) in (ROOT / "results" / "quickstart" / "README.md").read_text()


def test_named_scripts_exist():
    for path in re.findall(r"bash (scripts/\S+\.sh)", README):
        assert (ROOT / path).exists(), path


def test_the_quickstart_is_what_its_script_says(run_adv, run_eb, tmp_path, monkeypatch):
    """Its six commands with fewer epochs; the script itself takes minutes."""
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    (common,) = re.findall(r"common=\((.*?)\)", script, flags=re.S)
    tails = re.findall(r"^run (.*)$", script, flags=re.M)
    assert [tail.split()[0] for tail in tails] == [
        "main_adv.py",
        *["Robust-Bird/train_eb.py"] * 2,
        *["main_adv.py"] * 3,
    ]
    monkeypatch.chdir(tmp_path)
    for tail in tails:
        program, *flags = shlex.split(tail + " " + common.replace("$out", "out"))
        for name in ("--epochs", "--epochs1", "--epochs2"):
            if name in flags:
                flags[flags.index(name) + 1] = "4"
        flags[flags.index("--width") + 1] = "0.0625"
        flags += "--train_subset 200 --test_subset 100 --test_step 2".split()
        flags += ["--update_frequency", "2"] if "fb" in tail else []
        outcome = (run_adv if program == "main_adv.py" else run_eb)(*flags)
        assert outcome.code == 0, outcome.err
    assert len(list((tmp_path / "out").iterdir())) == 6
