"""data_prep/clips."""
