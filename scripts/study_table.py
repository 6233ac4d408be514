"""Updates the tables and the figure of results/README.md from the summaries in results/study:
``python scripts/study_table.py``. Given a folder of runs, as scripts/study.sh leaves it, prints
their tables instead; with ``--keep_answers``, also adds the answers by image of its PGD-20 and
AutoAttack evaluations to results/study."""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import build_model
from sparse_core import prunable
from utils.errors import require, run_command
from utils.evaluation.trials import Outcomes
from utils.report.runs import FinishedRun
from utils.report.tables import is_stale, unpadded
from utils.settings.command_line import OneLineParser
from utils.storage.checkpoint import load_checkpoint
from utils.storage.json_files import read_object
from utils.storage.paths import RunPaths
from utils.storage.run_folder import read_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "results"
Row = Mapping[str, Any]
Answers = dict[tuple[str, int, str], np.ndarray]  # by name, seed and network (best, final)
# by attack: its table in results/README.md, and the file of its answers in results/study
ATTACKS = {"PGD-20": ("images", "answers.npz"), "AutoAttack": ("autoattack", "autoattack.npz")}
Runs = Mapping[str, Mapping[int, Row]]  # summaries by name (of ``NAMES``) and seed
NAMES = {
    "dense": "Dense",
    "small-flops": "Small dense, FLOPs of Flying Bird",
    "small-channels": "Small dense, widths of the channels",
    "small-weights": "Small dense, weights of Flying Bird",
    "fb": "Flying Bird",
    "fbp": "Flying Bird+",
    "rb": "Robust Bird",
    "static": "Static masks, IGQ",
    "random": "Static masks, random",
    "fb-channel": "Flying Bird, channels",
    "rb-channel": "Robust Bird, channels",
    "older-rb-channel": "Robust Bird, channels per norm (old code)",
    "dense-awp": "Dense + AWP",
    "fb-awp": "Flying Bird + AWP",
    "fbp-awp": "Flying Bird+ + AWP",
}
for _density in ("0.5", "0.1", "0.05"):
    NAMES[f"fb-{_density}"] = f"Flying Bird, density {_density}"
    NAMES[f"small-{_density}"] = f"Small dense, {_density} of the weights"
# the runs compared, seed by seed
REMEDIED = ("dense", "fb", "fbp")
PAIRS = (
    *((name, "dense") for name in ("fb", "fbp", "rb", "static", "random")),
    *((name, "dense") for name in ("fb-channel", "rb-channel")),
    *((f"small-{kind}", "dense") for kind in ("flops", "channels", "weights")),
    ("fb", "small-flops"),
    ("fb", "small-weights"),
    ("fb", "static"),
    ("fb", "random"),
    ("fb-channel", "fb"),
    ("fb-channel", "rb-channel"),
    ("fb-channel", "small-channels"),
    ("rb-channel", "small-channels"),
    ("rb-channel", "older-rb-channel"),
    ("dense-awp", "dense"),
    ("fb-awp", "fb"),
    ("fb-awp", "dense-awp"),
    *((f"fb-{density}", "dense") for density in ("0.5", "0.1", "0.05")),
    *((f"fb-{density}", f"small-{density}") for density in ("0.5", "0.1", "0.05")),
)
FIGURES: dict[str, Callable[[Row], float]] = {
    "RA best": lambda run: run["best"]["test_ra"],
    "RA final": lambda run: run["final"]["test_ra"],
    "Diff.": lambda run: run["diff"],
    "training RA": lambda run: run["final"]["train_ra"],
    "robust gap": lambda run: run["robust_gap"],
    "SA final": lambda run: run["final"]["test_sa"],
}
_WIDTH = 0.125
# small dense networks by their width
_SMALL = {0.0559: "weights", 0.0625: "channels", 0.0893: "flops"}
_SMALL |= {0.028: "0.05", 0.0395: "0.1", 0.0884: "0.5"}


