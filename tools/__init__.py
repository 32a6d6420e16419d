"""Set-up of a checkout: what `make` calls. The project imports nothing of it.

install.py   makes `.venv` from the lock, with the chosen build of torch
lock.py      writes the lock, `requirements.lock`, from `pyproject.toml` and `constraints.txt`
"""
