"""One command for the day a GPU is there: `python -m benchmarks.gpu --out DIR`.

Read in this order:

- `parts`: what is measured, in order of worth, and the share of the time that each part has.
- `run`: the parent. It starts each part as a process, keeps its limit and collects its rows.
- `report`: the rows as `gpu.json` and `gpu.md`, written again after every row.
- `recorder`: the child's end of the line: rows, attempts that may fail, time left.
- `device`: clocks, peaks of memory, what machine this is.
- `shapes`: the released model's sizes, and the toy sizes of `--rehearse`.
- `models`: networks with random weights, made on the device; `fixtures`: trained ones, read.
- The parts: `machine`, `correctness`, `one_pass`, `clip` (with `codec`), `training_step`,
  `likelihood`.

It runs where there is only torch (2.11 or newer), einops, numpy, safetensors and this checkout. Of
this project it imports:

- `flow.*`, which needs no more than that;
- `flowreel.errors`, `flowreel.files`, `flowreel.values` (standard library only);
- `benchmarks.iteration`: the cost of a pass, against which a pass is held;
- `training.objective` and `training.metrics`: a step's backward and its operations.

`tests/benchmarks/test_gpu_bare.py` holds this list, and runs the rehearsal in an environment that
has nothing else. Where diffusers, or what `benchmarks.prepare` needs, is missing, the figures of
the codec say "not measured".
"""
