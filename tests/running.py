"""Running the repository's scripts as a user would."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_tool(name: str, *args: object) -> str:
    """Run a script of tools/ and return what it printed; it must succeed."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
