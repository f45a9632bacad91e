#!/bin/sh
# On a machine with an NVIDIA GPU: the GPU tests, then all that is measured on one, within $BUDGET
# seconds (by default three minutes; what there is no time for is named). A part that fails stops no
# other. Results go to $OUT, by default benchmarks/results: step_time_gpu.json and .png, and logs.
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-180}
begin=$(date +%s)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
left() { echo $((BUDGET - $(date +%s) + begin)); }
measure() {
    timeout -k 5 $(($(left) + 10)) $PYTHON benchmarks/gpu.py --output "$OUT/step_time_gpu.json" \
        --until $((begin + BUDGET)) "$@" >>"$OUT/step_time_gpu.log" 2>&1
}

workers=$($PYTHON -c "import xdist" 2>/dev/null && echo "-n 10")
timeout -k 5 $((BUDGET * 2 / 5)) $PYTHON -m pytest -q -p no:cacheprovider $workers --tb=short \
    tests/test_gpu.py -k "not interpreter and not kernels_compile" >"$OUT/gpu_tests.log" 2>&1
failed=$?
[ $failed -eq 0 ] || echo "GPU tests: status $failed, see $OUT/gpu_tests.log"
tail -n 15 "$OUT/gpu_tests.log" | cut -c1-160

: >"$OUT/step_time_gpu.log"
measure "$@"
status=$?
while [ $status -eq 3 ] && [ "$(left)" -gt 20 ]; do # CUDA was lost: a new process goes on
    measure --resume "$@"
    status=$?
done
[ $status -eq 0 ] || failed=$status
[ "$OUT/step_time_gpu.json" -nt "$OUT/gpu_tests.log" ] &&
    $PYTHON benchmarks/step_table.py "$OUT/step_time_gpu.json" || tail -n 5 "$OUT/step_time_gpu.log"
exit $failed
