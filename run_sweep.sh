#!/usr/bin/env bash
# Set up what is missing, run the default sweep, and print its table. Arguments go on to `sweep.py launch`:
#     bash run_sweep.sh --dataset cifar10 --model_arch resnet18 --samples_per_client 10000
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"
use_environment requirements.txt

output_dir=sweep_logs
previous=
for argument in "$@"; do
    case $argument in --output_dir=*) output_dir=${argument#*=} ;; esac
    if [ "$previous" = --output_dir ]; then output_dir=$argument; fi
    previous=$argument
done

code=0
"$PYTHON" "$here/sweep.py" launch --skip_confirmation "$@" || code=$?
if [ $code -le 1 ]; then # all done, or some trials failed: what is done has its table
    "$PYTHON" "$here/collect_results.py" "--output_dir=$output_dir" || code=$?
fi
exit $code
