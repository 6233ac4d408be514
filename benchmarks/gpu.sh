#!/usr/bin/env bash
# Everything to know of a GPU in at most 8 minutes: tests, benchmarks, a real run of 3 epochs; a short table comes last.
#   bash benchmarks/gpu.sh [folder of images, as for --dataset imagefolder; the digits without]
# PYTHON chooses the interpreter; nothing is installed. Logs and the run go to OUT (default: runs/gpu).
set -uo pipefail
source "$(dirname "$0")/../scripts/help.sh"
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
    echo "error: no torch that sees a GPU on this machine; PYTHON chooses the interpreter" >&2
    exit 2
fi
mkdir -p "$out"

timeout 180 "$python" -m pytest tests/test_cuda.py tests/test_engine.py tests/test_sparse_core.py 2>&1 | tee "$out/tests.log"
tests=${PIPESTATUS[0]}
timeout 150 "$python" benchmarks/step.py --json > "$out/step.json" 2> "$out/step.err" || cat "$out/step.err"
timeout 60 "$python" benchmarks/parts.py --json > "$out/parts.json" 2> "$out/parts.err" || cat "$out/parts.err"
data=(--dataset digits --batch_size 64)
if [ $# -gt 0 ]; then
    data=(--dataset imagefolder --data "$1" --cache_dir "$out/cache")
fi
timeout 120 "$python" main_adv.py "${data[@]}" --fb --epochs 3 --update_frequency 20 --save_dir "$out/runs" --resume 2>&1 | tee "$out/run.log"

echo
[ "$tests" = 0 ] && echo "tests: passed" || echo "tests: pytest ended with $tests (124: out of time), see $out/tests.log"
"$python" - "$out" << 'END'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
for name in ("step", "parts"):
    try:
        record = json.loads((out / f"{name}.json").read_text())
    except ValueError:
        print(f"{name}: did not finish")
        continue
    if name == "step":
        print(f"{'':34s}{'ms a step':>11s}{'ratio':>8s}{'of the ceiling':>16s}")
        for row in record["rows"]:
            ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
            print(f"{row['name']:34s}{row['ms']:11.2f}{ratio:>8s}{100 * row['share']:14.0f} %")
    else:
        parts = record["epoch_seconds"]
        print(f"an epoch of CIFAR-10 takes {sum(parts.values()):.1f} s: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()))
END
grep -E '^epoch|is finished' "$out/run.log" || echo "the run did not get through an epoch, see $out/run.log"
