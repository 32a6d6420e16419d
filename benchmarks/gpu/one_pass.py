"""Part 3: one guided pass of the deep block, by context and window, against the machine's roof.

Every pass is timed as the solver runs it (`Inverter.evaluate`), and with the solver's own work
around it (`slide`) and the host's look at what has converged after each pass or after every fourth;
then as a replayed CUDA graph, which leaves the host out of it; then compiled layer by layer. What
is surest comes first, so that a fault of the rest costs no figure of it. Weights and cache are
random: the time of a pass does not depend on them.

Knows one pass. Knows nothing of how many a video takes (`clip` does).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.device import Times, free, peak_gb, synchronize, time_calls
from benchmarks.gpu.machine import machine_rates
from benchmarks.gpu.models import parameter_gb, random_network, random_tensor
from benchmarks.gpu.parts import PASS_GOAL
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.shapes import Shapes
from benchmarks.iteration import Rates, cost_of, inverter_at
from flow.attention import TransformerLayer
from flow.block import AffineBlock
from flow.inverse import Inverter
from flow.sliding import SlidingWindow, slide

CALLS = 4
"""Passes in one sample, given to the device without a wait."""
LOOKED_AT, LOOK_SAMPLES = 8, 3
"""Passes of the sliding window in one sample, and samples."""
COMPILE_S = 60.0
"""What compiling a layer for one shape may take; with less time left it is not begun."""
NAMED_KERNELS = 12
SIDE = 32
"""Rows and columns of the frames that `inverter_at` lays its places out in."""


def measure(recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
    """All rows of the part; what matters most comes first."""
    passes = Passes(recorder, shapes, device)
    recorder.figure("weights of the deep block", parameter_gb(passes.block), "GB")
    passes.at_each(shapes.contexts, "eager", passes.eager)
    passes.at_each(shapes.contexts[:1], "kernels", passes.kernels)
    if device.type == "cuda":
        passes.at_each(shapes.contexts, "CUDA graph", passes.graph)
    passes.compile_layers()
    needs_s = 0.0 if recorder.rehearsal else COMPILE_S
    passes.at_each(shapes.contexts[:1], "layers compiled", passes.compiled, needs_s=needs_s)


class Passes:
    """The deep block, and every way in which a pass of it is timed."""

    def __init__(self, recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
        self.recorder, self.shapes, self.device = recorder, shapes, device
        self.dtype: torch.dtype = getattr(torch, shapes.dtype)
        config = shapes.config
        self.block = random_network(
            lambda: AffineBlock(config, config.num_blocks - 1), device, self.dtype
        )
        self.rates: Rates = machine_rates(shapes, device)

    def at_each(
        self,
        contexts: tuple[int, ...],
        what: str,
        run: Callable[[Inverter, int, int], None],
        needs_s: float = 5.0,
    ) -> None:
        """Call `run(inverter, context, window)` at every window after these contexts."""
        for context in contexts:
            inverter = self.recorder.attempt(
                f"{what}, a cache of {context} places", functools.partial(self._inverter, context)
            )
            if inverter is None:
                continue
            for window in self.shapes.windows:
                once = functools.partial(run, inverter, context, window)
                name = f"{what}, window {window} after {context} places"
                self.recorder.attempt(name, torch.inference_mode()(once), needs_s=needs_s)
            del inverter, once

    def _inverter(self, context: int) -> Inverter:
        shapes = self.shapes
        return inverter_at(self.block, shapes.config, context, max(shapes.windows), self.device)

    def _once(self, inverter: Inverter, context: int, window: int) -> Callable[[], None]:
        """One pass over `window` places after `context` others, text among them."""
        start = max(0, context - inverter.text_len)
        return lambda: inverter.evaluate(start, start + window)

    def _time(self, run: Callable[[], object]) -> Times:
        return time_calls(run, self.device, samples=self.shapes.samples, calls=CALLS)

    def _roof_ms(self, context: int, window: int) -> float:
        return cost_of(self.shapes.config, context, window, self.dtype).floor_ms(self.rates)

    def _row(self, table: str, context: int, window: int, times: Times, **more: Any) -> None:
        """A row of times, and the figure that has a goal where this is its place."""
        roof_ms = self._roof_ms(context, window)
        self.recorder.row(
            table,
            context=context,
            window=window,
            ms=times.ms,
            least_ms=1e3 * times.least,
            most_ms=1e3 * times.most,
            roof_ms=roof_ms,
            share_of_roof=roof_ms / times.ms,
            **more,
        )
        if (context, window) == (self.shapes.contexts[0], self.shapes.windows[0]):
            note = f"{window} tokens after {context} places; roof {roof_ms:.2f} ms"
            self.recorder.figure(table, times.ms, "ms", PASS_GOAL, note)

    def eager(self, inverter: Inverter, context: int, window: int) -> None:
        """As the solver calls it, with and without the host's looks."""
        free()
        times = self._time(self._once(inverter, context, window))
        peak = peak_gb(self.device)
        start = max(0, context - inverter.text_len)
        looks = {
            f"look_every_{every}_ms": looked_at_ms(inverter, start, window, every)
            for every in (1, 4)
        }
        self._row("one pass, eager", context, window, times, **looks, peak_gb=peak)

    def kernels(self, inverter: Inverter, context: int, window: int) -> None:
        """How many kernels a pass launches, how long they run, and which."""
        rows = profiled(self._once(inverter, context, window))
        total = sum(ms for _, _, ms in rows)
        launches = sum(count for _, count, _ in rows)
        self.recorder.row(
            "kernels of a pass", context=context, window=window, kernels=launches, busy_ms=total
        )
        if window == self.shapes.windows[0]:
            for name, count, ms in sorted(rows, key=lambda row: -row[2])[:NAMED_KERNELS]:
                table = f"kernels of {window} tokens after {context} places"
                share = ms / total if total else None
                self.recorder.row(table, kernel=name[:90], count=count, ms=ms, share=share)

    def graph(self, inverter: Inverter, context: int, window: int) -> None:
        """Captured once and replayed: the device alone."""
        replay = capture(self._once(inverter, context, window)).replay
        self._row("one pass, as a CUDA graph", context, window, self._time(replay))

    def compile_layers(self) -> None:
        """From now on, layers extend a sequence by compiled code."""
        # A rehearsal has no compiler for its device; the tracer alone runs everywhere.
        backend = "eager" if self.recorder.rehearsal else "inductor"
        extend = torch.compile(TransformerLayer.extend, dynamic=False, backend=backend)
        for layer in self.block.layers:
            # An instance's attribute: `TransformerLayer` itself stays as it is.
            vars(layer)["extend"] = functools.partial(extend, layer)  # type: ignore[arg-type]

    def compiled(self, inverter: Inverter, context: int, window: int) -> None:
        """With compiled layers, eager and as a graph."""
        once = self._once(inverter, context, window)
        began = time.perf_counter()
        once()
        synchronize(self.device)
        compile_s = time.perf_counter() - began
        times = self._time(once)
        self._row("one pass, layers compiled", context, window, times, compile_s=compile_s)
        if self.device.type == "cuda":
            replay = capture(once).replay
            table = "one pass, layers compiled, as a CUDA graph"
            self._row(table, context, window, self._time(replay))
        launches = sum(count for _, count, _ in profiled(once))
        self.recorder.row(
            "kernels of a pass, layers compiled", context=context, window=window, kernels=launches
        )


