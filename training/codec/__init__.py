"""A small codec is trained on procedural video: `flowreel train-codec`.

    config.py           its settings
    train.py            START HERE: the training, and what its outcome is worth in dB

Know nothing of flows.
"""
