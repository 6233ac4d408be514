#!/usr/bin/env bash
# The paper's Flying Bird at density .2: bash scripts/fb.sh DATA [flags].
source "$(dirname "$0")/tables.sh"
