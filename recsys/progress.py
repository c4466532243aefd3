"""What hears how far a piece of work is."""

from __future__ import annotations

from collections.abc import Callable

Count = Callable[[int, int], None]
"""Called with (done, of how many)."""
Progress = Callable[[str, int, int], None]
"""Called with (what is done, done, of how many)."""
