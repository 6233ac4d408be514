"""Adversarial training of dense and sparse networks: dense, Flying Bird, Flying Bird+ and static masks.

    python main_adv.py --dataset digits --width 0.25 --epochs 20 --fbp --dynamic_epoch 0.5 ...

Read it top to bottom: flags -> run -> epochs -> report. ``--help`` lists the flags; SPEC sections in README.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import Data, TrainLoader, calibration_batches, load_data
from models import build_model
from sparse_core import Masking
from utils import flops
from utils.checkpoint import load_checkpoint, load_weights, network_weights
from utils.config import Settings, cautions, parse_settings, pick_device, refuse_idle_masks
from utils.engine import EpochResult, learning_rate, set_learning_rate, train_epoch
from utils.errors import InputError, RunError, one_line, run_command
from utils.evaluate import EpochScores, auto_attack, epoch_scores, evaluate, final_scores
from utils.metrics import EpochDisplay, RunFolder, environment, read_summary
from utils.paths import RunPaths
from utils.report import summary_text, training_curves

_SECONDS_BETWEEN_PICTURES = 15.0  # a picture costs a quarter of a second, which short epochs would feel


def main() -> None:
    settings = parse_settings(sys.argv[1:], (__doc__ or "").splitlines()[0], stored_settings)
    device = pick_device(settings)
    if settings.eval:
        evaluate_checkpoint(settings, device)
    else:
        Run(settings, device).train()


def stored_settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in the checkpoint that the flags point to, if it has any."""
    if given.get("eval") and given.get("pretrained"):
        path = Path(given["pretrained"])
    elif given.get("resume_dir"):
        path = RunPaths(Path(given["resume_dir"])).checkpoint
    else:
        return {}
    settings = load_checkpoint(path).get("settings", {})
    if not isinstance(settings, Mapping):
        raise InputError(f"{path}: its settings are not names and values")
    return settings


def load_data_for(settings: Settings, device: torch.device) -> Data:
    return load_data(
        settings.dataset,
        settings.data,
        device=device,
        image_size=settings.image_size,
        train_subset=settings.train_subset,
        test_subset=settings.test_subset,
        cache_dir=settings.cache_dir,
    )


