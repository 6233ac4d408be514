# What the scripts of tables and figures share; each reads it with "source" and is called as
#   bash scripts/<name>.sh DATA [flags for every run]
# DATA is the folder of a data set (its name or its contents say which), or "digits". Set before the command, as in "SEEDS='1 2 3' bash ...":
#   SEEDS="1"          seeds of every run, as "1 2 3"      EPOCHS=200      length of the adversarial training (and most of stage 1)
#   JOBS=1             runs at a time, over all GPUs       OUT=runs/<name>-<data set>   where everything goes
#   WIDTH=1            of ResNets and VGGs                 DATASET, PAPER  what DATA is; whose row of the paper to lay beside it
#   UPDATE_FREQUENCY=900 SECOND_FREQUENCY=1200             steps between mask updates, for data sets of another size than CIFAR-10
#   PLAN=1             only say what is finished and how long the rest will take, after downloading CIFAR or SVHN where it is not there
#   SMOKE=1            everything at toy size, in at most 3 minutes
#   SLURM=1            an array job of the same script instead; SBATCH="--gres=gpu:1 --time=8:00:00" goes to sbatch
# Finished runs are skipped and cut ones go on, so the same command again is always right.
set -euo pipefail

table_begin() {
    self=$(realpath "$0")
    name=$(basename "$0" .sh)
    case ${1:-} in
        -h | --help | "")
            # What a script does stands in its first lines.
            sed -s -n '1,/^[^#]/{/^#!/d;s/^# \{0,1\}//p}' "$self" "$(dirname "$self")/table.sh"
            [ -n "${1:-}" ] && exit 0
            echo "error: the folder of the data is missing" >&2
            exit 2
            ;;
    esac
    data=$1
    shift
    extra=("$@")
    [ ! -e "$data" ] || data=$(realpath "$data")
    cd "$(dirname "$self")/.."
    [ -n "${TASK:-}" ] || QUIET=1 bash scripts/setup.sh
    python=$PWD/.venv/bin/python
    dataset=${DATASET:-$(guess_dataset "$data")} || exit 2
    out=${OUT:-runs/$name-$dataset${SMOKE:+-smoke}}
    seeds=${SEEDS:-1}
    jobs=${JOBS:-1}
    width=${WIDTH:-1}
    check_number JOBS "$jobs"
    [[ $seeds =~ ^[0-9\ ]+$ ]] || { echo "error: SEEDS are numbers with spaces between, as in \"1 2 3\", not '$seeds'" >&2; exit 2; }
    [ -z "${EPOCHS:-}" ] || check_number EPOCHS "$EPOCHS"
    for other in EPOCH SEED JOB; do
        [ -z "${!other:-}" ] || echo "note: $other is not looked at; did you mean ${other}S?" >&2
    done
    runs=()
    checks=()
}

check_number() {
    [[ $2 =~ ^[0-9]+$ ]] || { echo "error: $1 is a number, not '$2'" >&2; exit 2; }
}

# Which data set a folder holds, by what lies in it, else by its name.
guess_dataset() {
    [ "$1" != digits ] || { echo digits; return; }
    "$python" -m data.guess "$1" ||
        { echo "error: '$1' has neither train/<class>/* nor the name of a known data set; DATASET=... says what it is" >&2; return 1; }
}

