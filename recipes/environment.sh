# Sourced by the recipes: enter the repository, make .venv once, and put it first on the PATH.
# Usage: source recipes/environment.sh requirements.txt [requirements-dev.txt]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("${PYTHON:-python3}" --version) found, Python 3.11 or newer needed; name one with PYTHON=..." >&2
    exit 1
fi
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
export PATH="$PWD/.venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1

for requirements in "$@"; do
    installed=".venv/$requirements.installed"
    if ! cmp -s "$requirements" "$installed"; then
        echo "installing $requirements"
        # fairscale has no wheel and its setup imports torch: torch first, then the rest without build isolation
        pip install -q "$(grep -o '^torch==[^ ]*' requirements.txt)" setuptools wheel
        pip install -q --no-build-isolation -r "$requirements"
        cp "$requirements" "$installed"
    fi
done
