"""Flowreel's Python API; filled lazily. `errors`, `files` and `values` are what every package shares."""
