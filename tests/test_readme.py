"""Every command of the README, and of docs/deploying.md, runs past its first mask update, at toy
size."""

import json
import re
import shlex
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
DEPLOYING = (ROOT / "docs" / "deploying.md").read_text()


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.S)


def commands(program, page=README):
    lines = "\n".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0] for line in lines if line.startswith(program)]


BIRD = commands("python Robust-Bird/")
TRAINING = [c for c in commands("python main_adv.py") if "--eval" not in c]
EVALUATION = [c for c in commands("python main_adv.py") if "--eval" in c]


def arguments_of(command):
    return shlex.split(command)[2:]


def smaller(arguments):
    """The same command on tiny data, two epochs and a thin network; masks move at every second
    step."""
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
    """Every data set of the README's commands, small: stand-ins for downloads, real folders for the
    rest."""
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


def test_the_readme_has_the_papers_commands():
    assert len(TRAINING) == 9
    assert len(BIRD) == 4
    assert len(EVALUATION) == 6


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
    # a tenth of the weights must be more than one a layer
    return [flag.replace("0.0625", "0.125") for flag in small]


@pytest.mark.parametrize("command", BIRD)
def test_robust_bird_commands(command, run_bird, toy_data):
    script = Path(shlex.split(command)[1]).name
    if "--stage1_pretrained" in command:
        first = arguments_of(BIRD[0])
        assert (
            run_bird["train_eb.py"](*smaller_bird(first), "--save_dir", "experiment/rb").code == 0
        )
        (run,) = (toy_data / "experiment" / "rb").iterdir()
        run.rename(run.with_name("RUN"))
    outcome = run_bird[script](*smaller_bird(arguments_of(command)), "--save_dir", "out")
    assert outcome.code == 0, outcome.err
    assert "pruned: " in outcome.out
    (run,) = (toy_data / "out").iterdir()
    content = load_checkpoint(run / "checkpoint.pth.tar")
    assert ("kept" in content["network"]) == ("channel" in command)
    assert (content["masking"] is None) == ("channel" in command)


def test_robust_birds_commands_parse_as_they_stand(monkeypatch):
    from utils.settings.command_line import parse_settings
    from utils.settings.robust_bird import EarlyBirdSettings, TicketSettings

    for command in BIRD:
        kind = TicketSettings if "train_base" in command else EarlyBirdSettings
        assert parse_settings(kind, arguments_of(command), "", lambda given: {}).epochs2 == 200


def train_as(name, run_adv, folder):
    """A small run as the README's recipes leave it, in a folder RUN."""
    source = next(command for command in TRAINING if f"experiment/{name} " in f"{command} ")
    assert run_adv(*smaller(arguments_of(source)), "--save_dir", f"experiment/{name}").code == 0
    (run,) = (folder / "experiment" / name).iterdir()
    run.rename(run.with_name("RUN"))


@pytest.mark.parametrize("command", EVALUATION)
def test_evaluation_commands(command, run_adv, toy_data):
    train_as("fbp", run_adv, toy_data)
    if "--source" in command:
        train_as("dense", run_adv, toy_data)
    test_alone = any(word in command for word in ("autoattack", "masking", "--source"))
    outcome = run_adv(
        *arguments_of(command), "--test_subset", 10, *([] if test_alone else ["--train_subset", 10])
    )
    assert outcome.code == 0, outcome.err
    assert "test RA" in outcome.out


def test_the_command_that_explains(run_adv, toy_data, monkeypatch, capsys):
    train_as("fbp", run_adv, toy_data)
    (command,) = commands("python scripts/explain.py")
    outcome = toy.Command("explain", monkeypatch, capsys)(
        *arguments_of(command), "--grid", 3, "--explain_images", 2
    )
    assert outcome.code == 0, outcome.err
    assert (toy_data / "experiment" / "fbp" / "RUN" / "explain" / "landscape.png").exists()


EXPORTS = commands("python scripts/export.py", DEPLOYING)


def test_every_format_is_exported():
    from utils.export import FORMATS

    assert {arguments_of(command)[2] for command in EXPORTS} == set(FORMATS)
    assert set(commands("python scripts/export.py")) < set(EXPORTS)


@pytest.mark.parametrize("command", EXPORTS)
def test_the_commands_that_export(command, run_adv, run_eb, toy_data, monkeypatch, capsys):
    if "rb-channel" in command:
        (source,) = [command for command in BIRD if "--save_dir experiment/rb-channel" in command]
        assert (
            run_eb(*smaller_bird(arguments_of(source)), "--save_dir", "experiment/rb-channel").code
            == 0
        )
        (run,) = (toy_data / "experiment" / "rb-channel").iterdir()
        run.rename(run.with_name("RUN"))
    else:
        train_as("fb", run_adv, toy_data)
    outcome = toy.Command("export", monkeypatch, capsys)(*arguments_of(command))
    assert outcome.code == 0, outcome.err
    assert Path(outcome.out.split(": ")[0]).is_file()


@pytest.mark.parametrize("page", [README, DEPLOYING], ids=["README.md", "deploying.md"])
def test_the_snippets_that_load_a_network(page, run_adv, toy_data, capsys):
    train_as("fb", run_adv, toy_data)
    (snippet,) = [block for block in blocks("python", page) if "load_model" in block]
    names = {}
    exec(compile(snippet, "snippet", "exec"), names)
    assert names["model"](torch.rand(5, 3, 32, 32)).shape == (5, 10)
    assert capsys.readouterr().out.startswith("tensor([" if page == DEPLOYING else "")


