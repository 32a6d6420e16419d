"""data_prep/sources."""
