"""Writes dashboards/*.json from the Python beside it.

python deploy/grafana/build.py            # write
python deploy/grafana/build.py --check    # are the files what the Python comes to?
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from decisions import DECISIONS
from goodput import GOODPUT
from handoffs import HANDOFFS
from pools import POOLS

OUT = Path(__file__).parent / "dashboards"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the Grafana dashboards.")
    parser.add_argument("--check", action="store_true", help="only say whether the files are up to date")
    options = parser.parse_args()
    files = {
        OUT / f"{dashboard.uid}.json": json.dumps(dashboard.to_json(), indent=1) + "\n"
        for dashboard in (GOODPUT, POOLS, DECISIONS, HANDOFFS)
    }
    if not options.check:
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        return
    found = {path: path.read_text(encoding="utf-8") for path in OUT.glob("*.json")}
    stale = sorted(path.name for path in files.keys() | found if files.get(path) != found.get(path))
    if stale:
        sys.exit(f"not what build.py writes: {', '.join(stale)}; run it, and delete what it does not write")


if __name__ == "__main__":
    main()