def rows_of(page, heading):
    """The cells of the tables under a heading, by the first of each line."""
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
    masked, slim = (
        [ratios[name] for name in ratios if kind in name] for kind in ("density", "channels")
    )
    # Masks: as fast, as large, smaller when compressed. Channels: faster, and smaller either way.
    assert all(0.97 < speed < 1.03 for row in masked for speed in row[:5])
    assert all(row[5] > 3 for row in masked)
    assert all(min(row) > 1.9 for row in slim)
    names = {
        "half of the channels": "Robust Bird, channels 0.5",
        "a fifth of the channels": "Robust Bird, channels 0.2",
    }
    names |= {f"density {density}": f"Flying Bird, density {density}" for density in (0.2, 0.1)}
    table = {row[0]: row[1:] for row in rows_of(README, "## Using what was trained")[1:]}
    assert set(table) == set(names)
    for kept, cells in table.items():
        pytorch, onnxruntime, _, size = ratios[names[kept]][2:]
        assert [float(cell.split("x ")[0]) for cell in cells] == pytest.approx(
            [pytorch, onnxruntime, size], abs=0.06
        )


def test_the_scripts_in_the_table_are_those_there():
    named = set(
        re.findall(
            r"`(?:scripts/)?(\w+\.sh)`", README.split("## The paper's tables")[1].split("```")[0]
        )
    )
    sourcing = {
        path.name
        for path in (ROOT / "scripts").glob("*.sh")
        if "table_begin" in path.read_text() and path.name != "table.sh"
    }
    assert named == sourcing


def test_the_paper_commands_parse_as_they_stand(run_adv, toy_data, monkeypatch):
    """At full size nothing is trained here; the settings are checked, not the time."""
    from utils.settings.adversarial import AdversarialSettings
    from utils.settings.command_line import parse_settings

    for command in TRAINING:
        assert parse_settings(
            AdversarialSettings, arguments_of(command), "", lambda given: {}
        ).epochs in (12, 200)


def test_the_loop_for_schedulers_ends_with_a_finished_run(tmp_path):
    (loop,) = commands("until python main_adv.py")
    small = (
        "--width 0.0625 --train_subset 50 --test_subset 20 --train_step 1 --test_step 1"
        " --batch_size 25 --save_dir"
    )
    loop = loop.replace(
        "python main_adv.py", f"echo turn; {sys.executable} main_adv.py {small} {tmp_path}", 1
    )
    for long, short in (
        ("--epochs 40", "--epochs 3"),
        ("--update_frequency 8", "--update_frequency 2"),
        ("--time_limit 55", "--time_limit 0.0001"),
    ):
        assert long in loop
        loop = loop.replace(long, short)
    result = subprocess.run(
        ["bash", "-c", loop], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.count("turn") > 1, result.stderr
    assert "stopped by --time_limit" in result.stderr
    (run,) = tmp_path.iterdir()
    assert (run / "summary.json").exists()


def test_the_commands_for_several_processes(tmp_path):
    from utils.settings.command_line import parse_settings
    from utils.settings.robust_bird import EarlyBirdSettings

    here, elsewhere = (shlex.split(command)[3:] for command in commands("torchrun"))
    assert (here[0], elsewhere[0]) == ("main_adv.py", "Robust-Bird/train_eb.py")
    assert parse_settings(EarlyBirdSettings, elsewhere[1:], "", lambda given: {}).sync_bn
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "main_adv.py",
    ]
    small = [
        *smaller(here[1:]),
        "--train_subset",
        "60",
        "--test_subset",
        "20",
        "--save_dir",
        str(tmp_path),
    ]
    result = subprocess.run(
        [*command, *small], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.iterdir()
    assert len(load_checkpoint(run / "checkpoint.pth.tar")["masking"]["events"]) >= 2


def test_the_library_snippet_runs(capsys):
    (snippet,) = [block for block in blocks("python") if "Masking" in block]
    exec(compile(snippet, "README.md", "exec"), {})
    density, explored = map(float, capsys.readouterr().out.split())
    assert density == pytest.approx(0.1, abs=1e-4)
    assert explored > density


def test_the_table_is_that_of_the_stored_runs():
    methods = ("dense", "rb", "rb-channel", "fb", "fbp")
    stored = [
        json.loads((ROOT / "results" / "quickstart" / method / "summary.json").read_text())
        for method in methods
    ]
    assert summary_table(stored) in README
    assert summary_table(stored) in (ROOT / "results" / "quickstart" / "README.md").read_text()


def test_named_files_exist():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(
        r"bash (scripts/\S+\.sh)", README
    ):
        assert (ROOT / path).exists(), path


def test_the_quickstart_is_what_its_script_says(run_adv, run_eb, tmp_path, monkeypatch):
    """Its five commands, with the epochs cut; the script itself takes minutes."""
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    (common,) = re.findall(r"common=\((.*?)\)", script, flags=re.S)
    tails = re.findall(r"^run (.*)$", script, flags=re.M)
    assert [tail.split()[0] for tail in tails] == [
        "main_adv.py",
        *["Robust-Bird/train_eb.py"] * 2,
        *["main_adv.py"] * 2,
    ]
    monkeypatch.chdir(tmp_path)
    for tail in tails:
        program, *flags = shlex.split(tail + " " + common.replace("$out", "out"))
        for name in ("--epochs", "--epochs1", "--epochs2"):
            if name in flags:
                flags[flags.index(name) + 1] = "4"
        flags[flags.index("--width") + 1] = "0.0625"
        flags += [
            "--train_subset",
            "200",
            "--test_subset",
            "100",
            "--test_step",
            "2",
            *(["--update_frequency", "2"] if "fb" in tail else []),
        ]
        outcome = (run_adv if program == "main_adv.py" else run_eb)(*flags)
        assert outcome.code == 0, outcome.err
    assert len(list((tmp_path / "out").iterdir())) == 5
