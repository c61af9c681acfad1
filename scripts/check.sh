#!/usr/bin/env bash
# What must hold before a commit: ruff (lint and format), mypy on framework/, pytest. Arguments go to scripts/test.sh
# (`--all` for the slow tests, too). Runs all four and says which failed.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" dev
cd -- "$repository"

failed=()
check() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}
check 'ruff check' python -m ruff check
check 'ruff format' python -m ruff format --check
check 'mypy' python -m mypy
check 'pytest' bash scripts/test.sh "$@"

if [ "${#failed[@]}" -ne 0 ]; then
    (IFS=,; echo "Failed after $SECONDS s: ${failed[*]}") >&2
    exit 1
fi
echo "All checks passed in $SECONDS s"
