"""The pages in docs/ hold true: commands, snippets, links, flags and errors. test_readme.py runs
commands at toy size."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data.sources import SOURCES, DataLocation
from models import CUSTOM_ARCHITECTURES, load_model
from sparse_core import GROWTHS
from tests import toy
from tests.test_scripts import RUNS
from tests.toy import TOY_MASKS, TOY_RUN
from utils.export import export
from utils.settings.adversarial import AdversarialSettings
from utils.settings.command_line import parse_settings
from utils.settings.robust_bird import EarlyBirdSettings, TicketSettings
from utils.storage.checkpoint import load_checkpoint
from utils.training.losses import LOSSES

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
]
# Commands that do not train, and the test file that runs them.
RUN_ELSEWHERE = {
    "scripts/report.py": "test_tables.py",
    "scripts/metrics_csv.py": "test_tensorboard.py",
    "scripts/flags.py": "test_docs.py",
    "scripts/export.py": "test_readme.py",
    "scripts/explain.py": "test_readme.py",
    "scripts/submit.py": "test_submit.py",
    "scripts/speedrun.sh": "test_scripts.py",
    "scripts/study.sh": "test_scripts.py",
    "benchmarks/inference.py": "test_benchmarks.py",
    "benchmarks/step.py": "test_benchmarks.py",
    "benchmarks/parts.py": "test_benchmarks.py",
    "benchmarks/gpu.sh": "test_campaign.py",
    "scripts/campaign.sh": "test_campaign.py",
    "scripts/quickstart.sh": "test_scripts.py",
    "scripts/setup.sh": "test_scripts.py",  # every script of a table runs it first
    "scripts/test.sh": None,  # runs this test
    "scripts/precision.sh": None,  # takes 25 minutes; only its --help is tested
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


def command_lines():
    for page in PAGES:
        for block in blocks(page, "bash"):
            marked = "# needs a Slurm" in block and "#!" in block
            for line in block.replace("\\\n", " ").splitlines():
                if line and not line.startswith("#"):
                    yield pytest.param(line, marked, id=f"{page.stem}: {line[:60]}")


def anchor(heading):
    """The anchor of a Markdown heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_there_and_linked_from_the_readme():
    names = (
        "algorithms architecture artifact channels clusters deploying differences evaluation"
        " extending faq flags precision recipes remedies reproducing runs submitting"
    ).split()
    readme = (ROOT / "README.md").read_text()
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} == set(names)
    assert all(f"(docs/{name}.md)" in readme for name in names)


@pytest.mark.parametrize(("line", "job"), command_lines())
def test_commands_are_run_by_a_test_or_parse_as_they_stand(line, job):
    """Full-size training commands are only parsed; the tests of main_adv and Robust Bird train the
    same methods and flags at toy size."""
    command, _, comment = line.partition("  #")
    words = [word for word in shlex.split(command) if word not in ("||", "code=$?")]
    while "=" in words[0] and not words[0].startswith("-"):  # variables before the command
        words.pop(0)
        if not words:
            return
    if words[0] == "torchrun":
        assert "needs" in comment or "digits" in words
        words = ["python", *words[3:]]
    if words[0] == "until":  # test_readme.py runs the loop
        return
    if words[0] == "python" and Path(words[1]).parent.name not in ("scripts", "benchmarks"):
        kind = {
            "main_adv.py": AdversarialSettings,
            "Robust-Bird/train_eb.py": EarlyBirdSettings,
            "Robust-Bird/train_base.py": TicketSettings,
        }[words[1]]
        stored = {"epochs": 200} if "--resume_dir" in words else {}
        settings = parse_settings(kind, words[2:], "", lambda given: stored)
        assert settings.deterministic <= ("needs a GPU" in comment)
    elif words[0] in ("python", "bash"):
        assert (ROOT / words[1]).exists()
        assert words[1] in RUN_ELSEWHERE or Path(words[1]).stem in RUNS
    else:
        # a cluster job, or TensorBoard's server, whose files test_tensorboard.py reads
        assert job or words[0] == "tensorboard"


