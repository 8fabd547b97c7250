"""How much nonsense the tests of nonsense try."""

import os

FUZZ_SEEDS = range(int(os.environ.get("PRELAY_FUZZ_SEEDS", "4")))
"""A few by default; more for a campaign of hours."""
FUZZ_CASES = int(os.environ.get("PRELAY_FUZZ_CASES", "40"))
"""Of each operation of the HTTP front end, by its own description."""
