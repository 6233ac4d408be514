"""Shared by the scripts of tables and figures. Each is called as
  bash scripts/<name>.sh DATA [flags for every run]
DATA is the folder of a data set, recognized by its contents or name, or "digits". Environment
variables change what the command does, as in SEEDS="1 2 3" bash scripts/table1.sh DATA:
  SEEDS="1"          seeds of every run          EPOCHS=200    length of each training
  JOBS=1             runs at a time, on all GPUs OUT=runs/<name>-<data set>   folder of the results
  WIDTH=1            of ResNets and VGGs         DATASET, PAPER   what DATA is; paper's row to show
  UPDATE_FREQUENCY=900 SECOND_FREQUENCY=1200     steps between mask updates, for other data sizes
  PLAN=1             only print what is finished and how long the rest takes (downloads CIFAR, SVHN)
  SMOKE=1            everything at toy size, in at most 3 minutes
  SLURM=1            submit an array job; SBATCH="--gres=gpu:1 --time=8:00:00" goes to sbatch
Run again, the same command skips finished runs and resumes interrupted ones.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import InputError, require, run_command
from utils.execution.interruption import SIGNALS, TIME_LIMIT_CODE
from utils.settings.guess import guess_data_set

ROOT = Path(__file__).resolve().parent.parent
_MODES = ("--plan", "--task", "--report")  # for the processes that a call starts
_TABLES = "table1 architectures baselines fig1 benchmark campaign study dense rb fb fbp".split()
# exit codes of a run that was asked to stop, by a signal or its time limit; then all stop
STOPPED = tuple(128 + number for number in SIGNALS)
_STOPS = (TIME_LIMIT_CODE, *STOPPED)
_BIRD = "Robust-Bird/train_eb.py --stage1 sgd --stage2 pgd --arch {arch} --seed {seed} --pruning"
_FLYING = "main_adv.py --arch {arch} --seed {seed} --density {density}"
METHODS = {
    "dense": "main_adv.py --arch {arch} --seed {seed}",
    "rb": f"{_BIRD} unstructured --density {{density}}",
    "rb-channel": f"{_BIRD} channel --density {{density}}",
    "fb": f"{_FLYING} --fb --dynamic_fre",
    "fbp": f"{_FLYING} --fbp --dynamic_fre",
    "fb-channel": f"{_FLYING} --fb --dynamic_fre --structure channel",
    "static": f"{_FLYING} --fix --sparse_init {{init}}",
    "fb-gradient": f"{_FLYING} --fb --growth gradient",
    "fbp-gradient": f"{_FLYING} --fbp --growth gradient",
    "fb-channel-gradient": f"{_FLYING} --fb --growth gradient --structure channel",
}


@dataclass(frozen=True)
class Run:
    """A row of a table, for one seed."""

    method: str
    density: str = "0.2"
    arch: str = "resnet18"
    init: str = ""
    width: float = 1
    flags: str = ""
    seed: str = ""


@dataclass(frozen=True)
class Call:
    """A table on a data set; ``extra`` are flags for every run."""

    table: str
    data: str
    dataset: str
    out: str
    jobs: int
    extra: tuple[str, ...]

    @property
    def source(self) -> list[str]:
        return [] if self.dataset == "digits" else ["--data", self.data]


def variable(name: str, default: str = "") -> str:
    """An environment variable; an empty one counts as unset."""
    return os.environ.get(name) or default


def switch(name: str) -> bool:
    """Whether an environment variable turns something on."""
    return variable(name, "0") != "0"


def number(name: str, value: str, pattern: str = r"\d+") -> str:
    require(bool(re.fullmatch(pattern, value)), f"{name} is a number, not '{value}'")
    return value


def decimal(name: str, value: str) -> float:
    return float(number(name, value, r"\d+(\.\d*)?|\.\d+"))


def rows(table: str) -> list[Run]:
    """The runs of a table for one seed."""
    smoke = switch("SMOKE")
    birds = [Run("rb"), Run("fb"), Run("fbp")]
    if table == "table1":
        channels = [Run("rb-channel", "0.5")] if variable("CHANNELS", "1") != "0" else []
        return [Run("dense"), *birds, *channels]
    if table == "campaign":  # in order of value, in case time runs out
        return [Run("fbp"), Run("dense"), Run("fb"), Run("rb"), Run("fb-channel", "0.5")]
    if table == "architectures":
        networks = variable("ARCHS", "vgg16 wideresnet").split()
        return [replace(run, arch=arch) for arch in networks for run in [Run("dense"), *birds]]
    if table == "baselines":
        result = []
        for density in variable("DENSITIES", "0.2").split():
            for init in "random_global magnitude snip grasp synflow igq erk".split():
                result.append(Run("static", density, init=init))
            # The weights of a layer grow with the product of its two widths.
            width = round(decimal("DENSITIES", density) ** 0.5, 3)
            result.append(Run("dense", width=width))
        return result
    if table == "study":
        return _study()
    if table not in ("fig1", "benchmark"):
        return [Run(table)]
    methods = variable("METHODS", "rb fb" if table == "fig1" else "rb fb fbp").split()
    for method in methods:
        known = method in ("rb", "fb", "fbp")
        require(known, f"METHODS are rb, fb and fbp, not '{method}'")
    if table == "fig1":
        densities = variable("DENSITIES", "0.6 0.2" if smoke else "0.8 0.6 0.4 0.2 0.1 0.05")
        return [Run("dense"), *(Run(m, density) for density in densities.split() for m in methods)]
    # At toy size, a density of 0.1 leaves a dead network.
    densities = variable("DENSITIES", "0.5" if smoke else "0.1 0.05 0.01")
    archs = variable("ARCHS", "resnet18 vgg16").split()
    cells = itertools.product(archs, densities.split(), methods)
    return [Run(method, density, arch) for arch, density, method in cells]


def _study() -> list[Run]:
    """Flying Bird, small dense networks with as many weights or FLOPs, other sparse networks, and
    remedies; PARTS selects some of them."""
    flying = [Run("fb-gradient"), Run("fbp-gradient")]
    known = {
        "main": [Run("dense"), *flying],
        # with Flying Bird's weights, its channels' widths, its FLOPs
        "small": [Run("dense", width=width) for width in (0.4472, 0.5, 0.7144)],
        "channels": [
            Run(method, "0.5", flags="--channel_multiple 1")
            for method in ("fb-channel-gradient", "rb-channel")
        ],
        "others": [Run("rb"), Run("static", init="igq"), Run("static", init="random_global")],
        "awp": [replace(run, flags="--awp .01") for run in (Run("dense"), *flying)],
        "densities": [
            run
            for density, width in (("0.05", 0.224), ("0.1", 0.316), ("0.5", 0.7072))
            for run in (Run("fb-gradient", density), Run("dense", width=width))
        ],
    }
    parts = variable("PARTS", " ".join(known)).split()
    for part in parts:
        require(part in known, f"PARTS are {', '.join(known)}, not '{part}'")
    return [run for part in parts for run in known[part]]


def command(call: Call, run: Run) -> list[str]:
    """The script and flags of a run. Flags of the call come last, so they win."""
    smoke = switch("SMOKE")
    flags = f"{METHODS[run.method]} {{flags}}".format(**vars(run)).split()
    if run.method.startswith("fb"):
        twice = "--dynamic_fre" in flags
        for name in ("update_frequency", "second_frequency") if twice else ("update_frequency",):
            steps = "2" if smoke else variable(name.upper())
            flags += [f"--{name}", steps] if steps else []
    epochs = "3" if smoke else variable("EPOCHS")  # the schedule keeps the paper's proportions
    if epochs and run.method.startswith("rb"):
        flags += ["--epochs1", epochs, "--epochs2", epochs, *_milestones("0.25 0.75", epochs)]
    elif epochs:
        others = "--(recipe|lr[_-]schedule)[= ](?!paper|step)"
        has_schedule = bool(re.search(others, " ".join(call.extra)))
        flags += ["--epochs", epochs]
        flags += [] if has_schedule else _milestones("0.5 0.75", epochs)
        flags += ["--dynamic_epoch", "0.5"] if run.method.startswith("fbp") else []
    flags += ["--dataset", call.dataset]
    width = run.width * (0.0625 if smoke else decimal("WIDTH", variable("WIDTH", "1")))
    if run.arch == "wideresnet":
        flags += ["--depth_factor", "10", "--width_factor", "1"] if smoke else []
    elif width != 1:
        flags += ["--width", f"{width:.6g}"]
    toy = "--train_subset 64 --test_subset 32 --batch_size 16 --train_step 1 --test_step 1"
    flags += call.source + (toy.split() if smoke else [])
    return [*flags, "--save_dir", call.out, "--resume", *call.extra]


def _milestones(fractions: str, epochs: str) -> list[str]:
    """Where the rate falls, but for what rounds to either end of a very short run."""
    kept = [f for f in fractions.split() if 0 < round(float(f) * int(epochs)) < int(epochs)]
    return ["--decreasing_lr", ",".join(kept)] if kept else []


def commands(call: Call) -> list[list[str]]:
    seeds = variable("SEEDS", "1")
    good = re.fullmatch(r"[\d ]*\d[\d ]*", seeds)
    require(bool(good), f"SEEDS are numbers with spaces between, as in \"1 2 3\", not '{seeds}'")
    number("EPOCHS", variable("EPOCHS", "200"))
    table = rows(call.table)
    runs = [command(call, replace(run, seed=seed)) for seed in seeds.split() for run in table]
    require(bool(runs), "no runs: ARCHS, DENSITIES, METHODS or PARTS is blank")
    return runs


def plan(commands: list[list[str]], jobs: int) -> list[tuple[str, str, float]]:
    """State (finished, begun, new), folder and remaining seconds of each run; prints them and the
    time left in total.

    All runs must use the same data. Raises ``InputError`` where a run would.
    """
    import torch

    from utils.settings.applied import load_data_for, placed
    from utils.settings.command_line import parse_settings
    from utils.settings.device import pick_device
    from utils.settings.stored import SETTINGS_OF
    from utils.storage.run_folder import read_epochs
    from utils.training.forecast import duration, image_passes, seconds_per_pass

    kinds = [SETTINGS_OF[Path(script).name] for script, *_ in commands]
    asked = [
        parse_settings(kind, flags, "", lambda given: {})
        for kind, (_, *flags) in zip(kinds, commands, strict=True)
    ]
    device = pick_device(asked[0])
    data = load_data_for(asked[0], device)
    placements = [placed(settings, data, device) for settings in asked]
    widest = max(len(paths.root.name) for _, paths in placements)
    states: list[tuple[str, str, float]] = []
    lines, total, speed = [], 0.0, dict[Any, float]()
    for s, paths in placements:
        epochs: list[dict[str, Any]] = []
        with contextlib.suppress(InputError):  # none yet, or damaged: the run itself reports it
            epochs = read_epochs(paths)
        state, shown, about, seconds = "new", "new", "", 0.0
        if paths.summary.exists():
            state = shown = "finished"
        else:
            if paths.checkpoint.exists():
                state, shown = "begun", f"begun, {len(epochs)} epochs done"
            network = (s.arch, s.width, s.depth_factor, s.width_factor, s.batch_size, s.precision)
            if network not in speed:
                speed[network] = seconds_per_pass(s, data, device)
            passes = image_passes(s, data.images, s.epochs_done(epochs))
            seconds = passes * speed[network]
            total, about = total + seconds, f"about {duration(seconds)}"
        lines.append(f"{paths.root.name:<{widest}}  {shown:<24}  {about}".rstrip())
        states.append((state, str(paths.root), seconds))
    unfinished = sum(state != "finished" for state, *_ in states)
    total /= min(jobs, max(1, torch.cuda.device_count()))  # runs on one CPU share it
    lines.append(f"{unfinished} of {len(states)} runs to train")
    lines[-1] += f", about {duration(total)} on this machine" if unfinished else ""
    print("\n".join(lines), file=sys.stderr, flush=True)
    return states


def plan_apart(call: Call) -> list[tuple[str, str, float]]:
    """``plan`` in a process of its own, which frees memory and GPU before the runs need them."""
    planner = [sys.executable, __file__, "--plan", call.table, call.data, *call.extra]
    planned = subprocess.run(planner, stdout=subprocess.PIPE)
    if planned.returncode:
        sys.exit(128 - planned.returncode if planned.returncode < 0 else planned.returncode)
    return [tuple(state) for state in json.loads(planned.stdout)]


def visible_gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:  # empty, it hides all
        visible = ""
        with contextlib.suppress(OSError):
            found = subprocess.run(query, capture_output=True, text=True)
            visible = "" if found.returncode else found.stdout  # its errors are on stdout
    return re.split(r"[,\s]+", visible.strip()) if visible.strip() else []


def run_all(tasks: dict[str, list[str]], jobs: int) -> list[tuple[int, str]]:
    """Run commands by name, ``jobs`` at a time; return exit code and name of those that failed.

    When this process or a run is asked to stop, waits until all have saved and raises SystemExit.
    submitit's LocalExecutor is no substitute: it hides the runs' output and handles Ctrl-C itself.
    """
    environment, gpus = dict(os.environ), visible_gpus() if jobs > 1 else []
    if jobs > 1 and not gpus:
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    waiting, failed = list(tasks.items()), list[tuple[int, str]]()
    running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    asked: list[int] = []
    signals, told = (signal.SIGINT, signal.SIGTERM), False
    handlers = [signal.signal(which, lambda which, _: asked.append(which)) for which in signals]
    while running or (waiting and not asked):
        while waiting and len(running) < jobs and not asked:
            slot = next(slot for slot in itertools.count() if slot not in running)
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
            name, flags = waiting.pop(0)
            child = subprocess.Popen([sys.executable, *flags], env=environment)
            running[slot] = name, child
        if signal.SIGTERM in asked and not told:  # the terminal sends Ctrl-C to the runs itself
            told = True
            for _, child in running.values():
                child.send_signal(signal.SIGTERM)
        for slot, (name, child) in list(running.items()):
            if (code := child.poll()) is not None:
                del running[slot]
                code = 128 - code if code < 0 else code
                failed += [(code, name)] if code else []
                waiting = [] if code in _STOPS else waiting
        time.sleep(0.05)
    for which, handler in zip(signals, handlers, strict=True):
        signal.signal(which, handler)
    if asked or any(code in _STOPS for code, _ in failed):
        sys.exit(max([report_failures(failed), *(128 + which for which in asked)]))
    return failed


def report_failures(failed: list[tuple[int, str]]) -> int:
    """Print what failed; return the highest exit code."""
    if failed:
        print("not finished; the same command resumes them:", file=sys.stderr)
        print(*(f"{code}  {name}" for code, name in sorted(failed)), sep="\n", file=sys.stderr)
    return max((code for code, _ in failed), default=0)


def checks(call: Call, folders: list[str]) -> dict[str, list[str]]:
    """Commands, by name, that run AutoAttack on the best models; empty but for the benchmark."""
    if call.table != "benchmark":
        return {}
    images = variable("AA_IMAGES", "10" if switch("SMOKE") else "")
    flags = [*call.source]
    for flag, value in itertools.pairwise([*call.extra, ""]):  # that say how and where to run
        if re.fullmatch("--(device|gpu|cache[_-]dir|time[_-]limit)(=.*)?", flag):
            flags += [flag] if "=" in flag else [flag, value]
    flags += ["--eval_attack", "autoattack", *(["--test_subset", images] if images else [])]
    evaluate = ["main_adv.py", "--eval", "--pretrained"]
    return {
        f"evaluation of {folder}": [*evaluate, f"{folder}/model_RA_best.pth.tar", *flags]
        for folder in folders
    }


def submit(call: Call, left: list[int]) -> None:
    """Submit an array job with a task per unfinished run, then a job for evaluations and report."""

    def sbatch(mode: str, name: str, output: str, *flags: str) -> str:
        again = [sys.executable, str(Path(__file__).absolute()), mode, call.table, call.data]
        wrap = f"cd {shlex.quote(str(ROOT))} && {shlex.join([*again, *call.extra])}"
        options = ["--job-name", name, *flags, "--output", f"{call.out}/slurm-{output}.out"]
        options += [*shlex.split(variable("SBATCH")), "--wrap", wrap]
        try:
            answer = subprocess.check_output(["sbatch", "--parsable", *options], text=True)
        except FileNotFoundError:
            raise InputError("SLURM=1 needs sbatch, which is not installed here") from None
        except subprocess.CalledProcessError as error:
            raise InputError(f"sbatch ended with exit code {error.returncode}") from None
        return answer.strip().split(";")[0]

    after: list[str] = []
    if left:
        array = f"{','.join(map(str, left))}%{call.jobs}"
        job = sbatch("--task", call.table, "%A_%a", "--array", array)
        after = ["--dependency", f"afterany:{job}"]
        print(f"submitted array job {job} for {len(left)} runs")
    job = sbatch("--report", f"{call.table}-report", "%j-report", *after)
    print(f"submitted job {job} for the report: {call.out}/report")


def read_call(table: str, data: str, *extra: str) -> Call:
    given, data = data, data if data == "digits" else os.path.realpath(data)
    os.chdir(ROOT)
    dataset = variable("DATASET") or ("digits" if data == "digits" else guess_data_set(data))
    if not dataset:
        contents = "neither train/<class>/* nor the name of a known data set"
        raise InputError(f"'{given}' has {contents}; DATASET=... says what it is")
    jobs = int(number("JOBS", variable("JOBS", "1")))
    require(jobs >= 1, f"JOBS must be at least 1, not {jobs}")
    out = f"runs/{table}-{dataset}{'-smoke' if switch('SMOKE') else ''}"
    return Call(table, data, dataset, variable("OUT", out), jobs, extra)


def finish(call: Call, folders: list[str], failed: list[tuple[int, str]], jobs: int) -> int:
    """Evaluate and report on the finished runs; returns the exit code of the table."""
    finished = [folder for folder in folders if Path(folder, "summary.json").exists()]
    failed += run_all(checks(call, finished), jobs)
    paper = ["--paper", variable("PAPER")] if variable("PAPER") else []
    flags = ["scripts/report.py", *finished, "--out", f"{call.out}/report", *paper]
    code = subprocess.run([sys.executable, *flags]).returncode if finished else 0
    return max(report_failures(failed), code)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    mode = arguments.pop(0) if arguments[:1] and arguments[0] in _MODES else ""
    named = len(arguments) >= 2 and arguments[0] in _TABLES
    require(named, "tables.py is called by the scripts of tables, as bash scripts/table1.sh DATA")
    call = read_call(*arguments)
    runs = commands(call)
    if mode == "--plan":
        print(json.dumps(plan(runs, call.jobs)))
        return
    if mode == "--task":
        task = runs[int(os.environ["SLURM_ARRAY_TASK_ID"])]
        os.execv(sys.executable, [sys.executable, *task])
    for name in ("EPOCH", "SEED", "JOB"):
        if variable(name):
            print(f"note: {name} is ignored; did you mean {name}S?", file=sys.stderr, flush=True)
    states = plan(runs, call.jobs) if switch("PLAN") else plan_apart(call)
    folders = [folder for _, folder, _ in states]
    left = [number for number, (state, *_) in enumerate(states) if state != "finished"]
    if call.table == "benchmark":
        print("plus a strong evaluation of each, not counted above", file=sys.stderr, flush=True)
    if switch("PLAN"):
        return
    Path(call.out).mkdir(parents=True, exist_ok=True)
    if mode == "--report":  # the array has ended
        sys.exit(finish(call, folders, [(3, folders[number]) for number in left], 1))
    if switch("SLURM"):
        submit(call, left)
        return
    failed = run_all({folders[number]: runs[number] for number in left}, call.jobs)
    sys.exit(finish(call, folders, failed, call.jobs))


if __name__ == "__main__":
    sys.exit(run_command(main))
