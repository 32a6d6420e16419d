"""Latent shards become checkpoints and a model folder.

The files, in the order to read them:

    config.py           every setting, in a section for each part that reads it
    run.py              START HERE: one whole run: checked, tracked, trained, exported
    stated_video.py     which videos a dataset teaches, held against what a user states
    latents.py          the latents of a dataset, or of one of its resolutions
    loop.py             one worker's steps, from the newest checkpoint to the last one
    batch_sampler.py    which samples a step trains on: a pure function of seed and step
    batches.py          a step's plan becomes tensors: latents, noise, encoded prompts
    step.py             one step: two backwards, one decision, two updates
    objective.py        the two losses and their backwards
    optim.py            AdamW over shards, learning rate, averaged weights, the rule that skips
    muon.py             orthogonalised momentum for the matrices inside the layers
    sharded.py          a worker's part of a tensor, and that part dressed as the whole
    parallel.py         this process among the workers; FSDP2
    checkpoint.py       checkpoints that are complete or not there; export of a model
    held_out.py         held-out loss, and a Gaussian to hold it against
    history.py          a line per step, consistent with the checkpoints
    tracking.py         the same in MLflow
    metrics.py          what a step costs: tokens, FLOPs, MFU
    on_ray.py           the same run with the workers of Ray Train
    codec_config.py     settings of a small codec
    codec_training.py   trains it: `flowreel train-codec`

A latent's way: `LatentDataset` → `LatentStore` → `BatchMaker` → `TrainStep` → `save_checkpoint` →
`export_model`. From `data_prep` only `data_prep.latents` is used.
"""
