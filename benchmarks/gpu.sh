#!/usr/bin/env bash
# Measure a GPU, and print which code paths and defaults follow from the figures:
#     bash benchmarks/gpu.sh                          all parts, under 8 minutes on an H100 with 16 cores
#     bash benchmarks/gpu.sh steps pfl                these parts
#     bash benchmarks/gpu.sh --device cpu --tiny      the same code on any machine, under 2 minutes; its figures mean nothing
# Parts: tests, steps, at_once, pfl, headline, see --help. Data are random, nothing is downloaded. It needs a
# Python with torch; part `tests` needs pytest, and pfl itself is measured where it is installed.
# Each measurement is a line of JSON in gpu_results.jsonl (--output FILE), from which the tables are printed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$here/environment.sh"
use_environment benchmarks/gpu/requirements.txt
exec "$PYTHON" "$here/benchmarks/gpu/run.py" "$@"
