#!/usr/bin/env bash
# run.sh DIR OUT [OPTION...]: on a GPU machine, with the wheels of DIR (`wheels.sh`): installs them and kdpipe into a
# folder of its own, runs the tests that need a CUDA device, then `tests/benchmarks/gpu.py` with the OPTIONs. Logs and
# tables are in OUT. Where a part fails, the next one runs all the same, and the exit status is 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
wheels=$(realpath "$1") out=$(realpath -m "$2")
shift 2
python=${PYTHON:-python3}
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
pip=("$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade
    --target "$site")
mkdir "$site/.source" # setuptools leaves its work where it builds
cp -r cache distill pipelines pyproject.toml README.md LICENSE "$site/.source"
{ "${pip[@]}" "$wheels"/*.whl && "${pip[@]}" --no-build-isolation "$site/.source"; } >"$out/install.log" 2>&1 ||
    { cat "$out/install.log"; exit 1; }
status=0
# a process per file, so that one which is stopped still says what failed before
export python out
grep -rl --include='test_*.py' 'mark\.cuda' tests | xargs -P 8 -I FILE bash -c '
    timeout -s INT -k 10 "${TEST_SECONDS:-240}" "$python" -m pytest -q -m cuda -rs --durations=5 --timeout=120 -W default \
        --disable-warnings -p no:cacheprovider FILE >"$out/$(echo FILE | tr / -).log" 2>&1' || status=1
cat "$out"/tests-*.log >"$out/tests.log" && rm "$out"/tests-*.log
cat "$out/tests.log"
"$python" tests/benchmarks/gpu.py --out "$out" "$@" 2>&1 | tee "$out/benchmark.log" || status=1
exit "$status"
