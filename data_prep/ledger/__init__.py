"""data_prep/ledger."""
