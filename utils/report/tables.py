"""Tables of single runs, groups beside the paper, and strong evaluations, as Markdown and CSV;
nothing here writes files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models import canonical_arch
from utils.errors import InputError
from utils.report import paper
from utils.report.runs import METHOD_NAMES, FinishedRun, Group, Measured, density
from utils.storage.checkpoint import checksum
from utils.storage.json_files import misfit
from utils.training.summary import percent

Row = Mapping[str, Any]

_COLUMNS = (
    "method|RA best|RA final|Diff.|SA best|SA final|robust gap|density|train FLOPs|infer FLOPs"
).split("|")


def summary_table(summaries: Sequence[Row]) -> str:
    """A Markdown table, one line per run: test accuracies in percent, FLOPs by the real count."""
    lines = []
    for s in summaries:
        lines.append([_method_name(s), *_cells(s)])
        if "average" in s:
            lines.append([f"{_method_name(s)}, averaged", *_cells(averaged(s))])
    widths = [max(len(line[i]) for line in [_COLUMNS, *lines]) for i in range(len(_COLUMNS))]
    text = [_line(_COLUMNS, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    return "\n".join(text + [_line(line, widths) for line in lines])


def averaged(summary: Row) -> Row:
    """The summary with the averaged network in place of the final one."""
    average = summary["average"]
    diff = summary["best"]["test_ra"] - average["test_ra"]
    return {**summary, "final": average, "diff": diff, "robust_gap": average["robust_gap"]}


def _method_name(summary: Row) -> str:
    name = METHOD_NAMES[summary["method"]]
    init = f" ({summary['settings']['sparse_init']})" if summary["method"] == "static" else ""
    return name + init


def _cells(s: Row) -> list[str]:
    best, final, flops = s["best"], s["final"], s["flops"]["real"]
    figures = [best["test_ra"], final["test_ra"], s["diff"], best["test_sa"], final["test_sa"]]
    work = [f"{flops[kind]:.3g}" for kind in ("training", "inference")]
    return [*map(percent, [*figures, s["robust_gap"]]), f"{s['density']:.4f}", *work]


def _line(cells: Sequence[str], widths: Sequence[int], words: int = 1) -> str:
    """A table row; the first ``words`` cells are aligned left, the others right."""
    found = enumerate(zip(cells, widths, strict=True))
    padded = (f" {cell:{'<' if i < words else '>'}{w}} " for i, (cell, w) in found)
    return f"|{'|'.join(padded)}|"


# ---------------------------------------------------------------- tables of groups

NOTHING = "\u2013"  # a cell without a figure


@dataclass(frozen=True)
class Table:
    """Cells as displayed. The first ``words`` columns are text; ``marked`` holds the numbers of the
    rows that are ours among those of others."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    words: int = 2
    marked: frozenset[int] = frozenset()


def markdown(table: Table) -> str:
    """The table under its title, the notes below it."""
    rows = [
        [_escaped(cell, number in table.marked) for cell in row]
        for number, row in enumerate(table.rows)
    ]
    widths = [max(map(len, column)) for column in zip(table.columns, *rows, strict=True)]
    rules = [
        ("-" * (w + 1) + ":") if i >= table.words else "-" * (w + 2) for i, w in enumerate(widths)
    ]
    lines = [_line(row, widths, table.words) for row in rows]
    text = [
        f"### {table.title}",
        "",
        _line(table.columns, widths, table.words),
        "|" + "|".join(rules) + "|",
        *lines,
    ]
    return "\n".join([*text, "", *(f"- {note}" for note in table.notes)]).rstrip() + "\n"


def unpadded(lines: Sequence[Sequence[str]], words: int) -> str:
    """A Markdown table of a heading and rows; the first ``words`` columns are text."""
    head, *rest = lines
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rest))