def read(folder: Path) -> Runs:
    """The runs in a folder; raises ``InputError`` if there is no dense run, or one that is not of
    the study or appears twice."""
    found: dict[str, dict[int, Row]] = {}
    for path in sorted(folder.glob("*/summary.json")):
        summary = read_summary(RunPaths(path.parent))
        name = name_of(summary, path.parent)
        seeds = found.setdefault(name, {})
        seed = summary["settings"]["seed"]
        require(name in NAMES and seed not in seeds, f"{path} is not of the study, or there twice")
        seeds[seed] = summary
    require("dense" in found, f"{folder} holds no dense run of the study")
    return {name: found[name] for name in NAMES if name in found}


def name_of(summary: Row, folder: Path) -> str:
    """The key of a run in ``NAMES``; folders of runs of old code begin with "older-"."""
    settings, method = {"awp": 0, **summary["settings"]}, str(summary["method"])
    if method == "dense" and settings["width"] != _WIDTH:
        method = f"small-{_SMALL.get(settings['width'])}"
    elif method == "static" and settings["sparse_init"] == "random_global":
        method = "random"
    elif method == "fb" and settings["density"] != 0.2:
        method = f"fb-{settings['density']:g}"
    older = "older-" if folder.name.startswith("older-") else ""
    return older + method + ("-awp" if settings["awp"] else "")


def weights(run: Row) -> float:
    """Number of live weights of the convolutions and the linear layer."""
    return run["density"] * _full_weights(run["settings"]["width"])


@cache
def _full_weights(width: float) -> int:
    return sum(w.numel() for w in prunable(build_model("resnet18", 10, width=width)).values())


def main_table(runs: Runs) -> str:
    """One line per method: size, then each figure's mean and standard deviation over the seeds."""
    dense = next(iter(runs["dense"].values()))["flops"]["real"]["inference"]
    lines = [["method", "seeds", "weights", "inference FLOPs", *FIGURES]]
    for name, seeds in runs.items():
        summaries = list(seeds.values())
        size = statistics.fmean(map(weights, summaries)) / 1000
        flops = statistics.fmean(run["flops"]["real"]["inference"] / dense for run in summaries)
        cells = [_spread([figure(run) for run in summaries]) for figure in FIGURES.values()]
        lines.append([NAMES[name], str(len(seeds)), f"{size:.0f}k", f"{flops:.2f}", *cells])
    return unpadded(lines, words=2)


def paired_table(runs: Runs) -> str:
    """Differences seed by seed, and the 95 % confidence interval of their mean."""
    wanted = ("RA best", "RA final", "Diff.", "robust gap")
    lines = [["compared", "seeds", *wanted]]
    for one, other in PAIRS:
        if one not in runs or other not in runs:
            continue
        common, cells = sorted(runs[one].keys() & runs[other].keys()), []
        if not common:
            continue
        for name in wanted:
            figure = FIGURES[name]
            cells.append(_paired([figure(runs[one][s]) - figure(runs[other][s]) for s in common]))
        lines.append([f"{NAMES[one]} - {NAMES[other]}", ", ".join(map(str, common)), *cells])
    return unpadded(lines, words=2)


def remedies_table(runs: Runs) -> str:
    """Final figures with and without weight perturbation, of the network and of its average."""
    lines = [["method", "remedy", "seeds", "RA final", "robust gap", "SA final"]]
    for name in REMEDIED:
        for kind, remedies in (("", ("none", "EMA")), ("-awp", ("AWP", "AWP and EMA"))):
            found = list(runs.get(name + kind, {}).values())
            for remedy, network in zip(remedies, ("final", "average"), strict=True):
                last = [run[network] for run in found if run.get(network)]
                gaps = [run["train_ra"] - run["test_ra"] for run in last]
                columns = [run["test_ra"] for run in last], gaps, [run["test_sa"] for run in last]
                if last:
                    cells = [NAMES[name], remedy, str(len(last)), *map(_spread, columns)]
                    lines.append(cells)
    return unpadded(lines, words=2)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _paired(values: Sequence[float]) -> str:
    each = ", ".join(f"{value:+.1f}" for value in values)
    if len(values) < 2:
        return each
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return f"{each} [{mean - half:+.1f}, {mean + half:+.1f}]"