def test_each_test_file_names_the_command_that_it_runs():
    for command, test in RUN_ELSEWHERE.items():
        if test is not None:
            assert Path(command).stem in (ROOT / "tests" / test).read_text()


def test_scripts_are_whole():
    for page in PAGES:
        for script in blocks(page, "bash"):
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for command in re.findall(
        r"`bash (scripts/\w+\.sh) \S+`", (ROOT / "docs" / "reproducing.md").read_text()
    ):
        assert Path(command).stem in RUNS


def test_the_map_of_the_code_has_every_folder():
    told = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path.parent.relative_to(ROOT) for path in (ROOT / "utils").glob("*/__init__.py")]
    shared = [path.name for path in (ROOT / "utils").glob("*.py") if path.stem != "__init__"]
    assert [name for name in [*(f"{room}/" for room in rooms), *shared] if name not in told] == []


def test_links_lead_somewhere():
    for page in [*ROOT.glob("results/**/README.md"), *PAGES]:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
            path, _, section = target.partition("#")
            assert (page.parent / path).exists(), f"{page.name}: {target}"
            if section:
                headings = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), flags=re.M)
                assert section in map(anchor, headings), f"{page.name}: {target}"


# ---------------------------------------------------------------- extending


@pytest.fixture
def own_script(monkeypatch, tmp_path, capsys):
    """Runs a snippet of docs/extending.md as a script and removes what it registered."""

    def run(part, *arguments):
        (snippet,) = [s for s in blocks(ROOT / "docs" / "extending.md", "python") if part in s]
        monkeypatch.setattr(
            sys, "argv", ["mine.py", *map(str, arguments), "--save_dir", str(tmp_path / "out")]
        )
        with pytest.raises(SystemExit) as left:
            exec(compile(snippet, "mine.py", "exec"), {"__name__": "__main__"})
        assert left.value.code == 0, capsys.readouterr().err
        (folder,) = (tmp_path / "out").iterdir()
        return load_checkpoint(folder / "checkpoint.pth.tar")

    kept = [
        (registry, dict(registry)) for registry in (SOURCES, CUSTOM_ARCHITECTURES, GROWTHS, LOSSES)
    ]
    yield run
    for registry, content in kept:
        registry.clear()
        registry.update(content)


def small_run(*without):
    return (
        [*TOY_RUN[2:], "--fb", *TOY_MASKS]
        if "--dataset" in without
        else [*TOY_RUN, "--fb", *TOY_MASKS]
    )


def test_a_data_set_of_ones_own(own_script, tmp_path):
    rng = np.random.RandomState(0)
    for part, n in (("train", 120), ("test", 60)):
        np.savez(
            tmp_path / f"{part}.npz",
            images=rng.randint(0, 256, (n, 8, 8, 3)).astype(np.uint8),
            labels=np.arange(n) % 3,
        )
    content = own_script(
        "SOURCES[", "--dataset", "arrays", "--data", tmp_path, *small_run("--dataset")
    )
    assert content["network"]["num_classes"] == 3
    assert len(content["masking"]["events"]) >= 2


def test_a_loss_of_ones_own(own_script):
    content = own_script("LOSSES[", "--train_loss", "mart", "--awp", ".005", *small_run())
    assert content["settings"]["train_loss"] == "mart"
    assert len(content["masking"]["events"]) >= 2


def test_a_data_set_of_ones_own_that_is_not_there(own_script, run_adv, tmp_path):
    (snippet,) = [s for s in blocks(ROOT / "docs" / "extending.md", "python") if "SOURCES[" in s]
    exec(compile(snippet, "mine.py", "exec"), {"__name__": "mine"})
    outcome = run_adv("--dataset", "arrays", "--data", tmp_path, "--save_dir", tmp_path / "out")
    assert (outcome.code, f"cannot read arrays in {tmp_path} ([Errno 2]" in outcome.err) == (
        2,
        True,
    ), outcome.err


