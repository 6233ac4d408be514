#!/usr/bin/env bash
# Table 1 at full length on a GPU that is available for MINUTES: Flying Bird+, dense, Flying Bird,
# Robust Bird, Flying Bird by channels, in this order. A run starts only if it will finish in time
# at the measured pace. Installs nothing.
#   bash scripts/campaign.sh DATA MINUTES [flags for every run]
# Skips finished runs and resumes interrupted ones. PYTHON chooses the interpreter, OUT the folder
# of the runs, SMOKE=1 toy size; EPOCHS and SEEDS as for scripts/table1.sh. Packs what is worth
# keeping into OUT/packed: at most 8 files of 16 MB.
set -euo pipefail
source "$(dirname "$0")/help.sh"
exec "${PYTHON:-python3}" "$(dirname "$0")/campaign.py" "$@"