def _escaped(cell: str, is_marked: bool) -> str:
    cell = " ".join(cell.replace("|", "\\|").split())
    return f"**{cell}**" if is_marked else cell


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """CSV with None as an empty cell and floats in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return buffer.getvalue()


def _percents(measured: Measured | None) -> str:
    if measured is None:
        return NOTHING
    return percent(measured.mean) + (
        f" \u00b1 {percent(measured.spread)}" if measured.spread is not None else ""
    )


def _flops(measured: Measured) -> str:
    return f"{measured.mean:.3e}" + (f" \u00b1 {measured.spread:.1e}" if measured.spread else "")


def _density(measured: Measured) -> str:
    return f"{measured.mean:.4f}" + (f" \u00b1 {measured.spread:.4f}" if measured.spread else "")


# ---------------------------------------------------------------- our runs beside Table 1

# Heading and figure of a summary, by column of table1.csv. Its FLOPs follow the paper's count.
_ACCURACIES: Mapping[str, tuple[str, Callable[[Row], float]]] = {
    "ra_best": ("RA best", lambda s: s["best"]["test_ra"]),
    "ra_final": ("RA final", lambda s: s["final"]["test_ra"]),
    "ra_diff": ("RA Diff.", lambda s: s["diff"]),
    "sa_best": ("SA best", lambda s: s["best"]["test_sa"]),
    "sa_final": ("SA final", lambda s: s["final"]["test_sa"]),
    "sa_diff": ("SA Diff.", lambda s: s["best"]["test_sa"] - s["final"]["test_sa"]),
    "robust_generalization_gap": ("robust gap", lambda s: s["robust_gap"]),
}
_PAPER_FLOPS: Mapping[str, tuple[str, Callable[[Row], float]]] = {
    "train_flops": ("train FLOPs (paper's count)", lambda s: s["flops"]["paper"]["training"]),
    "inference_flops": ("infer FLOPs (paper's count)", lambda s: s["flops"]["paper"]["inference"]),
}
_REAL_FLOPS: Mapping[str, tuple[str, Callable[[Row], float]]] = {
    "train_flops": ("train FLOPs (real count)", lambda s: s["flops"]["real"]["training"]),
    "inference_flops": ("infer FLOPs (real count)", lambda s: s["flops"]["real"]["inference"]),
}


@dataclass(frozen=True)
class Comparison:
    """A group's figures and the paper's, by column of Table 1; ``theirs`` is empty if the paper has
    no such row. ``label`` says if the averaged network takes the place of the final one."""

    group: Group
    label: str
    dataset: str | None
    ours: Mapping[str, Measured]
    real: Mapping[str, Measured]
    density: Measured
    theirs: Mapping[str, float]

    @classmethod
    def of(cls, group: Group, paper_dataset: str | None, among: Sequence[Group] = ()) -> Comparison:
        """Compare a group with its row of the paper's Table 1.

        Args:
            paper_dataset: the paper's data set for groups on data that the paper lacks.
            among: the groups of a report; one narrower than the widest is a small network, for
                which the paper has no row.
        """
        widest = max([group.settings.width, *(other.settings.width for other in among)])
        theirs = paper.table1(group, paper_dataset) if group.settings.width == widest else {}
        columns = {**_ACCURACIES, **_PAPER_FLOPS}
        ours = {name: group.measured(figure) for name, (_, figure) in columns.items()}
        real = {name: group.measured(figure) for name, (_, figure) in _REAL_FLOPS.items()}
        dataset = paper.dataset_of(group, paper_dataset)
        return cls(group, group.label, dataset, ours, real, group.measured(density), theirs)

    @classmethod
    def all_of(cls, groups: Sequence[Group], paper_dataset: str | None) -> list[Comparison]:
        """A comparison for each group, and one more for its averaged networks if all have one."""
        found = []
        for group in groups:
            found.append(cls.of(group, paper_dataset, groups))
            if all("average" in run.summary for run in group.runs):
                ours = {
                    name: Measured.of([figure(averaged(run.summary)) for run in group.runs])
                    for name, (_, figure) in {**_ACCURACIES, **_PAPER_FLOPS}.items()
                }
                label = f"{group.label}, averaged"
                found.append(replace(found[-1], label=label, ours=ours, theirs={}))
        return found

    def difference(self, name: str) -> float | None:
        """Ours minus the paper's; None if the paper has no figure."""
        return self.ours[name].mean - self.theirs[name] if name in self.theirs else None


