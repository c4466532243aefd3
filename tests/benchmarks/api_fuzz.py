"""Many cases against the online API's own document; by hand: python -m tests.benchmarks.api_fuzz 10000."""

from __future__ import annotations

import os
import sys

import pytest

OPERATIONS = 27
"""Operations that can be asked rightly, and those that can be asked wrongly."""


def main() -> int:
    """So many cases in all, over every operation."""
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    os.environ["RECSYS_FUZZ"] = str(-(-cases // OPERATIONS))
    return pytest.main(["-q", "-p", "no:cacheprovider", "tests/serving/test_fuzz.py"])


if __name__ == "__main__":
    sys.exit(main())
