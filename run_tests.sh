#!/usr/bin/env bash
# Set up what is missing and run the tests. Arguments go on to pytest: bash run_tests.sh -k channel
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh
use_environment requirements.txt requirements-dev.txt
exec "$PYTHON" -m pytest "$@"
