"""Frames in, frames out: reading video safely, and writing mp4 and PNG.

To read in this order:

    frames.py       the type of decoded frames
    errors.py       what can be wrong with a media file, as one tree
    write.py        frames → mp4 or PNG bytes; still images → a frame
    contact_sheet.py  many frames as one picture to look at
    formats.py      which container a file is, by its first bytes
    pixels.py       from a decoded picture to RGB as it is meant to be seen
    source.py       one opened video: what its container says, and its frames
    sandbox.py      what the decoding process may not do
    framing.py      messages between a reader and that process
    read_child.py   that process
    read.py         video → frames with their times, decoded in a process that can be killed
"""
