"""`python -m bench`: what `prelay bench`, `prelay profile`, `prelay simulate` and `prelay plan` run."""

import sys

from bench import simulating

if __name__ == "__main__":
    if simulating.simulates(sys.argv[1:]):
        simulating.begin()

    from bench.cli import main

    main()
