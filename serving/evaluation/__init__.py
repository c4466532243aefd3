"""Numbers one can decide by: lists judged by a protocol, beside baselines, with intervals; reports, comparisons, promotion."""
