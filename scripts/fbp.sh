#!/usr/bin/env bash
# The paper's Flying Bird+, starting at density .2: bash scripts/fbp.sh DATA [flags].
source "$(dirname "$0")/tables.sh"