# A run: its script and its flags. Those that came with the call stand last, so that they win.
run() {
    local script=$1 arch=resnet18 slim=1 i
    shift
    local flags=("$@") size=()
    for ((i = 0; i < ${#flags[@]}; i++)); do
        [ "${flags[i]}" != --arch ] || arch=${flags[i + 1]}
        [ "${flags[i]}" != --width ] || slim=${flags[i + 1]}
    done
    local scale=$width
    [ -z "${SMOKE:-}" ] || scale=0.0625
    if [ "$arch" = wideresnet ]; then
        [ -z "${SMOKE:-}" ] || size=(--depth_factor 10 --width_factor 1)
    elif [ "$scale" != 1 ] || [ "$slim" != 1 ]; then
        size=(--width "$(awk "BEGIN { print $scale * $slim }")")
    fi
    [ "$dataset" = digits ] || size+=(--data "$data")
    [ -z "${SMOKE:-}" ] || size+=(--train_subset 64 --test_subset 32 --batch_size 16 --train_step 1 --test_step 1)
    runs+=("$(printf '%q ' "$script" "$@" --dataset "$dataset" "${size[@]}" --save_dir "$out" --resume "${extra[@]}")")
}

# A run of main_adv.py, with its schedule in the paper's proportions where it is not 200 epochs long.
adv() {
    local epochs=${EPOCHS:-} length=()
    [ -z "${SMOKE:-}" ] || epochs=3
    [ -z "$epochs" ] || length=(--epochs "$epochs" --decreasing_lr 0.5,0.75)
    case " $* " in *" --fbp "*) [ -z "$epochs" ] || length+=(--dynamic_epoch 0.5) ;; esac
    run main_adv.py "$@" "${length[@]}"
}

# A run of Flying Bird (--fb) or Flying Bird+ (--fbp).
flying() {
    local first=${UPDATE_FREQUENCY:-} second=${SECOND_FREQUENCY:-} often=()
    [ -z "${SMOKE:-}" ] || { first=2 second=2; }
    [ -z "$first" ] || often+=(--update_frequency "$first")
    [ -z "$second" ] || often+=(--second_frequency "$second")
    adv "$@" --dynamic_fre "${often[@]}"
}

# A run of Robust Bird.
bird() {
    local epochs=${EPOCHS:-} length=()
    [ -z "${SMOKE:-}" ] || epochs=3
    [ -z "$epochs" ] || length=(--epochs1 "$epochs" --epochs2 "$epochs" --decreasing_lr 0.25,0.75)
    run Robust-Bird/train_eb.py --stage1 sgd --stage2 pgd "$@" "${length[@]}"
}

# A strong evaluation of every run's best model, after the trainings: flags of main_adv.py --eval.
check() {
    checks+=("$*")
}

# Trains what is not finished, evaluates, and writes the report; arguments go to scripts/report.py.
table_end() {
    if [ -n "${TASK:-}" ]; then
        one "$TASK"
        exit
    fi
    local plan
    plan=$(printf '%s\n' "${runs[@]}" | "$python" scripts/plan.py --jobs "$jobs") || exit $?
    [ ${#checks[@]} -eq 0 ] || echo "then ${#checks[@]} strong evaluation(s) of each, whose time is not in this" >&2
    mapfile -t folders < <(cut -f 3 <<< "$plan")
    mapfile -t left < <(awk -F '\t' '$2 != "finished" { print $1 }' <<< "$plan")
    [ -z "${PLAN:-}" ] || return 0
    if [ -n "${SLURM:-}" ] && [ -z "${REPORT:-}" ]; then
        submit "$@"
        return
    fi
    mkdir -p "$out"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    : > "$work/failed"
    if [ -z "${REPORT:-}" ]; then
        labels=("${folders[@]}")
        all_at_once one "${left[@]}"
    else  # the tasks of the array have ended
        jobs=1
        for number in "${left[@]}"; do echo "3  ${folders[number]}" >> "$work/failed"; done
    fi
    evaluate_all
    report "$@"
    leave_if_failed
}

report() {
    local finished=() paper=() folder
    [ -z "${PAPER:-}" ] || paper=(--paper "$PAPER")
    for folder in "${folders[@]}"; do [ ! -f "$folder/summary.json" ] || finished+=("$folder"); done
    [ ${#finished[@]} -eq 0 ] || "$python" scripts/report.py "${finished[@]}" --out "$out/report" "${paper[@]}" "$@"
}

leave_if_failed() {
    [ -s "$work/failed" ] || return 0
    echo "not finished, the same command goes on with them:" >&2
    sort "$work/failed" >&2
    exit "$(awk '{ print $1 }' "$work/failed" | sort -n | tail -n 1)"
}

# Run number $1.
one() {
    eval "set -- ${runs[$1]}"
    "$python" "$@"
}

evaluate_all() {
    local folder flags where=() i
    [ "$dataset" = digits ] || where=(--data "$data")
    for ((i = 0; i < ${#extra[@]}; i++)); do  # those of the call that are about how and where
        case ${extra[i]} in
            --device | --gpu | --cache[_-]dir | --time[_-]limit) where+=("${extra[i]}" "${extra[i + 1]}") ;;
        esac
    done
    evaluations=()
    labels=()
    for flags in "${checks[@]}"; do
        for folder in "${folders[@]}"; do
            [ -f "$folder/summary.json" ] || continue
            evaluations+=("$(printf '%q ' --eval --pretrained "$folder/model_RA_best.pth.tar" "${where[@]}") $flags")
            labels+=("evaluation of $folder")
        done
    done
    all_at_once evaluation "${!evaluations[@]}"
}

evaluation() {
    eval "set -- ${evaluations[$1]}"
    "$python" main_adv.py "$@"
}

# Each number after the function $1 to it, JOBS at a time; what fails is noted and the others go on. Ends the script if asked to stop.
all_at_once() {
    local what=$1 cores pid code=0
    shift
    [ $# -gt 0 ] || return 0
    cores=$(nproc)
    gpus=${CUDA_VISIBLE_DEVICES:-$( (nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null || true) | paste -s -d ,)}
    if [ "$jobs" -gt 1 ] && [ -z "$gpus" ]; then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / jobs > 0 ? cores / jobs : 1))}
    fi
    # Processes of their own know the functions and arrays by this file.
    { declare -p runs labels python work gpus jobs; declare -p evaluations 2> /dev/null || true; declare -f one evaluation one_of_many; } > "$work/known"
    printf '%s\n' "$@" > "$work/numbers"
    # In the background, where it and its children do not see Ctrl-C: a run asks for it itself, saves, and then all is known here.
    xargs -P "$jobs" --process-slot-var=SLOT -I{} bash -c 'source "$0/known"; one_of_many "$@"' "$work" "$what" {} < "$work/numbers" &
    pid=$!
    trap : INT
    trap 'for child in $(pgrep -P "$pid"); do pkill -TERM -P "$child" || true; done' TERM
    while kill -0 "$pid" 2> /dev/null; do
        code=0
        wait "$pid" || code=$?
    done
    trap - INT TERM
    # 123 and 124: something failed, or was asked to stop, and is noted.
    [[ $code =~ ^(0|123|124)$ ]] || { echo "error: xargs ended with $code" >&2; exit 1; }
    ! grep -qE '^(75|130|143) ' "$work/failed" || leave_if_failed
}

one_of_many() {
    local code=0 each
    if [ -n "$gpus" ] && [ "$jobs" -gt 1 ]; then
        IFS=, read -r -a each <<< "$gpus"
        export CUDA_VISIBLE_DEVICES=${each[$((SLOT % ${#each[@]}))]}
    fi
    "$1" "$2" || code=$?
    [ "$code" = 0 ] || echo "$code  ${labels[$2]}" >> "$work/failed"
    # Asked to stop, so are all: 255 tells xargs to begin nothing more.
    case $code in 75 | 130 | 143) exit 255 ;; esac
}

# An array job with a task for each run that is left, and the report when all have ended.
submit() {
    local numbers id call
    mkdir -p "$out"
    call=$(printf '%q ' bash "$self" "$data" "${extra[@]}")
    call="cd $(printf '%q' "$PWD") && OUT=$(printf '%q' "$out") $call"
    numbers=$(IFS=,; echo "${left[*]}")
    local dependency=()
    if [ -n "$numbers" ]; then
        # shellcheck disable=SC2086
        id=$(sbatch --parsable --job-name "$name" --array "$numbers%$jobs" --output "$out/slurm-%A_%a.out" ${SBATCH:-} --wrap "export TASK=\$SLURM_ARRAY_TASK_ID; $call")
        dependency=(--dependency "afterany:${id%%;*}")
        echo "submitted array job $id for ${#left[@]} runs"
    fi
    # shellcheck disable=SC2086
    id=$(sbatch --parsable --job-name "$name-report" "${dependency[@]}" --output "$out/slurm-%j-report.out" ${SBATCH:-} --wrap "export REPORT=1; $call")
    echo "submitted job $id for the report: $out/report"
}
