"""Latent shards become checkpoints and a model folder.

The files, in the order to read them:

    config.py           every setting of a run
    sections.py         a section of them for each part that reads it
    stage.py            a curriculum as data: what each stage changes
    run.py              START HERE: one whole run: checked, tracked, trained, exported
    stated_video.py     which videos a dataset teaches, held against what a user states
    start/              what a fresh run's weights are: another model's, grown and sharded
    loop.py             one worker's steps, from the newest checkpoint to the last one
    data/               which samples a step sees, and the tensors they become
    step.py             one step: two backwards, one decision, two updates
    objective.py        the two losses and their backwards
    optimizer/          how a step changes the weights, over shards
    parallel.py         this process among the workers; FSDP2, HSDP, DDP
    memory.py           how layers are run so that a step fits: checkpointed, compiled
    weights.py          start weights from a seed, each worker its part
    state/              what a run goes on from: checkpoints, and export of a model
    held_out.py         held-out loss, and a Gaussian to hold it against
    record/             what is written down of a run: history, MLflow, costs
    curriculum.py       walks the stages: each a run, from the weights of the one before
    hardware.py         the kinds of GPU that a plan knows
    footprint.py        bytes that a step takes on one GPU, by kind
    plan.py             what a run takes before it is begun: memory, operations, hours
    on_ray.py           the same run with the workers of Ray Train
    codec/              a small codec's training: `flowreel train-codec`

A latent's way: `LatentDataset` → `LatentStore` → `BatchMaker` → `TrainStep` → `write_checkpoint` →
`export_model`. From `data_prep` only `data_prep.latents` and `data_prep.texts` are used.
"""
