#!/usr/bin/env bash
# Links a subset of an image folder: the first TRAIN and TEST images of each class. Validation is a
# tenth of the training folder, whatever --train_subset says, so this makes it smaller too.
#   bash scripts/link_images.sh FOLDER OUT TRAIN TEST  FOLDER has train/<class>/* and test/<class>/*
set -euo pipefail
source "$(dirname "$0")/help.sh"
data=${1:-} out=${2:-} train=${3:-} test=${4:-}
if [ -z "$out" ] || [[ ! $train =~ ^[1-9][0-9]*$ || ! $test =~ ^[1-9][0-9]*$ ]]; then
    echo "error: link_images.sh takes FOLDER OUT TRAIN TEST, the last two numbers of images" >&2
    exit 2
fi
if [ ! -d "$data/train" ] || [ ! -d "$data/test" ]; then
    echo "error: '$data' is no folder of images with train/<class>/* and test/<class>/*" >&2
    exit 2
fi
wanted="$(realpath -- "$data"): $train training and $test test images of each class"
mkdir -p "$out"
there=$(cat "$out/.linked" 2>/dev/null || echo "other images")
if [ -e "$out/train" ] && [ "$there" != "$wanted" ]; then
    echo "error: $out holds links to $there; remove it or take another folder" >&2
    exit 2
fi
echo "$wanted" > "$out/.linked"
for class in "$data"/train/*/; do
    name=$(basename "$class")
    for part in train test; do
        [ ! -d "$out/$part/$name" ] || continue
        # Written whole or not at all, so an existing folder is complete.
        mkdir -p "$out/$part"
        made=$(mktemp -d "$out/$part/.XXXXXX")
        find -L "$(realpath "$data/$part/$name")" -type f ! -name '.*' -print0 | LC_ALL=C sort -z | sed -z -n "1,${!part}p" | xargs -0 -r ln -s -t "$made"
        chmod 755 "$made"
        mv "$made" "$out/$part/$name"
    done
done
