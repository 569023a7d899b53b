#!/usr/bin/env bash
# Prints the interpreter of a version, such as 3.12: on PATH, or installed by pyenv. Fails if there is none.
set -euo pipefail

for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
  if [[ $("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) == "$1" ]]; then
    command -v "$candidate"
    exit
  fi
done
echo "Python $1 was not found on PATH, nor among the versions of pyenv" >&2
exit 1