def answers_in(folder: Path, attack: str = "PGD-20") -> Answers:
    """Which test images each run's networks withstand under one of ``ATTACKS``, bool ``[N]`` by
    name, seed and network (best, final), from the finished evaluations in the run folders; raises
    ``InputError`` unless all have the same images and ball."""
    found: Answers = {}
    first: dict[str, object] = {}
    for network, stem in (("best", "model_RA_best"), ("final", "checkpoint")):
        for path in sorted(folder.glob(f"*/evaluations/{stem}_{attack.lower()}_*.pth.tar")):
            summary = read_summary(RunPaths(path.parent.parent))
            key = (name_of(summary, path.parent.parent), summary["settings"]["seed"], network)
            evaluation = path.with_name(path.name.replace(".pth.tar", ".json"))
            if not evaluation.exists():  # interrupted, or still running
                continue
            told = read_object(evaluation)
            if is_stale(FinishedRun(RunPaths(path.parent.parent), summary), told):
                continue
            require(key not in found, f"{path} is not the only {attack} evaluation of its network")
            content = load_checkpoint(path)
            ball = {name: told.get(name) for name in ("norm", "eps", "step_size", "digests")}
            first = first or ball
            require(ball == first, f"{path} is of another ball or other data than the others")
            predicted = content["outcomes"]["predicted"]
            tried = predicted if attack == "AutoAttack" else [attack]
            found[key] = np.logical_and.reduce(
                [withstood(predicted[name], content["labels"]["test"]) for name in tried]
            )
            same = len(found[key]) == len(next(iter(found.values())))
            require(same, f"{path} is of another number of test images than the others")
    return found


def withstood(predicted: Tensor, y: Tensor) -> np.ndarray:
    """Bool ``[N]``: images classified correctly, or spared as an earlier attack had succeeded."""
    return ((predicted == y) | (predicted == Outcomes.NOT_SHOWN)).numpy()


def stored_answers(path: Path) -> Answers:
    """The same from a file of ``ATTACKS``, where each network has one bit an image."""
    found: Answers = {}
    with np.load(path) as stored:
        for key in stored.files:
            if key != "images":
                name, seed, network = key.split("/")
                bits = np.unpackbits(stored[key], count=int(stored["images"]))
                found[name, int(seed), network] = bits.astype(bool)
    return found


def keep(answers: Answers, path: Path) -> None:
    """Add answers to a file of ``ATTACKS``; ``InputError`` for those of other test images."""
    every = (stored_answers(path) if path.exists() else {}) | answers
    sizes = {len(right) for right in every.values()}
    require(len(sizes) == 1, f"{path} needs answers, all of one number of test images")
    (images,) = sizes
    packed = {"/".join(map(str, key)): np.packbits(right) for key, right in sorted(every.items())}
    np.savez(path, images=images, **packed)  # type: ignore[arg-type]


def images_table(answers: Answers, attack: str = "PGD-20") -> str:
    """RA under an attack of methods and pairs, with 95 % intervals over images and seeds."""
    names = [name for name in NAMES if any(key[0] == name for key in answers)]
    asked: list[tuple[str, str | None]] = [(name, None) for name in names]
    asked += [(one, other) for one, other in PAIRS if one in names and other in names]
    lines = [["method", "seeds", f"RA best, {attack}", f"RA final, {attack}"]]
    for one, other in asked:
        label = NAMES[one] if other is None else f"{NAMES[one]} - {NAMES[other]}"
        compared = [_compared(answers, network, one, other) for network in ("best", "final")]
        seeds = {", ".join(map(str, sorted(values))): None for values in compared if values}
        if not seeds:
            continue
        named = " / ".join(seeds)  # of the best / final networks, if they differ
        lines.append(
            [label, named, *(_interval(v, "" if other is None else "+") for v in compared)]
        )
    return unpadded(lines, words=2)


def _compared(answers: Answers, network: str, one: str, other: str | None) -> dict[int, np.ndarray]:
    """By seed: the images that ``one`` withstands, less those that ``other`` does; ``[N]``."""
    found = {}
    for (name, seed, kind), right in answers.items():
        against = answers.get((other, seed, kind)) if other else np.zeros_like(right)
        if (name, kind) == (one, network) and against is not None:
            found[seed] = right.astype(float) - against
    return found


