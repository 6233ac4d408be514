"""Recipes: values for flags that the user did not set, each with its reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "modern": {
        "lr_schedule": "cosine",  # overfitting begins at a sudden fall (Rice et al., 2020)
        "ema": 0.995,  # averages find flatter minima (Izmailov et al., 2018)
        "label_smoothing": 0.1,  # keeps the network from certainty on attacked images
        "awp": 0.01,  # the authors' value for cross-entropy (Wu, Xia and Wang, 2020)
    },
    "fast": {
        "train_attack": "n-fgsm",  # 5 inferences a step for PGD-10's 23
        "epochs": 30,  # the length of its authors' trainings (de Jorge et al., 2022)
        "lr": 0.2,  # their peak of the cycle
        "lr_schedule": "onecycle",  # short trainings need a rate that rises first
        "ema": 0.995,  # costs next to nothing
    },
}
# Flags that replace another flag of a recipe if the user sets them.
_REPLACED_BY = {"swa": "ema", "decreasing_lr": "lr_schedule"}


def recipe_values(recipe: str, given: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The flags that a recipe sets beside those ``given``, with their values; ``names`` are the
    script's flags, and of two stages the recipe applies to the last."""
    # Flags of both stages: the first, too, has a rate and its milestones.
    shared = {"lr", "decreasing_lr"} if "epochs2" in names else set()
    replaced = {_REPLACED_BY[name] for name in given.keys() - shared if name in _REPLACED_BY}
    found = {}
    for name, value in RECIPES[recipe].items():
        if name in shared:
            continue
        flag = name if name in names else f"{name}2"
        if flag not in given and name not in replaced:
            found[flag] = value
    if "awp" in found and given.get("train_loss") == "trades":
        found["awp"] = 0.005  # the authors' value for TRADES
    return found


def recipe_text(recipe: str, values: dict[str, Any]) -> str:
    """The flags that a recipe has set, as text for the start of a run."""
    flags = " ".join(f"--{name} {value}" for name, value in values.items())
    return f"recipe {recipe}: {flags or 'everything was given'}"