def looked_at_ms(inverter: Inverter, start: int, window: int, look_every: int) -> float:
    """Milliseconds of a pass with all that the sliding window does around it, by the host's clock.

    No token is within a tolerance below 0, so that each look accepts one: the window hardly moves.
    """
    device, dim = inverter.mu_BLC.device, inverter.mu_BLC.shape[-1]
    inverter.look_every = look_every
    inverter.expect(window)
    sizes = SlidingWindow(size=window, cold=window, columns=SIDE, period=max(window, SIDE**2))
    most = LOOKED_AT + 2
    z_BLC = random_tensor(1, window + most, dim, device=device)
    times = []
    for _ in range(LOOK_SAMPLES):
        inverter.solved = inverter.fresh = inverter.guessed = inverter.evaluated = start
        steps = slide(inverter, z_BLC, start, start + most, sizes, tolerance=-1.0)
        inverter.evaluate(*next(steps))
        synchronize(device)
        began = time.perf_counter()
        for _ in range(LOOKED_AT):
            inverter.evaluate(*next(steps))
        synchronize(device)
        times.append((time.perf_counter() - began) / LOOKED_AT)
        steps.close()
    return 1e3 * statistics.median(times)


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A call as a CUDA graph; it must read and write the same tensors every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # Libraries allocate their workspaces at first use, which a capture forbids.
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def profiled(once: Callable[[], None]) -> list[tuple[str, int, float]]:
    """(name, count, milliseconds) of every kind of kernel in one call; on a CPU, of operation."""
    once()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    with profile(activities=[activity]) as profiler:
        once()
        if on_gpu:
            torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        if event.device_type == kind and (on_gpu or event.key.startswith("aten::")):
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            rows.append((event.key, event.count, 1e-3 * spent))
    if not rows:
        raise RuntimeError("the profiler saw no kernel")
    return rows
