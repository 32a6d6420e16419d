"""What a run goes on from.

    checkpoint.py       checkpoints that are complete or not there; export of a model

Knows nothing of losses or of the loop.
"""
