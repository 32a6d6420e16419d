"""data_prep/storage."""
