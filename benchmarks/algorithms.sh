#!/usr/bin/env bash
# Tune every algorithm with the same budget under Dirichlet(0.1), and print the table.
#     bash benchmarks/algorithms.sh digits OUTPUT_DIR [OPTION …]
#     bash benchmarks/algorithms.sh fashion_mnist OUTPUT_DIR --data_dir DIR [OPTION …]
# OPTIONs are those of `sweep.py launch`. All local optimizers are SGD, so that algorithms that are defined
# for SGD alone compare with the others, and reset in each round, as Fednova is defined. It goes on where it was stopped.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dataset=$1
out=$2
source "$here/environment.sh"
use_environment requirements.txt

algorithms=(Fedavg Fedsgd Fedavgm Fedadagrad Fedadam Fedyogi Fedprox Scaffold Fednova Feddyn Moon Fedexp Fedsam Fedcm
    Fedntd Fedlc Feddecorr Feddc Fedbn Fedper Fedrep Lgfedavg Ditto Pfedme Apfl Fedbabu Perfedavg Fedala Finetune Local
    Centralized)
case $dataset in
    digits) sizes=(--rounds 50) ;;
    fashion_mnist) sizes=(--model_arch lenet --samples_per_client 300 --rounds 20) ;;
    *) echo "$dataset is not one of digits, fashion_mnist" >&2; exit 2 ;;
esac

# Trials that diverge are part of the tuning
"$PYTHON" "$here/sweep.py" launch --skip_confirmation --output_dir "$out" --algorithm "${algorithms[@]}" --dataset "$dataset" \
    --num_clients 5 --partition dirichlet --partition_alpha 0.1 --local_optimizer sgd --optimizer_state reset --eval_every 5 \
    --num_hparams 20 --num_trials 3 --halving 2 "${sizes[@]}" \
    --hparams '{"momentum": 0.0, "weight_decay": 0.0, "dropout_rate": 0.0, "batch_size": 32}' "${@:3}" || [ $? -eq 1 ]
"$PYTHON" "$here/collect_results.py" --output_dir "$out" --where "dataset=$dataset"