def test_a_network_of_ones_own(own_script, run_eb, tmp_path):
    flags_without_width = [flag for flag in small_run() if flag not in ("--width", "0.0625")]
    content = own_script("CUSTOM_ARCHITECTURES[", "--arch", "plain", *flags_without_width)
    assert content["network"]["arch"] == "plain"
    assert len(content["masking"]["events"]) >= 2
    checkpoint = next((tmp_path / "out").iterdir()) / "checkpoint.pth.tar"
    assert load_model(checkpoint)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    export(checkpoint, "safetensors", tmp_path / "plain.safetensors")
    outcome = run_eb("--arch", "plain", "--width", 2, "--save_dir", tmp_path)
    assert (outcome.code, "size is its own" in outcome.err) == (2, True), outcome.err


def test_channels_of_a_network_of_ones_own(own_script, run_eb, tmp_path):
    flags = [flag for flag in TOY_RUN if flag not in ("--width", "0.0625")]
    by_channels = "--fb --structure channel --growth gradient --update_frequency 2".split()
    content = own_script("CUSTOM_ARCHITECTURES[", "--arch", "plain", *flags, *by_channels)
    assert len(content["masking"]["events"]) >= 2
    assert content["network"]["channels"]["1"] == [content["network"]["channels"]["2"][0], None]
    checkpoint = next((tmp_path / "out").iterdir()) / "checkpoint.pth.tar"
    small = load_model(checkpoint)
    assert small[1].weight.shape[0] == 16
    path, difference = export(checkpoint, "safetensors", tmp_path / "plain.safetensors")
    assert difference == 0
    assert load_model(path)[1].weight.shape[0] == 16
    bird = [*toy.TOY_BIRD, *toy.EASY_TICKET, "--pruning", "channel", "--density", 0.5]
    bird = [flag for flag in bird if flag not in ("--width", "0.0625")]
    outcome = run_eb("--arch", "plain", *bird, "--save_dir", tmp_path / "rb")
    assert outcome.code == 0, outcome.err
    assert "keeps 16 of 32 channels in 1 groups (0.5000), in multiples of 8" in outcome.out


def test_a_growth_rule_of_ones_own(own_script):
    content = own_script("GROWTHS[", "--growth", "quiet", *small_run())
    densities = {event["density"] for event in content["masking"]["events"]}
    assert len(densities) == 1
    assert content["settings"]["growth"] == "quiet"


def test_nothing_of_ones_own_is_known_without_it(run_adv):
    assert "invalid choice: 'plain'" in run_adv("--arch", "plain").err


