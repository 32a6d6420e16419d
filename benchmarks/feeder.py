"""How busy decoding threads keep one encoder: `python -m benchmarks.prepare --feeder`.

Knows nothing of Ray.
"""

from __future__ import annotations

import threading
import time
from itertools import cycle, islice
from queue import Queue

from benchmarks.clips import bucket_sizes, rows_of_shard
from data_prep.clips.decode import DecodeStage
from data_prep.config import PrepareConfig
from data_prep.latents.encode import EncodeStage
from data_prep.row import Row

BUSY_BAR = 0.95
"""The encoder must be busy for this share of the time."""


def feeder(
    config: PrepareConfig, shards: list[str], codec: str, device: str, decoders: int, clips: int
) -> dict[str, float]:
    """Threads decode ahead of one encoder.

    Returns the share of the time in which the encoder was busy after its first clip, its clips per
    second, and the number of threads.
    """
    import torch

    rows = [row for shard in shards for row in rows_of_shard(shard, config)]
    sizes = bucket_sizes(config, codec)
    source = islice(cycle(rows), clips + 1)
    lock = threading.Lock()
    clips_ahead: Queue[Row] = Queue(maxsize=2 * decoders)

    def decode() -> None:
        stage = DecodeStage(config, sizes)
        while True:
            with lock:
                row = next(source, None)
            if row is None:
                break
            clips_ahead.put(stage.process(row))
        stage.close()

    threads = [threading.Thread(target=decode, daemon=True) for _ in range(decoders)]
    encode = EncodeStage(config, codec, frozenset(), device)
    for thread in threads:
        thread.start()
    encode.process(clips_ahead.get())
    began_s, busy_s = time.monotonic(), 0.0
    for _ in range(clips):
        row = clips_ahead.get()
        started_s = time.monotonic()
        encode.process(row)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        busy_s += time.monotonic() - started_s
    took_s = time.monotonic() - began_s
    for thread in threads:
        thread.join()
    return {"busy_share": busy_s / took_s, "clips_per_s": clips / took_s, "decoders": decoders}
