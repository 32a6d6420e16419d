"""Frames in, frames out: reading video safely, and writing mp4 and PNG.

To read in this order:

    frames.py       the type of decoded frames
    errors.py       what can be wrong with a media file, as one tree
    write.py        frames → mp4 or PNG bytes; still images → a frame
    read.py         video → frames with their times, decoded in a process that can be killed
    read_child.py   that process
"""
