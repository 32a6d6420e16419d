"""What is written down of a run while it trains.

    history.py          START HERE: a line per step, consistent with the checkpoints
    recorder.py         what is measured of steps becomes those lines
    feed.py             the same in MLflow: sent while a run trains, or later; never in its way
    tracking.py         what is sent, and to which store
    facts.py            what MLflow is told beside the history: names, words, inputs, the model
    registry.py         the exported model as a version in MLflow, and which is the best
    device.py           how long a step took on its device, and memory
    metrics.py          what a step costs: tokens, FLOPs, MFU

Know nothing of Ray.
"""
