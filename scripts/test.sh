#!/usr/bin/env bash
# The tests: makes or reuses the virtual environment and runs pytest, without the tests marked slow, with a process for
# each core.
#   scripts/test.sh --all     all tests
# Other arguments go to pytest. Runs from any folder; paths are the repository's.
set -euo pipefail
selection=(-m 'not slow')
arguments=()
for argument in "$@"; do
    if [ "$argument" = --all ]; then
        selection=()
    else
        arguments+=("$argument")
    fi
done
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" test
cd -- "$repository"

if [ "${#selection[@]}" -eq 0 ]; then
    echo "Running all tests"
else
    echo "Running the tests, except slow ones (scripts/test.sh --all runs everything)"
fi
status=0
# The longer spelling of the arrays: an empty one is an unbound variable to bash before 4.4.
python -m pytest -n auto --maxprocesses 8 ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"} || status=$?
echo "The tests took $SECONDS s, the environment included"
exit "$status"
