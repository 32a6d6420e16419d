"""The command line of `python -m benchmarks.gpu`.

    python -m benchmarks.gpu --out DIR [--minutes 8] [--only NAME ...] [--rehearse]

Knows the arguments. The parent runs the parts (`run`); with `--part` this process is one of them.
No heavy library is imported before it is a part.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks.gpu.parts import BY_NAME
from benchmarks.gpu.run import NO_DEVICE, NoDevice, Plan, run_all

OUT_OF_REACH = "there is no CUDA device here; --rehearse runs all parts on the CPU at toy shapes"


def main(arguments: list[str] | None = None) -> int:
    """0 where all parts are complete, 1 where one is not, 2 for wrong arguments, 130 for Ctrl-C."""
    options = _options(arguments)
    if options.part:
        return run_one(options)
    names = tuple(name for name in BY_NAME if not options.only or name in options.only)
    plan = Plan(names, 60.0 * options.minutes, options.rehearse, tuple(options.fail))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return 0 if run_all(plan, options.out.resolve()) else 1
    except KeyboardInterrupt:
        print(f"stopped; {options.out} has what was measured", file=sys.stderr)
        return 130
    except NoDevice:
        print(OUT_OF_REACH, file=sys.stderr)
        return 2


def run_one(options: argparse.Namespace) -> int:
    """Be one part: measure, and send rows to the parent."""
    from benchmarks.gpu.recorder import Recorder, end_with_parent, take_standard_output

    line = take_standard_output()
    end_with_parent()
    recorder = Recorder(
        line, limit_s=options.limit, rehearsal=options.rehearse, fault=options.fault
    )
    from benchmarks.gpu.device import device_for, environment, free
    from benchmarks.gpu.shapes import FULL, REHEARSAL

    device = device_for(options.rehearse)
    if device is None:
        return NO_DEVICE
    recorder.clean = free
    recorder.environment(**environment(device))
    part = importlib.import_module(f"benchmarks.gpu.{BY_NAME[options.part].module}")
    part.measure(recorder, REHEARSAL if options.rehearse else FULL, device)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measure everything that says GPU; docs/gpu.md says what each figure means.",
    )
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument(
        "--only", nargs="+", choices=[*BY_NAME], default=[], metavar="NAME",
        help=f"these parts only: {', '.join(BY_NAME)}; the figures of others in DIR stay",
    )  # fmt: skip
    parser.add_argument(
        "--rehearse", action="store_true", help="all of it on the CPU at toy shapes"
    )
    hidden = argparse.SUPPRESS
    parser.add_argument("--part", choices=[*BY_NAME], default="", help=hidden)
    parser.add_argument("--limit", type=float, default=600.0, help=hidden)
    parser.add_argument("--fault", default="", help=hidden)
    # NAME=raise, NAME=hang or NAME=exit: the part does that after its first row (for tests).
    parser.add_argument("--fail", action="append", default=[], help=hidden)
    options = parser.parse_args(arguments)
    if not options.part and options.out is None:
        parser.error("--out DIR is needed: the folder that gets gpu.json and gpu.md")
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g}: must be positive")
    return options


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
