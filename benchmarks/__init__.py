"""Every speed that the project claims, one command each; each compares in one run on one machine.

    sampling.py           samplers of the deep block: time, error against the exact inverse,
                          certificate, on the trained model of `tests/fixtures`
    iteration.py          one pass of the deep block, by context and window, against the machine
    attention.py          attention over a long cache on a GPU, whole and split
    readers.py            video readers side by side: speed, and whose frames are right
    prepare.py            data preparation on Ray against bare loops over the same calls; its memory
    index.py              opening a large dataset: seconds, memory of ranks, requests of a store
    training.py           training steps a second, against the plainest step and the machine's peak
    plain_step.py         that plainest step, written down as its equations
    training_step.py      a training step and attention's gradients, in fp32 and in bf16
    ingest.py             batches of training made, against a step that takes them
    experiments/          the paper's experiments on the weights that ship; docs/experiments
    web.py                reading a file over HTTP against bare loops over the same bytes
    gpu/                  one command for the day a GPU is there; docs/gpu.md

What they are made of:

    sampling_case.py      the model and the samplers that are compared
    sampling_figures.py   the two plots of the sampling benchmark
    clips.py              shards of moving shapes, and their rows
    sinks.py              how fast sinks write, and the requests that a shard costs a store
    feeder.py             how busy decoding threads keep one encoder
    on_ray.py             one measured run of `prepare`, a process of its own
    processes.py          CPU time and memory of a process and its children
"""
