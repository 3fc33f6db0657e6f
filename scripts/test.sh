#!/usr/bin/env bash
# Sets everything up, then: format, linter, types, import contracts, tests with coverage. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/lint-imports
# Two workers; the tests of real processes share one of them, so that they do not starve each other.
exec .venv/bin/python -m pytest -n 2 --dist loadgroup --cov --cov-report=term:skip-covered "$@"