def comparison_table(found: Sequence[Comparison]) -> Table:
    """Our means and spreads, the paper's figures and the differences: up to 3 lines per group."""
    headings = [heading for heading, _ in (*_ACCURACIES.values(), *_PAPER_FLOPS.values())]
    columns = ["method", "whose", "seeds", *headings, "density"]
    columns += [heading for heading, _ in _REAL_FLOPS.values()]
    rows = [line for comparison in found for line in _comparison_lines(comparison)]
    title = "Accuracies and FLOPs in the columns of the paper's Table 1"
    return Table(title, columns, rows, comparison_notes(found))


def _comparison_lines(c: Comparison) -> list[list[str]]:
    ours = [
        *(_percents(c.ours[name]) for name in _ACCURACIES),
        *(_flops(c.ours[name]) for name in _PAPER_FLOPS),
    ]
    ours += [_density(c.density), *(_flops(c.real[name]) for name in _REAL_FLOPS)]
    lines = [[c.label, "ours", str(len(c.group.runs)), *ours]]
    if c.theirs:
        paper_has = [
            *(percent(c.theirs[name]) for name in _ACCURACIES),
            *(f"{c.theirs[name]:.3e}" for name in _PAPER_FLOPS),
        ]
        differ = {name: c.ours[name].mean - figure for name, figure in c.theirs.items()}
        signed = [
            *(_signed_percent(differ[name]) for name in _ACCURACIES),
            *(f"{differ[name]:+.2e}" for name in _PAPER_FLOPS),
        ]
        nothing = [NOTHING] * (1 + len(_REAL_FLOPS))
        lines += [
            [c.label, "paper", NOTHING, *paper_has, *nothing],
            [c.label, "ours - paper", NOTHING, *signed, *nothing],
        ]
    return lines


def _signed_percent(x: float) -> str:
    text = percent(x)
    return text if float(text) <= 0 else f"+{text}"


def comparison_notes(found: Sequence[Comparison]) -> list[str]:
    """Notes on what the columns mean, where data differ from the paper's, and how the runs differ
    from the paper's set-up."""
    notes = [
        (
            "In percent: RA and SA on test images, Diff. = best - final, robust gap = training RA -"
            " test RA of the final model. Ours: mean \u00b1 sample standard deviation over seeds."
        ),
        (
            "Compare only FLOPs by the paper's count (which counts output channels twice) with the"
            " paper's; the real count is ours alone."
        ),
    ]
    for dataset in dict.fromkeys(
        c.dataset for c in found if c.theirs and c.dataset != c.group.settings.dataset
    ):
        others = "; ".join(
            c.label for c in found if c.theirs and c.dataset == dataset != c.group.settings.dataset
        )
        notes.append(
            f"The paper's rows are of {paper.DATASETS[str(dataset)]} and these runs are of other"
            f" data or scale: {others}."
        )
    without = [c.label for c in found if not c.theirs]
    if without:
        notes.append(f"The paper's table has no row for: {'; '.join(without)}.")
    notes += [note for c in found for note in _rollback_notes(c.group)]
    return notes + _setup_notes([(c.group, c.dataset) for c in found])


def _rollback_notes(group: Group) -> list[str]:
    """Which seeds ended with a smaller step, as they had collapsed."""
    steps = {
        run.settings.seed: run.last_stage[-1].get("step_size")
        for run in group.runs
        if run.settings.on_collapse == "rollback"
    }
    told = [f"seed {seed} with {size:.3g}/255" for seed, size in steps.items() if size]
    return [f"{group.label}, rolled back to smaller steps: {', '.join(told)}."] if told else []


def _setup_notes(groups: Sequence[tuple[Group, str | None]]) -> list[str]:
    """How the runs differ from the paper's: first the differences that all share, then a line for
    groups with further ones."""
    told = {group.label: paper.differences(group, dataset) for group, dataset in groups}
    common = [
        words
        for words in next(iter(told.values()), [])
        if all(words in own for own in told.values())
    ]
    notes = [f"All runs differ from the paper's set-up: {'; '.join(common)}."] if common else []
    more: dict[str, list[str]] = {}
    for label, own in told.items():
        more.setdefault("; ".join(words for words in own if words not in common), []).append(label)
    begin = "Beyond that" if common else "Different from the paper's set-up"
    return notes + [
        f"{begin}, {' and '.join(labels)}: {words}." for words, labels in more.items() if words
    ]


