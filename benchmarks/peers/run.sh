#!/usr/bin/env bash
# The sweep against Flower's simulation engine and the original's way of running it, on the same trials:
#     bash benchmarks/peers/run.sh digits [DATA_DIR]
#     bash benchmarks/peers/run.sh fashion_mnist DATA_DIR
# Flower gets an environment of its own, benchmarks/peers/.venv, made on first use.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -x "$here/.venv/bin/flwr" ]; then
    python3 -m venv "$here/.venv"
    "$here/.venv/bin/pip" install --quiet 'flwr[simulation]>=1.42' -r "$here/../../requirements.txt"
fi
exec "$here/.venv/bin/python" "$here/compare.py" "$@"
