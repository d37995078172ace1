#!/usr/bin/env bash
# Install missing packages and run the tests:
#   bash run_tests.sh --fast    those that start no process of the project: at each save
#   bash run_tests.sh           something real from every room: before a commit
#   bash run_tests.sh --all     with the long ones: what the continuous integration runs
#   bash run_tests.sh --gpu     those that need a GPU
# Passes further arguments to pytest: bash run_tests.sh --all -k channel
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh
use_environment requirements.txt requirements-dev.txt
workers=4  # also on two cores: tests often wait, for a silence to be noticed, or for Slurm
case "${1:-}" in
    --fast) chosen="not process and not slow"; workers=auto; shift ;;  # these never wait: a worker for each core
    --all) chosen=""; shift ;;
    --gpu) chosen="gpu" ;; # stays in the arguments, as pytest has this option, too
    *) chosen="not slow and not slurm" ;;
esac
export OMP_NUM_THREADS=1  # more threads in each worker would only wait for a core
exec "$PYTHON" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder --durations=10 -m "$chosen" "$@"
