"""Every speed that the project claims, one command each; each compares in one run on one machine.

    python -m benchmarks.sampling     samplers of the deep block against each other: time, error
    against
                                      the exact inverse, certificate; on the trained model in
                                      `tests/fixtures/trained_small`
    python -m benchmarks.iteration    one pass of the deep block, by context and window, against the
                                      machine's own bandwidth and product rate
    python -m benchmarks.prepare      data preparation on Ray against bare loops over the same
    decode
                                      and encode calls; its memory on one and ten times the shards

What they are made of:

- `sampling_case`, `sampling_figures`: the model and the samplers that are compared; the two plots.
- `processes`: CPU time and memory of a process and its children, for `prepare`.
- `on_ray`: one measured run of data preparation, which `prepare` starts as a process of its own.

A speed of sampling is quoted only beside its error and certificate, and only on trained weights.
"""