def comparison_csv(found: Sequence[Comparison]) -> str:
    """One line per group, unrounded, with columns for mean, spread, the paper's figure and the
    difference."""
    columns = ["label", "method", "dataset", "arch", "asked_density", "seeds", "paper_dataset"]
    for name in (*_ACCURACIES, *_PAPER_FLOPS):
        own = f"{name}_paper_count" if name in _PAPER_FLOPS else name
        columns += [own, f"{own}_spread", f"{own}_paper", f"{own}_difference"]
    for name in ("density", *(f"{name}_real_count" for name in _REAL_FLOPS)):
        columns += [name, f"{name}_spread"]
    return csv_text(columns, [_comparison_record(c) for c in found])


def _comparison_record(c: Comparison) -> list[object]:
    settings = c.group.settings
    seeds = " ".join(map(str, c.group.seeds))
    record: list[object] = [c.label, c.group.method, settings.dataset, settings.arch]
    by_flops = getattr(settings, "flops", None) is not None  # which gives the density
    record += [None if by_flops else c.group.density, seeds, c.dataset if c.theirs else None]
    for name in (*_ACCURACIES, *_PAPER_FLOPS):
        record += [c.ours[name].mean, c.ours[name].spread, c.theirs.get(name), c.difference(name)]
    for measured in (c.density, *(c.real[name] for name in _REAL_FLOPS)):
        record += [measured.mean, measured.spread]
    return record


# ---------------------------------------------------------------- strong evaluations

# checkpoint, title, norm, eps, step size, test images, training images
_Kind = tuple[str, str, str, float, float, int, int]
_EVALUATION = {
    "checkpoint": str,
    "title": str,
    "norm": str,
    "eps": float,
    "step_size?": (float, None),
    "images": {"test": int},
}
_EVALUATION |= {"test_sa": float, "test_ra": float, "robust_gap?": (float, None)}
_CHECKPOINTS = {
    "model_RA_best.pth.tar": "best",
    "checkpoint.pth.tar": "final",
    "model_average.pth.tar": "averaged",
    "model_SA_best.pth.tar": "best SA",
}


@dataclass(frozen=True)
class StrongEvaluation:
    """One attack on one checkpoint of a group, over the seeds that were evaluated; accuracies in
    percent, ``eps`` in 1/255."""

    group: Group
    checkpoint: str
    title: str
    norm: str
    eps: float
    step_size: float | None
    images: int
    train_images: int
    sa: Measured
    ra: Measured
    gap: Measured | None
    warnings: tuple[str, ...]

    @property
    def ball(self) -> str:
        return f"{self.norm} {self.eps:g}/255"

    @property
    def name(self) -> str:
        return f"{self.group.label}, {self.checkpoint}, {self.title}"


def strong_evaluations(groups: Sequence[Group]) -> list[StrongEvaluation]:
    """All of ``evaluations/*.json`` except stale ones and checks for gradient masking, ordered by
    checkpoint; of equal evaluations of a run, the newest.

    Raises:
        InputError: a file is not an evaluation.
    """
    order = {name: number for number, name in enumerate(_CHECKPOINTS)}
    found = []
    for group in groups:
        by_kind: dict[_Kind, dict[int, Row]] = {}
        for run in group.runs:
            for evaluation in valid_evaluations(run):
                by_kind.setdefault(_kind(run, evaluation), {})[run.settings.seed] = evaluation
        kinds = sorted(by_kind, key=lambda key: (order.get(key[0], len(order)), key))
        found += [_strong(group, key, list(by_kind[key].values())) for key in kinds]
    return found


def is_stale(run: FinishedRun, evaluation: Row) -> bool:
    """Whether the network was trained further after the evaluation; False for older evaluations,
    which do not record their network."""
    network, weights = evaluation.get("network"), run.summary.get("weights")
    if not isinstance(network, Mapping) or not isinstance(weights, Mapping):
        return False
    now = weights.get(str(evaluation.get("checkpoint")))
    return now is not None and network.get("weights") != now


