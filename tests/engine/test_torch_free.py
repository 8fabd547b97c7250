"""The router and the simulator import parts of the engine and must not pay for torch."""

from __future__ import annotations

import subprocess
import sys

MODULES = ("block_pool", "config", "errors", "fake", "layout", "sequence", "tokenizer")


def test_these_modules_do_not_import_torch() -> None:
    imports = "; ".join(f"import engine.{module}" for module in MODULES)
    program = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
