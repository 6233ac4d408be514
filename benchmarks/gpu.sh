#!/usr/bin/env bash
# Checks a GPU in at most 8 minutes: tests, benchmarks and a real run of 3 epochs; prints a short
# table at the end.
#   bash benchmarks/gpu.sh [--device cpu] [folder of images, as for --dataset imagefolder]
# Without a folder it takes the digits.
# PYTHON chooses the interpreter; installs nothing. All files go to OUT (default: runs/gpu).
# --device cpu tries out the script itself, at toy size.
set -uo pipefail
source "$(dirname "$0")/../scripts/help.sh"
caller=$PWD
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
device=cuda
if [ "${1:-}" = --device ]; then
    device=${2:-}
    shift $(($# < 2 ? $# : 2))
fi
case $device in cpu | cuda) ;; *) echo "error: --device is cpu or cuda, not '$device'" >&2; exit 2 ;; esac
[ $# = 0 ] || images=$(cd "$caller" && realpath -m -- "$1")
if [ $# -gt 1 ] || { [ $# = 1 ] && [ ! -d "$images" ]; }; then
    echo "error: gpu.sh takes one folder of images, not '$*'" >&2
    exit 2
fi
if [ $device = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
    echo "error: no torch that sees a GPU on this machine; PYTHON chooses the interpreter" >&2
    exit 2
fi
mkdir -p "$out"
data=(--dataset digits --batch_size 64)
if [ $# -gt 0 ]; then
    data=(--dataset imagefolder --data "$images" --cache_dir "$out/cache")
fi
timed=(--device "$device" --json)
if [ $device = cpu ]; then
    timed+=(--quick --repeats 1 --width 0.25 --batch_size 8 --train_step 1)
    data+=(--width 0.0625 --train_subset 128 --test_subset 32 --train_step 1 --test_step 1)
fi
frequency=$([ $device = cpu ] && echo 2 || echo 20)

# bench SECONDS NAME [flags]: runs a benchmark and saves its JSON
bench() {
    timeout "$1" "$python" "benchmarks/$2.py" "${timed[@]}" "${@:3}" > "$out/$2.json" 2> "$out/$2.err" || tail -n 3 "$out/$2.err"
}

timeout 90 "$python" -m pytest -q tests/test_cuda.py 2>&1 | tee "$out/tests.log"
tests=${PIPESTATUS[0]}
bench 150 step
bench 90 channels
bench 45 parts
timeout 100 "$python" main_adv.py "${data[@]}" --device "$device" --fb --epochs 3 --update_frequency $frequency --save_dir "$out/runs" --resume 2>&1 | tee "$out/run.log"

echo
[ "$tests" = 0 ] && echo "tests: no failure, see $out/tests.log" || echo "tests: pytest ended with $tests (124: out of time), see $out/tests.log"
"$python" - "$out" << 'END'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
for name in ("step", "channels", "parts"):
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
    elif name == "channels":
        for row in record["rows"]:
            print(f"{row['network']:34s}{row['ms']:11.2f}{row['faster']:7.2f}x  with {row['fewer FLOPs']:.2f}x fewer FLOPs")
    else:
        parts = record["epoch_seconds"]
        print(f"an epoch of CIFAR-10 takes {sum(parts.values()):.1f} s: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()))
END
grep -E '^epoch|is finished|everything is in' "$out/run.log" || { echo "the run did not get through an epoch, see $out/run.log"; exit 3; }
exit "$tests"