def stale_evaluations(groups: Sequence[Group]) -> list[str]:
    """Notes on the evaluations that are left out, one line per run."""
    found = []
    for run in (run for group in groups for run in group.runs):
        if count := sum(is_stale(run, evaluation) for evaluation in run.evaluations):
            why = "their networks have been trained further since"
            found.append(f"{run.name}: {count} evaluation(s) left out: {why}.")
    return found


def valid_evaluations(run: FinishedRun) -> list[Row]:
    """A run's evaluations but for stale ones and checks for gradient masking, oldest first; raises
    ``InputError`` for a file that is not an evaluation."""
    found = [
        evaluation
        for evaluation in run.evaluations
        if evaluation.get("attack") != "masking" and not is_stale(run, evaluation)
    ]
    for evaluation in found:
        if wrong := misfit(evaluation, _EVALUATION):
            folder = run.paths.root / "evaluations"
            raise InputError(f"{folder} holds a file that is not an evaluation: {wrong}")
    return found


def _kind(run: FinishedRun, evaluation: Row) -> _Kind:
    """What must be equal for a mean over seeds to make sense."""
    images = evaluation["images"]
    eps, step_size = float(evaluation["eps"]), float(evaluation.get("step_size") or 0.0)
    numbers = (eps, step_size, images["test"], images.get("train", 0))
    title = str(evaluation["title"])
    if evaluation.get("source_weights"):  # folders of different runs may have the same name
        title += f" ({str(evaluation['source_weights'])[:6]})"
    if not run.took_data_of(evaluation):
        title += f" on other data ({checksum(evaluation['digests'])[:6]})"
    return evaluation["checkpoint"], title, evaluation["norm"], *numbers


def _strong(group: Group, key: _Kind, found: Sequence[Row]) -> StrongEvaluation:
    checkpoint, title, norm, eps, step_size, images, train_images = key
    sa, ra = (
        Measured.of([evaluation[name] for evaluation in found]) for name in ("test_sa", "test_ra")
    )
    gaps = [evaluation.get("robust_gap") for evaluation in found]
    gap = None if None in gaps else Measured.of([g for g in gaps if g is not None])
    name = _CHECKPOINTS.get(checkpoint, checkpoint.split(".")[0])
    told = dict.fromkeys(str(w) for evaluation in found for w in evaluation.get("warnings", []))
    size, counts = step_size or None, (images, train_images)
    return StrongEvaluation(group, name, title, norm, eps, size, *counts, sa, ra, gap, tuple(told))


def evaluation_table(found: Sequence[StrongEvaluation], left_out: Sequence[str] = ()) -> Table:
    """One line for each group, checkpoint and attack, which says what tells it from others alike;
    ``left_out`` are notes below the table."""
    columns = "method|checkpoint|attack|ball|seeds|test images|SA|RA|robust gap".split("|")
    rows = []
    for s in found:
        alike = [o for o in found if (o.name, o.ball, o.images) == (s.name, s.ball, s.images)]
        ball, images = s.ball, str(s.images)
        if s.step_size and len({o.step_size for o in alike}) > 1:
            ball += f", steps of {s.step_size:g}/255"
        if len({o.train_images for o in alike}) > 1:
            images += f" (training: {s.train_images or 'none'})"
        row = [s.group.label, s.checkpoint, s.title, ball, str(s.ra.n), images]
        rows.append(row + [_percents(measured) for measured in (s.sa, s.ra, s.gap)])
    notes = [
        "In percent, mean \u00b1 sample standard deviation over seeds; best = best validation RA,"
        " final = last epoch."
    ]
    notes += [f"{s.name}: {warning}." for s in found for warning in s.warnings]
    return Table("Strong evaluations", columns, rows, [*notes, *left_out], words=4)


