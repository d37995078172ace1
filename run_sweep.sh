#!/usr/bin/env bash
# Install missing packages, run the default sweep, print its table and write its page. Passes arguments to `sweep.py launch`:
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
set -m # else the shell starts the sweep with SIGINT ignored
"$PYTHON" "$here/sweep.py" launch --skip_confirmation "$@" </dev/null &
sweep=$!
# Pass signals on to the sweep: in a container this script may be PID 1, and the only process that gets them.
for signal in HUP INT TERM; do trap "kill -s $signal $sweep 2>/dev/null || true" $signal; done
wait $sweep || code=$?
while kill -0 $sweep 2>/dev/null; do # a signal ended `wait` while the sweep still ends its trials
    code=0
    wait $sweep || code=$?
done
if [ $code -le 1 ] && [ -d "$output_dir" ]; then # all trials done, or some failed: show those that are done
    "$PYTHON" "$here/collect_results.py" "--output_dir=$output_dir" "--html=$output_dir/report.html" || code=$?
fi
exit $code
