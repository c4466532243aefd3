"""From raw logs to a DATASET directory: checked events, items with text, and every user's sequence."""
