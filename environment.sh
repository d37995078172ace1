# Sourced by the run scripts: sets PYTHON to an interpreter that has the packages of the given requirements files. That is
# the active Python if it has them, else the project's own .venv, which is made or updated here if necessary.

# Messages must not fail if stderr is closed, in which case bash may have opened this script as file 2.
if [ /dev/fd/2 -ef "$0" ] || ! { : >&2; }; then exec 2>/dev/null; fi

use_environment() {
    local here python venv
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    venv="$here/.venv"
    for python in "$(command -v python3)" "$(command -v python)" "$venv/bin/python"; do
        if [ -x "$python" ] && _has_packages "$python" "$@"; then
            PYTHON=$python
            return
        fi
    done
    python=$(command -v python3 || command -v python) || { echo "Python 3.11 or newer is needed; none was found." >&2; return 1; }
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is needed; $python is $("$python" -V 2>&1). Put a newer one first in PATH." >&2
        return 1
    fi
    if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "Making a virtual environment in $venv" >&2
        if ! "$python" -m venv --clear "$venv" >&2; then
            rm -rf "$venv"
            echo "$python cannot make virtual environments: install its venv module (on Debian and Ubuntu the package" \
                 "python3-venv), or activate an environment that has the packages of requirements.txt." >&2
            return 1
        fi
    fi
    echo "Installing packages into $venv (a few minutes the first time)" >&2
    local file files=()
    for file in "$@"; do files+=(-r "$here/$file"); done
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${files[@]}" >&2 || return 1
    PYTHON="$venv/bin/python"
}

# Whether an interpreter is new enough and has every NAME>=VERSION and NAME==VERSION of the requirements files.
_has_packages() {
    local python=$1 here
    here=$(dirname "${BASH_SOURCE[0]}")
    shift
    (cd "$here" && "$python" -I - "$@") 2>/dev/null <<'PYTHON'
import re, sys
from importlib.metadata import version

def numbers(text):
    return [int(part) for part in re.findall(r"\d+", text.split("+")[0])]

if sys.version_info < (3, 11):
    sys.exit(1)
for path in sys.argv[1:]:
    for line in open(path):
        if line.strip():
            name, operator, wanted = re.split("(>=|==)", line.strip())
            found, wanted = numbers(version(name)), numbers(wanted)
            if found < wanted or operator == "==" and found != wanted:
                sys.exit(1)
PYTHON
}
