"""The one root of every error that a user can mend.

Standard library only; every package imports it.

    Exception
    ├── FlowreelError    something a user gave, or the machine, can be mended: the message says how
    └── anything else    a fault of the code: it keeps its traceback

The command line turns a `FlowreelError` into one line and exit code 2 (143 for `Terminated`). A
class of ours keeps the built-in it was before beside this root
(`class RecipeError(FlowreelError, ValueError)`), so that `except ValueError` goes on to work.
"""

from __future__ import annotations


class FlowreelError(Exception):
    """Root of all errors whose message tells a user what was got, the rule, and what to do next."""


class Terminated(FlowreelError):
    """SIGTERM was obeyed; the command line ends with exit code 143."""


class FlowreelWarning(UserWarning):
    """Root of all warnings worded for users; the command line prints them in one line."""
