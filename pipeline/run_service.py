"""`flowreel serve`: a model's service, from start to the signal that ends it.

Says where it listens, waits, and leaves no process behind. Knows nothing of requests or videos.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from pipeline.cluster import local_or_given
from pipeline.console import Reporter
from pipeline.recipes import Recipe
from pipeline.stages import serve

EXAMPLE = '{"prompt": "A red circle moves left"}'


def serve_until_stopped(
    recipe: Recipe,
    model: Path,
    *,
    host: str | None,
    port: int | None,
    data_dir: Path,
    address: str | None,
    reporter: Reporter | None = None,
) -> None:
    """Serve until SIGTERM, or until Ctrl-C raises KeyboardInterrupt.

    Args:
        recipe: its `serve`, `sampler` and `cluster` hold.
        model: model folder.
        host, port: where it listens; None: where the recipe says.
        data_dir: where jobs and videos are kept.
        address: a Ray cluster; None starts one here and ends it.
        reporter: what is said on the way.

    Raises:
        ServeStartError: the port is taken, or the service is not ready in time.
    """
    reporter = reporter or Reporter()
    with (
        local_or_given(recipe.cluster, address),
        serve(recipe, model, data_dir, host=host, port=port) as app,
    ):
        stop = threading.Event()
        # Only now: Ray takes SIGTERM for itself while it starts.
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        reporter.outcome(f"serving {model} at {app.url}  (Ctrl-C ends it)")
        reporter.say(
            f"  curl {app.url}/v1/videos -H 'content-type: application/json' -d '{EXAMPLE}'"
        )
        reporter.document({"url": app.url, "model": model, "data_dir": data_dir})
        stop.wait()
        reporter.say("stopping")
