"""One command for the day a GPU is there: `python -m benchmarks.gpu --out DIR`.

Read in this order:

    __main__.py        the command line
    parts.py           what is measured, in order of worth, and each part's share of the time
    run.py             the parent: starts each part as a process, keeps its limit, collects rows
    report.py          the rows as `gpu.json` and `gpu.md`, written again after every row
    recorder.py        the child's end of the line: rows, attempts that may fail, time left
    device.py          clocks, peaks of memory, what machine this is
    shapes.py          the released model's sizes, and the toy sizes of `--rehearse`
    models.py          networks with random weights, made on the device
    fixtures.py        trained and reference models, read without PyYAML
    machine.py         part 1: bandwidth, product rate, the roof of a pass
    correctness.py     part 2: CPU against device
    one_pass.py        part 3: one pass of the 7B's deep block
    clip.py            part 4: a whole clip
    codec.py           the codec at its real size, where diffusers is
    training_step.py   part 5: a training step
    likelihood.py      part 6: likelihood of a clip, and the encoder

It runs where there is only torch (2.11 or newer), einops, numpy, safetensors and this checkout. Of
this project it imports:

- `flow.*`, which needs no more than that;
- `flowreel.errors`, `flowreel.files`, `flowreel.values`, `flowreel.version` (which need the
  standard library only);
- `benchmarks.iteration`: the cost of a pass, against which a pass is held;
- `training.objective` and `training.record.metrics`: a step's backward and its operations.

`tests/benchmarks/test_gpu_bare.py` holds this list, and runs the rehearsal in an environment that
has nothing else. Where diffusers, or what `benchmarks.prepare` needs, is missing, the figures of
the codec say "not measured".
"""
