"""What a step of training sees.

    latents.py          the latents of a dataset, or of one of its resolutions
    batch_sampler.py    START HERE: which samples a step trains on: a pure function of seed and step
    texts.py            which prompts there are; encoded before, or by an encoder here
    batches.py          a step's plan becomes tensors: latents, noise, encoded prompts

Know nothing of optimizers.
"""
