#!/usr/bin/env bash
# The paper's dense baseline: bash scripts/dense.sh DATA [flags].
source "$(dirname "$0")/tables.sh"
