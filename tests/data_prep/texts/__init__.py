"""Tests of encoded prompts."""
