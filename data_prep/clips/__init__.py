"""A sample becomes frames: decoded, judged, and cut to a bucket.

Read in this order:

    decode.py         the decoding stage: the order in which the others are used
    buckets.py        settings of lengths and sizes, and what a codec takes of them
    windows.py        which frames of a video make a window, by exact times
    cut.py            which bucket, black bars, crop and resize
    filters.py        which samples are kept, and why not
    machine_lock.py   shared and exclusive turns of a machine's decoders
"""
