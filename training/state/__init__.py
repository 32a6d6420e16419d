"""What a run goes on from.

    checkpoint.py       checkpoints that are complete or not there; export of a model
    saver.py            checkpoints written by a thread while training goes on; room for them
    whole.py            digests: whether a file is what was written
    choice.py           the newest whole checkpoint, chosen alike by all workers
    run_lock.py         one run per folder
    stop.py             signals and notices: save and leave, alike on all workers
    pins.py             length of the schedule and content of the data, for the description
    group.py            workers that agree through their hosts

Knows nothing of losses or of the loop.
"""
