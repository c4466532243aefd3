"""An attention-based recommender: from an event log to users' screens."""

__version__ = "0.1.0"
