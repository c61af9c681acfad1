"""Where the one seed of a run comes from."""

from __future__ import annotations

import os


def global_seed() -> int:
    """The seed given to ``lightning.seed_everything`` (the command line's ``--seed_everything``), or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
