"""What is asked of a cluster before a run: how large it is or may grow, and who sees its folders.

One file, because only Ray can answer:

    on_ray.py  the questions; what is made of the answers is in `data_prep.resources`
"""
