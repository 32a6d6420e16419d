"""The version of this code. Standard library only; every package may import it."""

VERSION = "0.1.0"
