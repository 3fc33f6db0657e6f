#!/usr/bin/env bash
# Sets everything up, then: format, linter, types, import contracts, tests with coverage. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
scripts/postgres.sh
# The dashboard's tests drive a real browser.
if ! command -v chromium >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "test: installing chromium (once)" >&2
  apt-get update -qq && apt-get install --yes --no-install-recommends -qq chromium >/dev/null
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/lint-imports
# Two workers; the tests of real processes share one of them, so that they do not starve each other.
exec .venv/bin/python -m pytest -n 2 --dist loadgroup --cov --cov-report=term:skip-covered "$@"
