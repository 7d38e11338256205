#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes:
#
#   OUT=folder bench/gpu.sh
#
# compile ahead, gpu-marked tests, compute-sanitizer, kernel and step benchmark. Parts run one after
# the other; one that fails or runs out of time does not stop the next. $OUT receives log.txt,
# summary.txt, *.jsonl and plots.tar. Exit status: 0 if every test and every check passed.
# Needs nothing from the network and no installation; bench/README.md lists the packages.
#
# From the environment, all optional:
#   OUT       folder for results (./gpu-out)        PYTHON  interpreter (python3)
#   PARTS     which parts, in order (all but data)  COMMIT  recorded where there is no git history
#   DEVICE    cuda, or cpu to try the script        SECONDS_IN_ALL  (570)
#   STATIC, TESTS, KERNELS, STEP, DATA   options of these parts in place of the usual ones
set -u

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
PARTS=${PARTS:-machine static tests memcheck racecheck kernels step}
OUT=${OUT:-gpu-out}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
END=${SECONDS_IN_ALL:-570}
LOG=$OUT/log.txt
: >"$LOG"
cd "$ROOT" || exit 2

# `sparsemae` as it would be installed: kernels/ and bench/ are packages inside it
TREE=$(mktemp -d)
trap 'rm -rf "$TREE"' EXIT
mkdir "$TREE/sparsemae"
for entry in "$ROOT"/sparsemae/* "$ROOT/kernels" "$ROOT/bench"; do
    ln -s "$entry" "$TREE/sparsemae/"
done
export PYTHONPATH=$TREE${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

status=0
results=()

# part NAME LIMIT COMMAND...: run within LIMIT seconds and what is left of all; keep its result
part() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    ((limit > END - SECONDS)) && limit=$((END - SECONDS))
    if ((limit < 5)); then
        results+=("$name: left out, no time")
        status=1
        return 1
    fi
    printf '\n===== %s (at %d s, at most %d s): %s\n' "$name" "$start" "$limit" "$*" >>"$LOG"
    timeout -k 5 "$limit" "$@" >>"$LOG" 2>&1
    code=$?
    case $code in
    0) results+=("$name: passed in $((SECONDS - start)) s") ;;
    124 | 137) results+=("$name: OUT OF TIME after $((SECONDS - start)) s") ;;
    *) results+=("$name: FAILED with $code in $((SECONDS - start)) s") ;;
    esac
    return $code
}

skip() {
    results+=("$1: skipped, $2")
}

DESCRIBE='
import sys
import torch
import triton

print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), "cuDNN", torch.backends.cudnn.version())
'
chip() {
    "$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"sm_{major}{minor}")'
}

digest() {
    "$PYTHON" - "$OUT" <<'PY'
import json
import sys
from pathlib import Path


def rows(name):
    path = Path(sys.argv[1]) / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def number(value, unit=""):
    return "" if value is None else f"{value:.3g}{unit}"


for row in rows("kernels.jsonl"):
    if row.get("refused"):
        print(f"refused: {row['case']}, {row['backend']}: {row['refused']}")
    elif row["case"].startswith(("ceiling", "encoder")):
        speed = number(row.get("tflops"), " TFLOP/s") + number(row.get("gbps"), " GB/s")
        ratios = number(row.get("ratio"), "x dense ") + number(row.get("ratio_spconv"), "x spconv")
        print(f"{row['case']}, {row['backend'] or ''} {number(row['ms'])} ms {speed} {ratios}")
    elif row["case"] == "left out":
        print(f"left out for time: {len(row['cases'])} cases")
for row in rows("step.jsonl"):
    peak = number(row["peak_ratio"], "x memory")
    print(f"{row['variant']}: {number(row['ms'])} ms, {number(row['ratio'], 'x')}, {peak}")
PY
}

if [[ $DEVICE == cuda ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device here; DEVICE=cpu tries the script" >&2
    exit 2
fi
SANITIZER=$(command -v compute-sanitizer || true)
[[ $DEVICE == cuda ]] || SANITIZER=

for name in $PARTS; do
    case $name in
    machine)
        command -v nvidia-smi >/dev/null && nvidia-smi >>"$LOG" 2>&1
        part machine 60 "$PYTHON" -c "$DESCRIBE" || status=1
        ;;
    static) # fills Triton's cache on all cores, so that nothing below waits for the compiler
        options=${STATIC-}
        [[ -z $options && $DEVICE == cuda ]] && options="--chip $(chip)"
        if [[ -z $options ]]; then
            skip static "no chip to compile for"
            continue
        fi
        # shellcheck disable=SC2086  # options are words
        part static 100 "$PYTHON" -m sparsemae.bench static $options --json "$OUT/static.jsonl"
        ;;
    tests)
        files=$(grep -rlE 'mark\.gpu' tests --include='test_*.py')
        if [[ -z $files ]]; then
            skip tests "none is marked gpu"
            continue
        fi
        needs='blosc2, nibabel, pydantic, safetensors, scipy, tomli_w'
        if ! "$PYTHON" -c "import $needs" 2>>"$LOG"; then
            files=$(grep -E '^tests/kernels/' <<<"$files")
            skip "tests of loader, trainer and prediction" "a package that they need is missing"
        fi
        # shellcheck disable=SC2086
        part tests 170 "$PYTHON" -m pytest -m gpu -p no:cacheprovider -q ${TESTS-} $files || status=1
        ;;
    memcheck | racecheck)
        if [[ -z $SANITIZER ]]; then
            skip "$name" "no compute-sanitizer for $DEVICE"
            continue
        fi
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor an allocation with bounds of its own
        part "$name" 60 "$SANITIZER" --tool "$name" --error-exitcode 9 \
            "$PYTHON" -m sparsemae.bench.sanitize "$DEVICE"
        [[ $? == 9 ]] && status=1 # anything else says the tool failed, not the kernels
        unset PYTORCH_NO_CUDA_MEMORY_CACHING
        ;;
    kernels)
        budget=$((END - SECONDS - 170)) # leaves the last case and the step their time
        budget=$((budget > 150 ? 150 : budget < 1 ? 1 : budget))
        # shellcheck disable=SC2086
        part kernels 200 "$PYTHON" -m sparsemae.bench kernels --device "$DEVICE" \
            ${KERNELS---seconds 0.2} --budget "$budget" \
            --json "$OUT/kernels.jsonl" --plot "$TREE/plots" || status=1
        [[ -d $TREE/plots ]] && tar -C "$TREE" -cf "$OUT/plots.tar" plots
        ;;
    step)
        # shellcheck disable=SC2086
        part step 170 "$PYTHON" -m sparsemae.bench step --device "$DEVICE" \
            ${STEP---patch 160 --batch 2 --dtype bfloat16 --rounds 3} \
            --json "$OUT/step.jsonl" || status=1
        ;;
    data)
        # shellcheck disable=SC2086
        part data 240 "$PYTHON" -m sparsemae.bench data --device "$DEVICE" \
            ${DATA---part augment --part wait --patch 160 --patch 96 --workers 8 --steps 30} \
            --json "$OUT/data.jsonl" || status=1
        ;;
    *)
        echo "PARTS: unknown part $name" >&2
        exit 2
        ;;
    esac
done

{
    echo
    grep -E '^(FAILED|ERROR) |violations$|ERROR SUMMARY|RACECHECK SUMMARY' "$LOG" | head -40
    digest
    echo
    printf '%s\n' "${results[@]}"
    echo "results in $OUT; exit status $status"
} 2>&1 | tee "$OUT/summary.txt"
exit $status