def test_a_wheel_in_a_project_with_rooms_of_its_own(tmp_path):
    """The tree builds a complete wheel and sdist. With torch alone beside it, the wheel works in a
    project that has its own packages data, models and utils."""
    for needed in ("setuptools", "build", "twine"):
        pytest.importorskip(needed)
    extending = ROOT / "docs" / "extending.md"
    assert "`pip install FOLDER`" in extending.read_text()
    tree, wheels, project = tmp_path / "tree", tmp_path / "wheels", tmp_path / "project"
    for name in ("data", "models", "utils"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("MINE = True")
    for name in ("sparse_core.py", "main_adv.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree)

    def pip(*words):
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
        subprocess.run([*command, "--no-deps", "--no-index"], cwd=tmp_path, check=True)

    def module(name, *words):
        subprocess.run([sys.executable, "-m", name, *words], cwd=tmp_path, check=True)

    module("build", "--no-isolation", "--outdir", wheels, tree)
    module("twine", "check", "--strict", *wheels.iterdir())
    (wheel,), (source,) = wheels.glob("*.whl"), wheels.glob("*.tar.gz")
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.M)[1]
    assert f"-{version}-" in wheel.name
    assert source.name.endswith(f"-{version}.tar.gz")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    modules = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in modules if not name.endswith(".dist-info")} == {"sparse_core.py"}

    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    python = tmp_path / "venv" / "bin" / "python"
    pip("--python", python, "install", wheel)
    (snippet,) = [block for block in blocks(extending, "python") if "prunable=" in block]
    check = "assert data.MINE and models.MINE and utils.MINE\nprint(sparse_core.__file__)"
    (project / "train.py").write_text(
        f"{snippet}\nimport data, models, sparse_core, utils\n{check}"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "train.py"]
    result = subprocess.run(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert Path(result.stdout.splitlines()[-1]) == site / "sparse_core.py"


def test_gradients_are_clipped_by_the_norm_of_live_weights():
    page = blocks(ROOT / "docs" / "extending.md", "python")
    (masked,), (clipped,) = (
        [block for block in page if part in block] for part in ("prunable=", "get_total_norm")
    )
    names = {}
    # before zero_grad() drops them
    look = "gradients = [p.grad.clone() for p in model.parameters()]\nnorm ="
    exec(compile(masked + clipped.replace("norm =", look), "extending.md", "exec"), names)
    assert names["masking"].steps == 1
    everything = torch.nn.utils.get_total_norm(names["gradients"])
    assert 0 < names["norm"] < 0.9 * everything


def test_flying_bird_plus_in_ones_own_loop(tmp_path, monkeypatch, capsys):
    """The snippet adapts its density; interrupted after four epochs, it resumes to the bit."""
    (snippet,) = [
        block
        for block in blocks(ROOT / "docs" / "extending.md", "python")
        if "adaptive=True" in block
    ]
    cut = snippet.replace("range(masking.epoch, epochs)", "range(masking.epoch, 4)")
    assert cut != snippet
    for folder, parts in (("whole", [snippet]), ("cut", [cut, snippet])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        torch.manual_seed(0)
        for part in parts:
            exec(compile(part, "extending.md", "exec"), {})
    whole, resumed = (torch.load(tmp_path / folder / "state.pt") for folder in ("whole", "cut"))
    assert all(
        torch.equal(weight, resumed["model"][name]) for name, weight in whole["model"].items()
    )
    assert whole["masking"]["events"] == resumed["masking"]["events"]
    assert any(event["prune"] or event["grow"] for event in whole["masking"]["events"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[2] != lines[1]


# ---------------------------------------------------------------- flags and errors


def test_the_page_of_flags_is_up_to_date(monkeypatch, capsys):
    outcome = toy.Command("flags", monkeypatch, capsys)()
    assert outcome.out == (ROOT / "docs" / "flags.md").read_text(), (
        "python scripts/flags.py > docs/flags.md"
    )


def test_decoded_images_go_where_the_pages_say():
    place = f"`~/{DataLocation(ROOT).cache_dir.relative_to(Path.home())}`"
    assert place in (ROOT / "docs" / "faq.md").read_text()


def test_the_errors_of_the_faq_are_those_of_the_code():
    sources = [
        path
        for folder in ("data", "models", "utils", "Robust-Bird")
        for path in (ROOT / folder).rglob("*.py")
    ]
    text = "\n".join(path.read_text() for path in sources)
    said = " ".join(re.sub(r'"\s*\n\s*f?"', "", text).split())  # joins the parts of a message
    errors = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "faq.md").read_text(), flags=re.M)
    errors.remove("No module named 'torch'")  # Python's own
    assert len(errors) > 12
    for error in errors:
        # Flag names and numbers are filled in at run time, so the text between them is compared.
        parts = re.split(r"--[\w?]+|\b\d+(?:\.\d+)?x?\d*\b|,|has no effect with|\btorch$", error)
        assert all(part.strip() in said for part in parts), error
