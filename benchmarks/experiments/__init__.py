"""The paper's experiments on the weights that ship: a command each, and a page in docs/experiments.

    page.py         what all have in common: the model, tables, plots, the measured part of a page
    denoisers.py    which denoiser gives back what was noised, and how steady its videos are
    jacobi.py       block size and threshold of block Jacobi against time and error (paper, Fig. 3)
    motions.py      which kinds of motion the model fails at

Each is `python -m benchmarks.experiments.NAME [--model FOLDER]`. It writes the figures into the
page between two marks and leaves the words around them, which are by hand, alone.
"""
