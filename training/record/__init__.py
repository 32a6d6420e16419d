"""What is written down of a run while it trains.

    history.py          START HERE: a line per step, consistent with the checkpoints
    tracking.py         the same in MLflow
    metrics.py          what a step costs: tokens, FLOPs, MFU

Know nothing of how a step is taken.
"""
