"""The router and the simulator import parts of the engine and must not pay for torch."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "batch",
    "block_pool",
    "config",
    "config_file",
    "errors",
    "fake",
    "families",
    "layout",
    "rope_config",
    "sequence",
    "shard",
    "tokenizer",
)


def test_these_modules_do_not_import_torch() -> None:
    imports = "; ".join(f"import engine.{module}" for module in MODULES)
    program = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
