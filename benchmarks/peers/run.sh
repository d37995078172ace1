#!/usr/bin/env bash
# Compare the sweep with Flower's simulation engine and with the original scripts, on the same trials:
#     bash benchmarks/peers/run.sh digits [DATA_DIR]
#     bash benchmarks/peers/run.sh fashion_mnist DATA_DIR
# Flower gets an environment of its own on first use, in the user's cache directory or the one that PEERS_VENV names.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
environment=${PEERS_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/fedsweep/peers}
if [[ "$environment" =~ [^A-Za-z0-9_./+-] ]]; then
    # Ray splits the path of its interpreter at spaces, and its workers never start
    echo "Ray cannot run from '$environment': name a directory of letters and digits with PEERS_VENV=DIR" >&2
    exit 2
fi
if [ ! -x "$environment/bin/flwr" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet 'flwr[simulation]>=1.42' -r "$here/../../requirements.txt"
fi
exec "$environment/bin/python" "$here/compare.py" "$@"
