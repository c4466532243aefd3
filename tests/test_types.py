"""The types of all that is not a test hold; beside the other tests, as it takes one core for a minute."""

import subprocess
import sys
from pathlib import Path


def test_the_types_hold():
    words = [sys.executable, "-m", "mypy"]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
