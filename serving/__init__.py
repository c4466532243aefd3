"""Answer from a bundle: online, nightly and when judged offline, by one path."""
