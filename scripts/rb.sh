#!/usr/bin/env bash
# The paper's Robust Bird at density .2: bash scripts/rb.sh DATA [flags].
source "$(dirname "$0")/tables.sh"
