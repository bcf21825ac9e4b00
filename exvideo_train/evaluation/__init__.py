"""Videos to numbers to a verdict: reading, measures, statistics, report. Knows no model and no adapter."""
