"""``python -m framework`` and the command ``framework``."""

from __future__ import annotations

import sys

from framework import __version__

HELP = """usage: framework {fit,validate,test,predict} [options]

  fit       train a model
  validate  measure the validation scores of a checkpoint
  test      measure a checkpoint on labelled test images
  predict   write a table of predictions

  framework fit --config experiments/methods/dann.yaml --config experiments/data/mnist_to_mnist_m.yaml
  framework fit --model DANN --data DomainPairDataModule --data.source photos --data.target sketches
  framework test --run lightning_logs/<experiment>/version_0      # its configuration and last checkpoint
  framework fit --run lightning_logs/<experiment>/version_0       # resume it
  framework fit --config ... --print_config                       # what would run
  framework fit --model.help DANN                                 # the options of a class
  framework fit --help                                            # all options
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 (a user's mistake), 130 or 143 (a run that was stopped)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    from framework.cli import run  # torch and Lightning take seconds to import

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
