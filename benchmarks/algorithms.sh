#!/usr/bin/env bash
# Tune every algorithm with the same budget on digits and Fashion-MNIST under Dirichlet(0.1), and print the tables.
#     bash benchmarks/algorithms.sh DATA_DIR [OUTPUT_DIR]
# DATA_DIR has torchvision's FashionMNIST folder. All local optimizers are SGD, so that algorithms that are defined for
# SGD alone compare with the others, and reset in each round, as Fednova is defined. It goes on where it was stopped.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=$1
out=${2:-algorithms_logs}
source "$here/environment.sh"
use_environment requirements.txt

algorithms=(Fedavg Fedsgd Fedavgm Fedadagrad Fedadam Fedyogi Fedprox Scaffold Fednova Feddyn Moon Fedexp Fedsam Fedcm
    Fedntd Fedlc Feddecorr Feddc Fedbn Fedper Fedrep Lgfedavg Ditto Pfedme Apfl Fedbabu Perfedavg Fedala Finetune Local
    Centralized)
common=(--skip_confirmation --data_dir "$data" --output_dir "$out" --algorithm "${algorithms[@]}" --local_optimizer sgd
    --optimizer_state reset --partition dirichlet --partition_alpha 0.1 --num_trials 3)
fixed='{"momentum": 0.0, "weight_decay": 0.0, "dropout_rate": 0.0, "batch_size": 32}'

# Five hyper-parameter sets each; trials that diverge are part of the tuning
"$PYTHON" "$here/sweep.py" launch "${common[@]}" --dataset digits --num_clients 5 --rounds 50 --eval_every 5 \
    --num_hparams 5 --hparams "$fixed" || [ $? -eq 1 ]
"$PYTHON" "$here/sweep.py" launch "${common[@]}" --dataset fashion_mnist --model_arch lenet --num_clients 5 \
    --samples_per_client 300 --rounds 20 --eval_every 5 --num_hparams 5 --hparams "$fixed" || [ $? -eq 1 ]
"$PYTHON" "$here/collect_results.py" --output_dir "$out"
