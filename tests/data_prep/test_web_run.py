"""A run over shards of the web makes what a run over the same shards on a disk makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.captions.config import CaptionConfig
from data_prep.config import PrepareConfig
from data_prep.run import plan_run
from data_prep.sources.find import find_shards
from data_prep.storage import http_request
from data_prep.storage.location import StorageError
from tests.data_prep.chat_endpoint import serving
from tests.data_prep.in_process import caption_locally, digests, prepare_locally
from tests.data_prep.storage.test_web import forget_connections
from tests.data_prep.web_server import WebServer, serving_files
from tests.pipeline.command import flowreel

SECRET = "signature=sesame"
PLACES = ("source", "fingerprint", "job")
"""What a manifest says of where its shard is."""


@pytest.fixture
def web(world: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """The shards of the world, behind a connection that is cut every 20 000 bytes."""
    monkeypatch.setattr(http_request, "PAUSE_S", 0.0)
    with serving_files() as server:
        for path in world:
            server.put(f"/w/{Path(path).name}", Path(path).read_bytes())
        server.cut_bytes = 20_000
        yield server
    forget_connections()


def made(out: Path) -> dict[str, str]:
    """Digest of every file of an output; of manifests, what they say but for the place."""
    found = digests(out)
    for name in [name for name in found if name.startswith("manifests/")]:
        manifest = json.loads((out / name).read_text())
        found[name] = json.dumps({k: v for k, v in manifest.items() if k not in PLACES})
    return found


def secrets_in(out: Path) -> list[Path]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return [path for path in files if b"sesame" in path.read_bytes()]


def test_a_run_over_a_failing_network_stopped_and_run_again_makes_the_same_bytes(
    web: WebServer, world: list[str], config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    prepare_locally(config, world, tmp_path / "disk", codec_dir)
    uris = [f"{web.url}/w/{Path(path).name}?{SECRET}" for path in world]
    out = tmp_path / "web"
    prepare_locally(config, uris, out, codec_dir, shuffle=1, stop_after=5)
    assert secrets_in(out) == []
    report = prepare_locally(config, uris, out, codec_dir, shuffle=2)
    assert report.truncated_shards == ()
    assert "bytes=20000-" in web.ranges("/w/00000.tar")
    assert made(out) == made(tmp_path / "disk")
    assert secrets_in(out) == []
    assert plan_run(config, uris, out, str(codec_dir)).jobs == ()
    web.tag = lambda data: "another"
    assert len(plan_run(config, uris, out, str(codec_dir)).jobs) == len(world)
    by_content = config.model_copy(update={"verify": True})
    assert plan_run(by_content, uris, out, str(codec_dir)).jobs == ()


def test_a_server_that_goes_away_stops_the_run_and_costs_nothing(
    web: WebServer, world: list[str], config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    uris = find_shards(f"{web.url}/w")
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare_locally(config, uris, whole, codec_dir)
    prepare_locally(config, uris[:1], out, codec_dir)

    def fail(path: str) -> None:
        if path.endswith(Path(uris[-1]).name) and len(web.ranges(path)) > 1:
            web.failures.append((503, {}))

    web.requests.clear()
    web.before_answer = fail
    with pytest.raises(StorageError, match=r"status 503 .*what is finished is kept"):
        prepare_locally(config, uris, out, codec_dir)
    web.before_answer, web.failures = lambda path: None, []
    prepare_locally(config, uris, out, codec_dir)
    assert digests(out) == digests(whole)


def test_captions_are_made_anew_from_where_the_shards_are_said_to_be_now(
    web: WebServer, world: list[str], config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    uris = [f"{web.url}/w/{Path(path).name}?{SECRET}" for path in world]
    outs = [tmp_path / "web", tmp_path / "disk"]
    prepare_locally(config, uris, outs[0], codec_dir)
    prepare_locally(config, world, outs[1], codec_dir)

    def refuse(path: str) -> None:
        if not web.requests[-1][0].endswith(SECRET):
            web.failures.append((403, {}))

    web.before_answer = refuse
    with serving() as endpoint:
        captioner = CaptionConfig(backend="http", model="m", endpoint=endpoint.url)
        other = config.model_copy(update={"captioner": captioner})
        with pytest.raises(StorageError, match=r"/w/\S+tar: the server answers status 403"):
            caption_locally(other, None, outs[0])
        for shards, out in ((uris, outs[0]), (world, outs[1])):
            caption_locally(other, shards, out)
    assert made(outs[0]) == made(outs[1])
    assert secrets_in(outs[0]) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_prepares_a_folder_of_the_web(web: WebServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = flowreel("prepare", "--shards", f"{web.url}/w", "--out", str(out), timeout_s=500)
    assert ended.returncode == 0, ended.stderr
    assert "11" in ended.stdout
    again = flowreel("prepare", "--shards", f"{web.url}/w", "--out", str(out), timeout_s=500)
    assert again.returncode == 0, again.stderr
