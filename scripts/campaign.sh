#!/usr/bin/env bash
# Table 1 at full length on a GPU that is there for MINUTES: Flying Bird+, dense, Flying Bird, Robust Bird, Flying Bird by
# channels, in this order; each only if it will end in time by the measured pace. Nothing is installed.
#   bash scripts/campaign.sh DATA MINUTES [flags for every run]
# Finished runs are skipped, begun ones resumed. PYTHON chooses the interpreter, OUT the folder of the runs, SMOKE=1 toy
# size; EPOCHS and SEEDS as for scripts/table1.sh. What is worth keeping lies in OUT/packed: at most 8 files of 16 MB.
set -euo pipefail
source "$(dirname "$0")/help.sh"
exec "${PYTHON:-python3}" "$(dirname "$0")/campaign.py" "$@"
