#!/usr/bin/env bash
# Does training in bf16 reach the validation RA of float32? Three seeds each on some CIFAR-10 images
# at 16x16, then a table.
#   bash scripts/precision.sh FOLDER       images as train/<class>/* and test/<class>/*
# Takes about 25 minutes on 2 cores. Run again, it skips finished runs and resumes interrupted ones.
set -euo pipefail
source "$(dirname "$0")/help.sh"
data=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.."
out=${OUT:-runs/precision}
bash scripts/link_images.sh "$data" "$out/images" 750 50
QUIET=1 bash scripts/setup.sh

for seed in 1 2 3; do
    for precision in float32 bf16; do
        .venv/bin/python main_adv.py --dataset imagefolder --data "$out/images" --cache_dir "$out/cache" --image_size 16 --width 0.5 \
            --train_subset 2000 --epochs 16 --decreasing_lr 0.5,0.75 --train_step 5 --test_step 10 --eval_every 4 --test_every 16 \
            --seed "$seed" --precision "$precision" --compile off --save_dir "$out/$precision" --resume
    done
done
.venv/bin/python - "$out" << 'END'
import json, pathlib, statistics, sys

print("| precision | best validation RA, by seed | mean | last validation RA, by seed | mean |")
print("|---|---|---|---|---|")
for precision in ("float32", "bf16"):
    runs = [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(pathlib.Path(sys.argv[1], precision).glob("*/metrics.jsonl"))]
    measured = [[row["val_ra"] for row in rows if "val_ra" in row] for rows in runs]
    cells = [precision]
    for values in ([max(run) for run in measured], [run[-1] for run in measured]):
        cells += [" ".join(f"{value:.2f}" for value in values), f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"]
    print("| " + " | ".join(cells) + " |")
END
