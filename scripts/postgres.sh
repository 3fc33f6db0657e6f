#!/usr/bin/env bash
# Installs PostgreSQL's programs for the tests, which start a server of their own: no system cluster is made or started.
# Does nothing where they are; where they cannot be had, the tests that need them say so and fail.
set -euo pipefail
if command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "postgres: PostgreSQL is missing and cannot be installed by itself here (Debian, Ubuntu: apt-get install postgresql)" >&2
  exit 0
fi
echo "postgres: installing PostgreSQL for the tests" >&2
settings=/etc/postgresql-common/createcluster.conf
if [ ! -e "$settings" ]; then
  mkdir -p "$(dirname "$settings")"
  echo 'create_main_cluster = false' >"$settings"
fi
export DEBIAN_FRONTEND=noninteractive UCF_FORCE_CONFFOLD=1
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql >/dev/null; } ||
  echo "postgres: apt-get could not install it" >&2
