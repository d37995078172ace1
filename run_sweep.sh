#!/usr/bin/env bash
# Set up what is missing, run the default sweep, print its table and write its page. Arguments go on to `sweep.py launch`:
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
# The sweep gets the signals that this script gets: as PID 1 of a container it is the only one that does.
for signal in HUP INT TERM; do trap "kill -s $signal $sweep 2>/dev/null || true" $signal; done
wait $sweep || code=$?
while kill -0 $sweep 2>/dev/null; do # a signal ended the wait, and the sweep still ends its trials
    code=0
    wait $sweep || code=$?
done
if [ $code -le 1 ] && [ -d "$output_dir" ]; then # all done, or some trials failed: what is done has its table and its page
    "$PYTHON" "$here/collect_results.py" "--output_dir=$output_dir" "--html=$output_dir/report.html" || code=$?
fi
exit $code
