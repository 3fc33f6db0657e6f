#!/usr/bin/env bash
# Sets everything up, then: format, linter, types, import contracts, tests with coverage. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/lint-imports
exec .venv/bin/python -m pytest --cov --cov-report=term:skip-covered "$@"
