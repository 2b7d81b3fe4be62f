#!/usr/bin/env bash
# Everything to measure on a GPU, in under 9 minutes on one H200: kernel tests, then decode speed.
#
#   benchmarks/gpu_suite.sh            # JSON goes to $OUT (default: benchmarks/out), the table is printed last
#   benchmarks/gpu_suite.sh --tiny     # the same steps on the CPU at toy sizes: a dry run of one minute
#
# Needs Python with torch, transformers and rich; popmm need not be installed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/out}
mkdir -p "$OUT"

room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cp -r popmm "$room/popmm"
cp -r adapters "$room/popmm/adapters"
export PYTHONPATH="$room" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

failed=0
bench() { # seconds, name, arguments of popmm bench
    local limit=$1 name=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$PYTHON" -m popmm.cli bench --json "$OUT/$name.json" "$@" || { echo "FAILED: $name"; failed=1; }
}

if [[ "${1:-}" == --tiny ]]; then
    small=(--tiny --dtype float32 --device cpu --compiled --prompt-tokens 12 --new-tokens 8 --rounds 1 --ratios 0.2)
    bench 300 llama-b1 --shape llama-3.1-8b --selections keep,gate4,tiers --int8 "${small[@]}"
    timeout 60 "$PYTHON" benchmarks/kernel_bandwidth.py --tiny || failed=1
    lossless=(--tiny --dtype float32 --device cpu --prompt-tokens 12 --new-tokens 16 --texts 2 --replay 0.94)
    bench 300 llama-lossless --lossless --shape llama-3.1-8b "${lossless[@]}"
    bench 300 qwen-moe-b2 --shape qwen1.5-moe --batch 2 --selections keep "${small[@]}"
else
    "$PYTHON" -c "import torch; assert torch.cuda.is_available(), 'no GPU here: try --tiny'" || exit 1
    if "$PYTHON" -c "import pytest, hypothesis" 2>/dev/null; then
        timeout 120 "$PYTHON" -m pytest -q tests/kernels tests/runtime/test_on_gpu.py || failed=1
    fi
    timeout 60 "$PYTHON" benchmarks/kernel_bandwidth.py || failed=1
    full=(--dtype bfloat16 --layers 8 --rounds 2)
    bench 110 llama-b1 --shape llama-3.1-8b --selections mask,keep,gate4,tiers,tiers8 --ratios 0.4 --int8 "${full[@]}"
    lossless=(--dtype bfloat16 --layers 8 --texts 4 --new-tokens 96 --replay 0.94)
    bench 80 llama-lossless --lossless --shape llama-3.1-8b "${lossless[@]}"
    bench 60 llama-b8 --shape llama-3.1-8b --batch 8 --selections keep --ratios 0.4 --bytes 0.33 "${full[@]}"
    bench 70 qwen-moe-b1 --shape qwen1.5-moe --selections keep,gate4,tiers --ratios 0.2 "${full[@]}"
    bench 60 qwen-moe-b8 --shape qwen1.5-moe --batch 8 --selections keep --ratios 0.2 "${full[@]}"
    bench 60 qwen-vl-b1 --shape qwen2.5-vl-7b --selections keep,gate16 --ratios 0.4 "${full[@]}"
    bench 50 qwen-vl-b8 --shape qwen2.5-vl-7b --batch 8 --selections keep --ratios 0.4 "${full[@]}"
fi
"$PYTHON" benchmarks/table.py "$OUT" || failed=1
exit $failed
