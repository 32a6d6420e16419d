"""`flowreel evaluate`: one model measured, family by family, and what is written of it.

Read in this order:

    command.py           READ FIRST: `flowreel evaluate`
    options.py           what is measured and how much of it
    run.py               the families in order, and what each is given
    clips.py             the clips of an evaluation, each made once
    scenes.py            prompts, real clips of them, and the judge: the world's side
    samples.py           the model's side: videos in batches, and a long one
    nats.py              held-out likelihood by bucket, beside its baselines
    prompt_following.py  what the judge reads, beside what was asked for
    fidelity.py          the default sampler against the exact one
    codec_quality.py     what the codec loses
    features.py          vectors of clips: of latents, and of a pretrained image network
    distances.py         Fréchet and sliced-Wasserstein distance between vectors
    steadiness.py        flicker and flow-warp error
    drift.py             a long video, window by window
    physics.py           momentum at a bounce, a thing behind a bar
    result.py            every figure by its name; JSON
    tables.py            the same as tables: terminal, Markdown
    page.py              the same as a page with videos
    record.py            the same in MLflow
    vbench.py            samples for VBench, in the layout that its package reads
    rewriter.py          who puts its prompts into more words

A family is pure functions from a model or from frames to a frozen dataclass of figures. `run.py`
makes every video once and hands it to all families that want it.
"""
