"""Set-up of a checkout: what `make` calls. Nothing here is imported by the project, or installed with it.

install.py   makes `.venv` from the lock, with the chosen build of torch
lock.py      writes the lock, `requirements.lock`, from `pyproject.toml` and `constraints.txt`
"""
