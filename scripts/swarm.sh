#!/usr/bin/env bash
# Sets everything up and trains a small Llama through a whole swarm on this machine.
# Arguments go to `orion up`, e.g.: scripts/swarm.sh --stages 4 --replicas 2 --json
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/orion up runs/local.toml "$@"
