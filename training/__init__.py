"""Learn a sequence model from a data set; the result is a run directory."""
