"""data_prep/captions."""
