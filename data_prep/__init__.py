"""Video shards → latent shards: every sample leaves one status row, whatever is wrong with it.

At the top, in this order:

    stages.py     the story of one sample; read it first
    run.py        a run around its stages: what is left to do, what came of it
    on_ray.py     the stages as operators of Ray Data: `prepare`
    config.py     all settings, and the digests of what they decide
    row.py        the row that passes from stage to stage
    reasons.py    why a sample is not kept, and what would keep it
    look.py       the stages on one sample: `flowreel look`
    look_record.py  what was found, as words and pictures
    resources.py  how many workers of each stage a cluster holds
    operators.py  how busy the stages are, by Ray Data's own account
    progress.py   how far a run is: what is called as work goes on; rate, time left, bottleneck
    liveness.py   whether Ray is still there
    strict.py     the base of every settings class

and the wings, in the order in which a sample passes them:

    preflight/    what a cluster has, may come to have, and sees
    sources/      what comes in: shards and their samples
    clips/        a sample becomes frames
    captions/     who says what is seen
    latents/      what comes out: records, the dataset that training reads, its index
    texts/        prompts encoded before training
    ledger/       what is done: manifests, staged samples, commits, resuming
    storage/      where files lie: a disk or an object store
    world/        a synthetic world of moving shapes, where no video is at hand
"""
