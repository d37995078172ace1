#!/usr/bin/env bash
# Tune a study of digits in full and by halving, one after the other, and print both tables and how long each took.
# OUTPUT_DIR must hold nothing of an earlier run.
#     bash benchmarks/full_and_halved.sh OUTPUT_DIR
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$1
source "$here/environment.sh"
use_environment requirements.txt

study=(--algorithm Fedavg Fedprox Scaffold Fedadam Ditto --num_clients 5 --partition dirichlet --partition_alpha 0.1
    --local_optimizer sgd --rounds 50 --num_hparams 20 --num_trials 3)
took=()
for way in full halved; do
    options=()
    [ "$way" = full ] || options=(--halving)
    SECONDS=0
    # Trials that diverge are part of the tuning
    "$PYTHON" "$here/sweep.py" launch --skip_confirmation --output_dir "$out/$way" "${study[@]}" "${options[@]}" ||
        [ $? -eq 1 ]
    took+=("$way: $SECONDS s")
done
for way in full halved; do
    "$PYTHON" "$here/collect_results.py" --output_dir "$out/$way" --columns partition_alpha
done
printf '%s\n' "${took[@]}"
