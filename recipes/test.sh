#!/usr/bin/env bash
# Install what is missing, then check the style and run every test: CPU only, no network after the install.
source "$(dirname "$0")/environment.sh" requirements.txt requirements-dev.txt
ruff check .
# one thread a process: the tests start several processes, and tiny models are faster so
OMP_NUM_THREADS=1 exec python -m pytest -q -n 2 --dist loadfile "$@"
