"""What a fresh run goes out from beside its seed.

    source.py           START HERE: a model folder, a run or a checkpoint as weights to start from
    frozen.py           parameters that stay as they are, and the proof of it
    lora.py             adapters that are trained alone, and written as a small folder
    load.py             these weights in the run's own model, grown and sharded as it is

Know nothing of losses.
"""
