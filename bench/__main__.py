"""`python -m bench`: what `prelay bench`, `prelay profile`, `prelay simulate` and `prelay plan` run."""

import sys
from collections.abc import Sequence

from engine import cores


def simulates(arguments: Sequence[str]) -> bool:
    """Whether that command simulates, and does nothing else."""
    match arguments:
        case ["simulate" | "plan" | "simulator" | "controller", *_]:
            return True
        case ["goodput", *options]:
            return any(option.partition("=")[0] == "--simulate" for option in options)
    return False


if __name__ == "__main__":
    if simulates(sys.argv[1:]):
        cores.use_compiled()  # before anybody imports one

    from bench.cli import main

    main()