def network_spec(settings: Settings, data: Data) -> dict[str, Any]:
    """What ``build_model`` needs to make this network again; every checkpoint carries it."""
    return {
        "arch": settings.arch,
        "num_classes": len(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "width": settings.width,
        "depth_factor": settings.depth_factor,
        "width_factor": settings.width_factor,
        "image_size": min(data.image_shape[1:]),
    }


def build_network(spec: Mapping[str, Any], device: torch.device, seed: int = 1) -> nn.Module:
    try:
        model = build_model(**spec, seed=seed)
    except (ValueError, RuntimeError) as error:  # a size it cannot have, or more memory than there is
        raise InputError(f"this network cannot be built ({one_line(error)})") from error
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


# ---------------------------------------------------------------- training


class Run:
    """One training run, from its first epoch or from where its folder stands."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        """Build everything and check it against the data; nothing is written before ``train``."""
        self.settings = settings
        self.device = device
        self.paths = RunPaths(Path(settings.resume_dir or Path(settings.save_dir) / settings.run_name()))
        resuming = settings.resume or settings.resume_dir is not None
        if self.paths.holds_a_run() and not resuming:
            raise InputError(
                f"{self.paths.root} already holds a run with these settings; --resume goes on with it, another --save_dir starts elsewhere"
            )
        self.data = load_data_for(settings, device)
        self.spec = network_spec(settings, self.data)
        self.model = build_network(self.spec, device, settings.seed)
        self.loader = TrainLoader(self.data.train, settings.batch_size, self.data.augmentation, settings.seed)
        refuse_idle_masks(settings, len(self.loader))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.masking = self._start_masking()
        self.costs = flops.layer_costs(self.model, self.data.image_shape)
        self.history: list[dict[str, Any]] = []
        self.drawn_at = float("-inf")
        if resuming and self.paths.checkpoint.exists():
            self._restore(load_checkpoint(self.paths.checkpoint))

    def _start_masking(self) -> Masking | None:
        if self.settings.method == "dense":
            return None
        scored = self.settings.sparse_init in ("snip", "grasp", "synflow")
        batches = calibration_batches(self.data) if scored else []
        try:
            return Masking(self.model, self.optimizer, self.settings.masking(len(self.loader)), batches=batches)
        except ValueError as error:
            raise InputError(str(error)) from error

    # ---- epochs

    def train(self) -> None:
        settings = self.settings
        if self.paths.summary.exists() and len(self.history) == settings.epochs:
            print(f"{self.paths.root} is finished:\n{summary_text(read_summary(self.paths))}")
            return
        self.folder = RunFolder.create(self.paths, self._config())
        self.folder.rewrite_epochs(self.history)
        if self.history:
            self._save_best()
        self._announce()
        try:
            for epoch in range(len(self.history), settings.epochs):
                self._run_epoch(epoch)
            self._finish()
        except (RunError, InputError) as error:  # an input that fails now, after training began, is a failed run
            raise RunError(f"{error}; {self._last_good()}") from error
        except torch.OutOfMemoryError as error:
            raise RunError(f"out of memory on {self.device}, a smaller --batch_size needs less; {self._last_good()}") from error
        except KeyboardInterrupt:
            self.folder.say(f"interrupted; {self._last_good()}; --resume goes on from there")
            raise

    def _run_epoch(self, epoch: int) -> None:
        settings, start = self.settings, time.perf_counter()
        rate = learning_rate(epoch, settings.lr, settings.milestones)
        set_learning_rate(self.optimizer, rate)
        title = f"epoch {epoch + 1}/{settings.epochs}"
        with EpochDisplay(self.folder, title, len(self.data.train), settings.print_freq) as display:
            trained = train_epoch(
                self.model,
                self.optimizer,
                self.loader.epoch(epoch),
                epoch=epoch,
                steps=len(self.loader),
                seed=settings.seed,
                attack=settings.train_attack,
                attack_training=settings.attack_mode == "train",
                masking=self.masking,
                print_freq=settings.print_freq,
                on_progress=display.training,
            )
        with EpochDisplay(self.folder, f"{title} test", len(self.data.val) + len(self.data.test)) as display:
            scores = epoch_scores(self.model, self.data, settings.test_attack, seed=settings.seed, on_batch=display.images)
        self._refuse_broken_network(epoch, scores)
        if self.masking is not None:
            self.masking.observe(train_ra=trained.accuracy, val_ra=scores.val_ra, val_loss=scores.val_loss)
        self.history.append(self._row(epoch, rate, trained, scores, time.perf_counter() - start))
        self._save()
        row = self.history[-1]
        self.folder.say(
            f"{title}  lr {rate:g}  loss {trained.loss:.3f}  train RA {trained.accuracy:.2f}  val RA {scores.val_ra:.2f}"
            f" SA {scores.val_sa:.2f}  test RA {scores.test_ra:.2f} SA {scores.test_sa:.2f}  density {row['density']:.4f}"
            f"  {trained.images / trained.seconds:.0f} img/s  {row['seconds']:.1f} s"
        )

    def _refuse_broken_network(self, epoch: int, scores: EpochScores) -> None:
        """The losses of an epoch are those before each update; this looks at what its last update left."""
        finite = all(bool(value.isfinite().all()) for value in self.model.state_dict().values())
        if not (finite and math.isfinite(scores.val_loss)):
            raise RunError(f"the network was no longer finite after epoch {epoch + 1}, step {len(self.loader)} of {len(self.loader)}")

    def _row(self, epoch: int, rate: float, trained: EpochResult, scores: EpochScores, seconds: float) -> dict[str, Any]:
        """A line of ``metrics.jsonl``; epochs count from 1 there, accuracies are in percent."""
        masking = self.masking
        return {
            "epoch": epoch + 1,
            "lr": rate,
            "train_loss": trained.loss,
            "train_ra": trained.accuracy,
            "val_sa": scores.val_sa,
            "val_ra": scores.val_ra,
            "val_loss": scores.val_loss,
            "test_sa": scores.test_sa,
            "test_ra": scores.test_ra,
            "density": masking.density() if masking else 1.0,
            "explored": masking.explored_fraction() if masking else 1.0,
            "layer_densities": masking.layer_densities() if masking else {},
            "inference_flops": flops.real_inference(self.costs, masking.live_counts() if masking else None),
            "updates": [{**e, "epoch": epoch + 1} for e in masking.events if e["epoch"] == epoch] if masking else [],
            "images_per_second": trained.images / trained.seconds,
            "train_seconds": trained.seconds,
            "eval_seconds": scores.seconds,
            "seconds": seconds,
        }

    # ---- files

    def _save(self) -> None:
        """The checkpoint first: what a crash cuts off after it is made good from it on resume."""
        row = self.history[-1]
        optimizer = self.optimizer.state_dict()
        masking = self.masking.state_dict() if self.masking else None
        content = {**self._shared_content(), "optimizer": optimizer, "masking": masking, "history": self.history}
        self.folder.save(self.paths.checkpoint, content)
        self.folder.append_epoch(row)
        self._save_best()
        if time.monotonic() - self.drawn_at > _SECONDS_BETWEEN_PICTURES:
            self._draw()

    def _save_best(self) -> None:
        """Keep the network if the last epoch is the best so far, by validation alone."""
        for key, path in (("val_ra", self.paths.best_ra), ("val_sa", self.paths.best_sa)):
            if self._best_row(key) is self.history[-1]:
                self.folder.save(path, self._shared_content())

    def _draw(self) -> None:
        self.folder.write_curves(training_curves(self.history, self.paths.root.name))
        self.drawn_at = time.monotonic()

    def _shared_content(self) -> dict[str, Any]:
        """What every checkpoint of this run holds."""
        return {
            "state_dict": self.model.state_dict(),
            "network": self.spec,
            "settings": dataclasses.asdict(self.settings),
            "epoch": self.history[-1]["epoch"],
            "val_ra": self.history[-1]["val_ra"],
            "val_sa": self.history[-1]["val_sa"],
        }

    def _restore(self, content: Mapping[str, Any]) -> None:
        path = self.paths.checkpoint
        if content.get("network") != self.spec:
            raise InputError(f"{path} was trained on other data: classes, image size or pixel statistics differ")
        load_weights(self.model, network_weights(content, path), path, self.settings.arch)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            if self.masking is not None:
                self.masking.load_state_dict(content["masking"])
            self.history = list(content["history"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be resumed from ({one_line(error)})") from error

    def _best_row(self, key: str) -> dict[str, Any]:
        return max(self.history, key=lambda row: row[key])  # the first of equals

    def _config(self) -> dict[str, Any]:
        data = self.data
        images = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
        return {
            "method": self.settings.method,
            "settings": dataclasses.asdict(self.settings),
            "milestones": self.settings.milestones,
            "network": self.spec,
            "classes": data.classes,
            "images": images,
            "steps_per_epoch": len(self.loader),
            **environment(self.device),
        }

    def _announce(self) -> None:
        s, data = self.settings, self.data
        start = f"epoch {len(self.history) + 1} of {s.epochs}" if self.history else f"{s.epochs} epochs"
        density = f" at density {self.masking.density():.4f}" if self.masking else ""
        self.folder.say(
            f"{s.method}{density}: {s.arch} on {s.dataset} ({len(data.train)} / {len(data.val)} / {len(data.test)} images), "
            f"PGD-{s.train_step} training and PGD-{s.test_step} tests, {start}, on {self.device}"
        )
        self.folder.say(f"writing to {self.paths.root}")
        if s.resume and not self.history:
            self.folder.say("note: nothing to resume there, this run starts anew")
        for caution in cautions(s, len(self.loader)):
            self.folder.say(f"note: {caution}")

    def _last_good(self) -> str:
        if not self.paths.checkpoint.exists():
            return "no epoch was finished, so there is no checkpoint yet"
        return f"the last good checkpoint is {self.paths.checkpoint} (epoch {len(self.history)})"

    # ---- report

    def _finish(self) -> None:
        self._draw()
        summary = self._summary()
        self.folder.write_summary(summary)
        self.folder.say(summary_text(summary))
        self.folder.say(f"everything is in {self.paths.root}")

    def _summary(self) -> dict[str, Any]:
        settings, live = self.settings, self.masking.live_counts() if self.masking else None
        best = build_network(self.spec, self.device)
        stored = load_checkpoint(self.paths.best_ra)
        load_weights(best, network_weights(stored, self.paths.best_ra), self.paths.best_ra, settings.arch)
        scores = {}
        for name, model in (("best", best), ("final", self.model)):
            with EpochDisplay(self.folder, f"{name} model", len(self.data.test) + len(self.data.train)) as display:
                scores[name] = final_scores(model, self.data, settings.test_attack, seed=settings.seed, on_batch=display.images)
        images, paper = len(self.data.train), flops.paper_inference(self.costs, live)
        by_epoch = [row["inference_flops"] for row in self.history]
        return {
            "method": settings.method,
            "run": self.paths.root.name,
            "settings": dataclasses.asdict(settings),
            "best": {"epoch": stored["epoch"], "val_ra": stored["val_ra"], **dataclasses.asdict(scores["best"])},
            "final": {"epoch": settings.epochs, "val_ra": self.history[-1]["val_ra"], **dataclasses.asdict(scores["final"])},
            "diff": scores["best"].test_ra - scores["final"].test_ra,
            "robust_gap": scores["final"].robust_gap,
            "density": self.history[-1]["density"],
            "layer_densities": self.history[-1]["layer_densities"],
            "explored": self.history[-1]["explored"],
            "flops": {
                "real": {
                    "inference": by_epoch[-1],
                    "training": flops.real_training(by_epoch, images, settings.train_step),
                },
                "paper": {
                    "inference": paper,
                    "training": flops.paper_training(paper, images, settings.train_step, settings.epochs),
                },
            },
            "seconds": sum(row["seconds"] for row in self.history),
        }


# ---------------------------------------------------------------- evaluation of a checkpoint


def evaluate_checkpoint(settings: Settings, device: torch.device) -> None:
    """``--eval``: print SA, RA and the gap of ``--pretrained``; writes nothing."""
    assert settings.pretrained is not None
    content = load_checkpoint(settings.pretrained)
    data = load_data_for(settings, device)
    spec = content.get("network") or network_spec(settings, data)
    if spec["num_classes"] != len(data.classes):
        raise InputError(f"{settings.pretrained} knows {spec['num_classes']} classes and the data has {len(data.classes)}")
    if len(spec["mean"]) != data.image_shape[0]:
        raise InputError(f"{settings.pretrained} takes {len(spec['mean'])} channels and the images have {data.image_shape[0]}")
    model = build_network({**spec, "image_size": min(data.image_shape[1:])}, device)
    load_weights(model, network_weights(content, settings.pretrained), settings.pretrained, spec["arch"])
    attack = settings.test_attack
    if settings.eval_attack == "autoattack":
        clean, robust = evaluate(model, data.test), auto_attack(model, data.test, attack, seed=settings.seed)
        print(f"test SA {clean.accuracy:.2f}  test RA (AutoAttack) {robust.accuracy:.2f}  on {robust.images} images")
        return
    name = f"PGD-{attack.steps}"
    if settings.eval_attack == "cw":
        attack, name = dataclasses.replace(attack, loss="margin"), f"CW-{attack.steps}"
    scores = final_scores(model, data, attack, seed=settings.seed)
    print(
        f"test RA ({name}) {scores.test_ra:.2f}  test SA {scores.test_sa:.2f}  training RA {scores.train_ra:.2f}"
        f"  robust generalization gap {scores.robust_gap:.2f}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