def _interval(values: Mapping[int, np.ndarray], sign: str) -> str:
    if not values:
        return ""
    mean, low, high = bootstrap(np.stack([values[seed] for seed in sorted(values)]))
    return f"{mean:{sign}.2f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean in percent of ``values`` ``[seeds, images]``, and its 95 % interval when seeds and
    images are drawn again with replacement."""
    random = np.random.default_rng(0)
    seeds, images = values.shape
    drawn = [
        random.multinomial(seeds, [1 / seeds] * seeds)
        @ (values @ np.bincount(random.integers(images, size=images), minlength=images))
        for _ in range(draws)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5]) / values.size
    return 100 * values.mean(), 100 * low, 100 * high


def figure(runs: Runs) -> Figure:
    """Final RA and robust gap against live weights and FLOPs: is it sparsity, or being small?"""
    from matplotlib.figure import Figure

    kinds = {
        "dense networks by width": ("o", ["dense", *(n for n in runs if "small" in n)]),
        "Flying Bird by density": ("s", [n for n in runs if re.fullmatch(r"fb(-[\d.]+)?", n)]),
        "Flying Bird+": ("D", ["fbp"]),
        "Robust Bird": ("^", ["rb"]),
        "static masks, IGQ": ("v", ["static"]),
        "static masks, random": ("<", ["random"]),
        "Flying Bird, channels": ("P", ["fb-channel"]),
        "Robust Bird, channels": ("X", ["rb-channel"]),
    }

    def thousands(run: Row) -> float:
        return weights(run) / 1000

    def millions(run: Row) -> float:
        return run["flops"]["real"]["inference"] / 1e6

    sizes = {
        "live weights, thousands": (thousands, (10, 20, 50, 100, 200)),
        "FLOPs of an inference, millions": (millions, (0.5, 1, 2, 4)),
    }
    figure = Figure(figsize=(9, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, name in zip(grid, ("RA final", "robust gap"), strict=True):
        row[0].set_ylabel(f"{name}, %")
        for axes, (size, ticks) in zip(row, sizes.values(), strict=True):
            for kind, (marker, names) in kinds.items():
                groups = [list(runs[n].values()) for n in names if n in runs]
                points = sorted(
                    (statistics.fmean(map(size, seeds)), [FIGURES[name](run) for run in seeds])
                    for seeds in groups
                )
                line = "-" if len(points) > 1 and marker in "os" else ""
                x = [place for place, _ in points]
                means = [statistics.fmean(values) for _, values in points]
                (drawn,) = axes.plot(x, means, marker + line, label=kind)
                for place, values in points:
                    seeds = [place] * len(values)
                    axes.plot(seeds, values, ".", color=drawn.get_color(), alpha=0.4)
            axes.set(xscale="log")
            axes.minorticks_off()
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.grid(alpha=0.3)
    for axes, label in zip(grid[-1], sizes, strict=True):
        axes.set_xlabel(label)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def page(results: Path) -> str:
    """The text of results/README.md with its tables rebuilt from the summaries."""
    runs, text = read(results / "study"), (results / "README.md").read_text()
    tables = {"study": main_table(runs), "pairs": paired_table(runs)}
    tables["remedies"] = remedies_table(runs)
    for attack, (name, file) in ATTACKS.items():
        if (answers := results / "study" / file).exists():
            tables[name] = images_table(stored_answers(answers), attack)
    for name, table in tables.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def main() -> None:
    parser = OneLineParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="folder of runs to tabulate")
    parser.add_argument("--keep_answers", action="store_true", help="in results/study")
    args = parser.parse_args()
    require(args.folder is not None or not args.keep_answers, "--keep_answers needs a folder")
    if args.folder is not None:
        runs = read(args.folder)
        print(f"{main_table(runs)}\n\n{paired_table(runs)}\n\n{remedies_table(runs)}")
        found = {attack: answers_in(args.folder, attack) for attack in ATTACKS}
        found = {attack: answers for attack, answers in found.items() if answers}
        for attack, answers in found.items():
            print(f"\n{images_table(answers, attack)}")
            if args.keep_answers:
                keep(answers, RESULTS / "study" / ATTACKS[attack][1])
        require(bool(found) or not args.keep_answers, f"{args.folder} has no answers to keep")
        return
    (RESULTS / "README.md").write_text(page(RESULTS))
    figure(read(RESULTS / "study")).savefig(RESULTS / "study" / "capacity.png", dpi=110)


if __name__ == "__main__":
    sys.exit(run_command(main))
