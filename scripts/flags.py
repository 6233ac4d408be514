"""Every flag, the setting it is, what it is about and the test that shows it: ``python scripts/flags.py > docs/flags.md``.

Flags, defaults and texts are those of the settings themselves; where a flag is explained and tested stands here.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import OneLineParser
from utils.config import CommonSettings, allowed
from utils.config_adv import AdversarialSettings
from utils.config_rb import EarlyBirdSettings
from utils.errors import run_command

Field = dataclasses.Field[Any]

# Section of docs/algorithms.md, test (in tests/), and the settings that both are about.
_WHERE = (
    ("Data", "test_readme.py::test_training_commands", "dataset data"),
    ("Data", "test_data.py::test_images_are_resized_once_by_area", "image_size"),
    ("Data", "test_data.py::test_subsets_are_stratified_and_leave_validation_whole", "train_subset test_subset"),
    ("Data", "test_data.py::test_a_stale_cache_is_rebuilt", "cache_dir"),
    ("Networks", "test_models.py::test_every_family_takes_32_and_64", "arch depth_factor width_factor"),
    ("Networks", "test_models.py::test_small_dense_widths_keep_the_share_of_weights_they_stand_for", "width"),
    ("Running", "test_config.py::test_the_name_covers_what_changes_the_result_and_nothing_else", "seed save_dir"),
    ("Running", "test_config.py::test_devices", "device gpu"),
    ("Running", "test_config.py::test_deterministic_kernels_are_for_gpus", "deterministic"),
    ("Running", "test_metrics.py::test_display_is_plain_lines_without_a_terminal", "print_freq"),
    ("Running", "test_main_adv.py::test_resume_equals_the_run_that_was_never_stopped", "resume"),
    ("Running", "test_resume.py::test_a_finished_run_may_grow", "resume_dir"),
    ("Running", "test_resume.py::test_saving_within_an_epoch_changes_nothing", "save_every save_minutes"),
    ("Running", "test_resume.py::test_a_time_limit_saves_and_says_that_there_is_more", "time_limit"),
    ("Running", "test_tensorboard.py::test_every_figure_of_every_epoch_and_the_picture", "tensorboard"),
    ("Running", "test_distributed.py::test_what_gpus_have_synchronized_goes_on_and_is_evaluated_on_a_cpu", "sync_bn"),
    ("Running", "test_forward.py::test_bf16_keeps_weights_statistics_and_losses_in_float32", "precision"),
    ("Running", "test_forward.py::test_compiled_steps_are_the_same_steps", "compile"),
    ("Evaluation", "test_forward.py::test_tests_may_be_thinned_out", "eval_every test_every"),
    ("Adversarial training", "test_config.py::test_defaults_are_the_papers", "batch_size lr momentum weight_decay epochs"),
    ("Adversarial training", "test_config.py::test_fractions_of_the_run", "decreasing_lr"),
    ("Attacks", "test_main_adv.py::test_training_is_what_the_flags_ask_for", "attack_mode train_eps train_step train_gamma"),
    ("Attacks", "test_config.py::test_random_starts_are_on_and_can_be_turned_off", "train_randinit test_randinit"),
    ("Attacks", "test_main_adv.py::test_other_networks_and_norms_train_on_image_folders", "norm"),
    ("Attacks", "test_main_adv.py::test_eval_takes_checkpoints_of_the_papers_code_and_other_attacks", "test_eps test_step test_gamma"),
    ("Evaluation", "test_main_adv.py::test_eval_gives_the_numbers_the_run_printed", "eval pretrained"),
    ("Evaluation", "test_readme.py::test_evaluation_commands", "eval_attack restarts source eval_dir"),
    ("Flying Bird", "test_main_adv.py::test_flying_bird_keeps_its_density_exactly_and_moves_its_masks", "fb density"),
    ("Flying Bird+: a density that adapts", "test_main_adv.py::test_flying_bird_plus_follows_the_verdict_of_its_own_metrics", "fbp"),
    ("First masks", "test_main_adv.py::test_every_start_trains_as_a_static_baseline", "fix sparse_init"),
    ("Flying Bird", "test_sparse_core.py::test_density_never_drifts_and_dead_weights_stay_zero", "growth"),
    ("Flying Bird", "test_config.py::test_what_cannot_take_effect_is_refused", "reset"),
    ("Flying Bird", "test_config.py::test_every_flag_of_the_specification_is_known", "death redistribution"),
    (
        "Flying Bird",
        "test_config.py::test_every_sparsity_flag_reaches_the_library",
        "death_rate decay_schedule update_frequency dynamic_fre second_frequency",
    ),
    (
        "Flying Bird+: a density that adapts",
        "test_config.py::test_every_sparsity_flag_reaches_the_library",
        "dynamic_epoch epoch_range update_threshold prune_ratio growth_ratio",
    ),
    (
        "Robust Bird",
        "test_robust_bird.py::test_both_stages_are_in_the_metrics_and_the_second_in_the_summary",
        "stage1 epochs1 stage2 epochs2",
    ),
    ("Robust Bird", "test_robust_bird.py::test_robust_accuracy_in_stage_1_on_request", "stage1_ra"),
    ("Robust Bird", "test_robust_bird.py::test_a_trained_network_can_be_pruned_instead", "stage1_pretrained"),
    ("Robust Bird", "test_robust_bird.py::test_channels_are_gone_and_the_checkpoint_knows_its_widths", "pruning"),
    ("Robust Bird", "test_robust_bird.py::test_a_layer_that_the_floor_helps_is_named", "channel_floor"),
    ("Robust Bird", "test_robust_bird.py::test_a_window_of_one_is_a_ticket_after_the_first_epoch", "eb_window"),
    ("Robust Bird", "test_robust_bird.py::test_no_ticket_in_time_is_a_warning_and_the_last_mask_is_taken", "eb_tolerance"),
)
PLACES = {name: (section, test) for section, test, names in _WHERE for name in names.split()}
_HEAD = """# Flags
Flag, the setting it is, where it is explained and the test that shows it. Made by `python scripts/flags.py > docs/flags.md`; do not edit.
Flags are spelled with `_` or `-`; those that are on by default are turned off by `--no-...`. Eps and step sizes are in 1/255.
"""


def main() -> None:
    OneLineParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    own = [f for f in dataclasses.fields(AdversarialSettings) if f.name not in _names(CommonSettings)]
    birds = [f for f in dataclasses.fields(EarlyBirdSettings) if f.name not in _names(CommonSettings)]
    parts = {
        "Every script": (CommonSettings.__name__, dataclasses.fields(CommonSettings)),
        "main_adv.py": (AdversarialSettings.__name__, own),
        "Robust-Bird/train_eb.py and train_base.py": (EarlyBirdSettings.__name__, birds),
    }
    print(_HEAD)
    print("\n\n".join(f"## {title}\n{table(setting, fields)}" for title, (setting, fields) in parts.items()))
    print("\n`train_base.py` has no `--eb_window` and no `--eb_tolerance`.")
    print("In both the default of `--print_freq` is 100, that of `--decreasing_lr` 50,150.")


def _names(kind: type[CommonSettings]) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def table(setting: str, fields: Sequence[Field]) -> str:
    """A line a flag, in the order of ``--help``."""
    lines = ["| flag | setting | default | what | section | test |", "|---|---|---|---|---|---|"]
    return "\n".join(lines + [_line(setting, f) for f in fields])


def _line(setting: str, f: Field) -> str:
    section, test = PLACES[f.name]
    choices = f" ({', '.join(allowed(f))})" if allowed(f) else ""
    file = test.split("::")[0]
    link = f"[{section}](algorithms.md#{anchor(section)})"
    return f"| `--{f.name}` | `{setting}.{f.name}` | {_default(f)} | {f.metadata['help']}{choices} | {link} | [{test}](../tests/{file}) |"


def _default(f: Field) -> str:
    if isinstance(f.default, bool):
        return "on" if f.default else "off"
    return "" if f.default is None else f"`{f.default}`"


def anchor(heading: str) -> str:
    """The link that a Markdown heading has."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    sys.exit(run_command(main))
