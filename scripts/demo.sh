#!/usr/bin/env bash
# From nothing to a domain-adaptation result on real images: makes or reuses the virtual environment, writes the digits
# to data/digits, and trains and compares three methods with one seed. Arguments go to experiments/compare_methods.py,
# after those below; `scripts/demo.sh --help` lists them. Runs from any folder; what it writes lies in the repository.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" digits
cd -- "$repository"
installed=$SECONDS

echo "Writing the digits to data/digits"
python scripts/prepare_digits.py

set -- --data experiments/data/mnist_to_optdigits.yaml experiments/data/mnist_to_mnist_m.yaml \
    --methods source_only dann dan --seeds 1 --experiment demo "$@"
echo "Running experiments/compare_methods.py $*"
status=0
python experiments/compare_methods.py "$@" || status=$?
if [ "$status" -ne 0 ]; then
    echo "The demo ended with status $status after $SECONDS s" >&2
    exit "$status"
fi
echo "The demo took $SECONDS s: $installed s for the environment, $((SECONDS - installed)) s for the digits and the runs"
