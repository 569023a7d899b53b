#!/usr/bin/env bash
# Runs the tests of the checkpoint core with numpy and blake3 only, on each of Python 3.11, 3.12 and 3.13 that is here.
#
#     scripts/test_core.sh                  # all of them
#     scripts/test_core.sh 3.13 -k commit   # one of them; what follows goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

versions=(3.11 3.12 3.13)
if [[ ${1:-} == 3.* ]]; then
  versions=("$1")
  shift
fi

for version in "${versions[@]}"; do
  if ! python=$(scripts/find_python.sh "$version"); then
    echo "Python $version is skipped"
    continue
  fi
  venv=.venv-core/$version
  if [[ ! -e $venv/.ready ]]; then
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
      blake3 numpy hypothesis pytest pytest-xdist
    touch "$venv/.ready"
  fi
  echo "Python $version: the checkpoint core with numpy and blake3 only"
  PYTHONPATH=src "$venv/bin/python" -m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile \
    tests/checkpoint "$@"
done