def evaluation_csv(found: Sequence[StrongEvaluation]) -> str:
    """The evaluations as CSV with unrounded figures."""
    columns = (
        "label method checkpoint attack norm eps step_size seeds test_images training_images"
        " sa sa_spread ra ra_spread robust_gap robust_gap_spread".split()
    )
    records: list[list[object]] = []
    for s in found:
        gap = (None, None) if s.gap is None else (s.gap.mean, s.gap.spread)
        told = [s.group.label, s.group.method, s.checkpoint, s.title, s.norm, s.eps]
        told += [s.step_size, s.ra.n, s.images, s.train_images]
        records.append([*told, s.sa.mean, s.sa.spread, s.ra.mean, s.ra.spread, *gap])
    return csv_text(columns, records)


def benchmark_tables(found: Sequence[StrongEvaluation], paper_dataset: str | None) -> list[Table]:
    """Our AutoAttack accuracies among the benchmark's: one table for each data set, network,
    structure and sparsity that both have."""
    cells: dict[_Cell, list[StrongEvaluation]] = {}
    radii = (8.0, round(255 * paper.BENCHMARK_EPS, 6))
    for s in found:
        asked = paper.benchmark_sparsity(s.group)
        like = (s.title, s.norm) == ("AutoAttack", "linf") and round(s.eps, 6) in radii
        if asked is not None and like:
            dataset = paper.dataset_of(s.group, paper_dataset)
            cell = (dataset, canonical_arch(s.group.settings.arch), *asked)
            cells.setdefault(cell, []).append(s)
    known = [cell for cell in sorted(cells, key=str) if paper.benchmark(*cell)]
    return [_benchmark_table(cell, cells[cell]) for cell in known]


_Cell = tuple[str | None, str, str, int]  # data set, network, structure, sparsity in percent
_BENCHMARK_COLUMNS = (
    "method|whose|seeds|kept|test images|eps|clean accuracy|AutoAttack accuracy"
).split("|")


def _benchmark_table(cell: _Cell, ours: Sequence[StrongEvaluation]) -> Table:
    dataset, arch, structure, sparsity = cell
    lines = [
        *((p.autoattack, False, _benchmark_line(p, sparsity)) for p in paper.benchmark(*cell)),
        *((s.ra.mean, True, _our_line(s, structure)) for s in ours),
    ]
    lines.sort(key=lambda line: -line[0])
    title = (
        f"AutoAttack beside the benchmark: {paper.DATASETS[str(dataset)]}, {arch}, {sparsity} % of"
        f" the {structure} pruned"
    )
    notes = [
        "Others' figures: arXiv 2409.01249; in percent, the highest AutoAttack accuracy first."
        f" The benchmark attacks at {paper.BENCHMARK_EPS:g} in linf, a little less than 8/255. Kept"
        f" is the fraction of the {structure}."
    ]
    if arch.startswith("resnet"):
        notes.append("Ours and the benchmark's Flying Bird are pre-activation ResNets, others not.")
    substitutes = dict.fromkeys(s.group.label for s in ours if s.group.settings.dataset != dataset)
    if substitutes:
        notes.append(
            f"These runs are of other data or scale than {paper.DATASETS[str(dataset)]}:"
            f" {'; '.join(substitutes)}."
        )
    notes += _setup_notes(list({s.group.label: (s.group, dataset) for s in ours}.values()))
    return Table(
        title,
        _BENCHMARK_COLUMNS,
        [line for _, _, line in lines],
        notes,
        marked=frozenset(i for i, line in enumerate(lines) if line[1]),
    )


def _benchmark_line(entry: paper.Published, sparsity: int) -> list[str]:
    clean = NOTHING if entry.clean is None else percent(entry.clean)
    kept, eps = f"{1 - sparsity / 100:g}", f"{paper.BENCHMARK_EPS:g}"
    told = [entry.method, "benchmark", NOTHING, kept, NOTHING, eps, clean]
    return [*told, percent(entry.autoattack)]


def _our_line(s: StrongEvaluation, structure: str) -> list[str]:
    # for weights the final density, since Flying Bird+ ends below the requested one
    kept = _density(s.group.measured(density))
    if structure == "channels":
        kept = f"{s.group.density:g} asked"  # rounding and groups left whole may change it
    figures = [_percents(s.sa), _percents(s.ra)]
    name, eps = f"{s.group.label}, {s.checkpoint}", f"{s.eps / 255:.3g}"
    return [name, "ours", str(s.ra.n), kept, str(s.images), eps, *figures]
