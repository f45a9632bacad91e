#!/bin/sh
# On a machine with an NVIDIA GPU: the GPU tests, then the table of step times, in three minutes.
# Results go to $OUT, by default benchmarks/results: step_time_gpu.json and .png, and the tests' log.
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
workers=$($PYTHON -c "import xdist" 2>/dev/null && echo "-n 10")
$PYTHON -m pytest -q -p no:cacheprovider $workers --tb=short tests/test_gpu.py \
    -k "not interpreter and not kernels_compile" >"$OUT/gpu_tests.log" 2>&1
failed=$?
tail -n 15 "$OUT/gpu_tests.log" | cut -c1-160
$PYTHON benchmarks/step_time.py --device cuda --repeats 12 --seconds 5 --profile \
    --output "$OUT/step_time_gpu.json" "$@" 2>"$OUT/step_time_gpu.log" || failed=$?
grep -v Warning "$OUT/step_time_gpu.log" | tail -n 5 | cut -c1-160
exit $failed
