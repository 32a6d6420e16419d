"""A file of the web is read whole, whatever its server does, or the reason is said in one line."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.sources.find import content_sha256, find_shards, fingerprint, name_shards
from data_prep.sources.listing import ShardError
from data_prep.sources.samples import ShardSummary, read_shard, write_shard
from data_prep.storage import http_file, http_request
from data_prep.storage.folder import Folder
from data_prep.storage.http_request import check_redirect
from data_prep.storage.location import StorageError, file_version, open_stream
from data_prep.storage.store import open_folder
from tests.data_prep.web_server import TOKEN, WebServer, serving_files

DATA = random.Random(0).randbytes(700_001)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WebServer]:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(http_request, "PAUSE_S", 0.0)
    with serving_files() as server:
        yield server
    forget_connections()


def forget_connections() -> None:
    http_request._client().close()
    http_request._client.cache_clear()


def whole(uri: str, size_bytes: int = 100_000) -> bytes:
    with open_stream(uri) as stream:
        return b"".join(iter(lambda: stream.read(size_bytes), b""))


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("data", [b"", b"1", DATA])
def test_a_file_is_read_whole_with_and_without_ranges(
    web: WebServer, has_ranges: bool, data: bytes
) -> None:
    web.has_ranges = has_ranges
    assert whole(web.put("/a", data)) == data


@pytest.mark.parametrize("has_ranges", [True, False])
def test_here_and_there_reads_what_a_file_on_a_disk_reads(
    web: WebServer, tmp_path: Path, has_ranges: bool
) -> None:
    web.has_ranges = has_ranges
    data = random.Random(1).randbytes(4_000_000)
    (tmp_path / "a").write_bytes(data)
    places = random.Random(2)
    with (
        open_stream(web.put("/a", data), seekable=True) as there,
        open_stream(tmp_path / "a", seekable=True) as here,
    ):
        for _ in range(60):
            place, count = places.randrange(len(data) + 9), places.choice((1, 512, 70_000, 900_000))
            assert there.seek(place) == here.seek(place)
            assert there.read(count) == here.read(count)
            assert there.tell() == here.tell()


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_connection_that_is_cut_goes_on_at_the_exact_byte(
    web: WebServer, has_ranges: bool
) -> None:
    uri = web.put("/a", DATA)
    web.has_ranges = has_ranges
    web.cut_bytes = 200_000 if has_ranges else 650_000

    def grow(path: str) -> None:
        # Without ranges every answer begins at the start: one that is never whole is an error.
        if not has_ranges and len(web.requests) > 2:
            web.cut_bytes = None

    web.before_answer = grow
    assert whole(uri) == DATA
    if has_ranges:
        starts = [int(r.removeprefix("bytes=").partition("-")[0]) for r in web.ranges("/a")]
        assert starts == [0, 200_000, 400_000, 600_000]


def test_here_and_there_goes_on_after_every_cut_too(web: WebServer) -> None:
    web.cut_bytes = http_file.PROGRESS_BYTES
    with open_stream(web.put("/a", DATA), seekable=True) as stream:
        for _ in range(2):
            assert b"".join(iter(lambda: stream.read(300_000), b"")) == DATA
            stream.seek(0)


def test_reading_here_and_there_keeps_its_connection(web: WebServer) -> None:
    with open_stream(web.put("/a", 9 * DATA), seekable=True) as stream:
        for number in range(8):
            stream.seek(number * 700_001)
            assert stream.read(512) == DATA[:512]
    assert len(web.requests) == 8
    assert web.connections == 1


def test_a_connection_that_is_always_cut_is_an_error_of_storage_and_never_an_end(
    web: WebServer,
) -> None:
    uri = web.put("/a.tar", DATA)
    web.cut_bytes = 1000
    with pytest.raises(StorageError, match=r"cannot read http://\S+/a.tar at byte \d+: .*7 times"):
        whole(uri)
    assert len(web.requests) == http_request.ATTEMPTS


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(web: WebServer, status: int) -> None:
    uri = web.put("/a", DATA)
    web.failures = [(status, {"Retry-After": "0"})] * (http_request.ATTEMPTS - 1)
    assert whole(uri) == DATA
    web.failures = [(status, {})] * http_request.ATTEMPTS
    with pytest.raises(StorageError, match=f"at byte 0: the server answers status {status}"):
        whole(uri)


def test_a_server_is_waited_for_as_long_as_it_asks(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(http_request.time, "sleep", pauses.append)
    web.failures = [(429, {"Retry-After": "3"}), (503, {"Retry-After": "9999"}), (503, {})]
    assert whole(web.put("/a", b"1")) == b"1"
    assert pauses == [3.0, http_request.MAX_PAUSE_S, 0.0]


@pytest.mark.parametrize(("status", "words"), [(401, "netrc"), (403, "netrc"), (418, "address")])
def test_a_refusal_is_final_and_says_what_to_do(web: WebServer, status: int, words: str) -> None:
    uri = web.put("/a", DATA)
    web.failures = [(status, {})]
    with pytest.raises(StorageError, match=rf"status {status} .*{words}"):
        open_stream(uri)
    assert len(web.requests) == 1


def test_a_file_that_is_not_there_is_a_missing_shard(web: WebServer) -> None:
    with pytest.raises(ShardError, match=r"cannot open shard http://\S+/a.tar: no such file"):
        fingerprint(f"{web.url}/a.tar")
    with pytest.raises(ShardError, match="no such file"):
        list(read_shard(f"{web.url}/a.tar"))


def test_a_server_that_trickles_is_asked_again_and_then_given_up(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_request, "SILENCE_S", 0.1)
    monkeypatch.setattr(http_request, "ATTEMPTS", 3)
    web.trickles = True
    with pytest.raises(StorageError, match=r"bytes came in .* 3 times in a row"):
        whole(web.put("/a", DATA))


def test_a_server_that_is_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_request, "PAUSE_S", 0.0)
    with serving_files() as server:
        uri = server.put("/a.tar", DATA)
    with pytest.raises(StorageError, match=r"cannot read http.*: no connection .*see that the ser"):
        whole(uri)


@pytest.mark.parametrize("change", ["content", "size", "gone"])
def test_a_file_that_changes_while_it_is_read_is_an_error(web: WebServer, change: str) -> None:
    uri = web.put("/a.tar", DATA)
    web.cut_bytes = 200_000

    def replace(path: str) -> None:
        if len(web.requests) == 2:
            others = {"content": bytes(len(DATA)), "size": DATA + b"1"}
            web.files = {"/a.tar": others[change]} if change in others else {}

    web.before_answer = replace
    words = "went away while" if change == "gone" else "changed while"
    with pytest.raises(StorageError, match=rf"a.tar {words} it was read, at byte 2\d+"):
        whole(uri)


def test_a_file_of_unknown_or_endless_length_is_refused(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = web.put("/a", DATA)
    monkeypatch.setattr(http_file, "MAX_FILE_BYTES", 1000)
    with pytest.raises(StorageError, match="has 700001 bytes; a shard has at most 1000"):
        open_stream(uri)
    web.tells_length = web.has_ranges = False
    with pytest.raises(StorageError, match="does not say how long the file is"):
        open_stream(uri)


@pytest.mark.parametrize("tag", [True, False])
def test_the_version_follows_the_content(web: WebServer, tag: bool) -> None:
    uri = web.put("/a.tar", DATA)
    web.tag = web.tag if tag else None
    before = file_version(uri)
    assert before == file_version(uri)
    assert before.startswith("size:700001")
    web.put("/a.tar", DATA[:-1] + b"0")
    # Without an etag or a time only the size tells: `prepare.verify` compares content.
    assert (file_version(uri) != before) is tag
    web.put("/a.tar", DATA + b"0")
    assert file_version(uri) != before


def test_redirects_are_followed_within_the_web_and_take_no_credentials_along(
    web: WebServer, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine localhost login me password secret\n")
    port = web.url.rpartition(":")[2]
    web.put("/there", DATA)
    web.redirects["/here"] = f"http://127.0.0.1:{port}/there"
    web.cut_bytes = 300_000
    assert whole(f"{web.url}/here") == DATA
    sent = [(path, "authorization" in headers) for path, headers in web.requests]
    assert sent[:2] == [("/here", True), ("/there", False)]
    assert not any(has for path, has in sent if path == "/there")


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://localhost/a", "s3://bucket/a", "data:,a"]
)
def test_a_redirect_out_of_the_web_is_refused(web: WebServer, target: str) -> None:
    web.redirects["/a"] = target
    with pytest.raises(StorageError, match=r"/a (redirects to .* neither|is no address)"):
        open_stream(f"{web.url}/a")


def test_redirects_in_a_circle_end(web: WebServer) -> None:
    web.redirects = {"/a": "/b", "/b": "/a"}
    with pytest.raises(StorageError, match="redirects more than 5 times"):
        open_stream(f"{web.url}/a")
    assert len(web.requests) == 6


@pytest.mark.parametrize(
    ("named", "there", "words"),
    [
        ("https://1.1.1.1/a", "http://8.8.8.8/a", "from https to http"),
        ("https://1.1.1.1/a", "https://127.0.0.1/a", "an address inside"),
        ("https://1.1.1.1/a", "https://169.254.169.254/latest", "an address inside"),
        ("http://1.1.1.1/a", "http://[::1]/a", "an address inside"),
        ("https://1.1.1.1/a", "https://8.8.8.8/a", ""),
        ("http://1.1.1.1/a", "https://8.8.8.8/a", ""),
        ("http://127.0.0.1/a", "http://10.0.0.1/a", ""),
    ],
)
def test_a_public_host_leads_nobody_inside_or_into_the_clear(
    named: str, there: str, words: str
) -> None:
    if not words:
        check_redirect(named, named, there)
        return
    with pytest.raises(StorageError, match=words):
        check_redirect(named, named, there)


def test_nothing_secret_is_said_or_logged(
    web: WebServer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    uri = web.put("/a.tar", DATA) + "?token=sesame"
    web.cut_bytes = 300_000
    assert whole(uri) == DATA
    web.cut_bytes = 10
    with pytest.raises(StorageError) as cut:
        whole(uri)
    web.files.clear()
    with pytest.raises(ShardError) as gone:
        fingerprint(uri)
    with pytest.raises(ShardError) as twice:
        name_shards([uri, uri])
    with pytest.raises(StorageError, match=r"put them into ~/\.netrc") as refused:
        find_shards("https://me:sesame@host/{0..3}.tar")
    assert all("?token=sesame" in path for path, _ in web.requests)
    said = [str(error.value) for error in (cut, gone, twice, refused)]
    assert "asked again" in caplog.text
    assert "sesame" not in " ".join([caplog.text, *said])


def test_https_is_read_with_the_certificates_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_request, "PAUSE_S", 0.0)
    certificate = make_certificate(tmp_path / "own.pem")
    forget_connections()
    with serving_files(certificate) as server:
        uri = server.put("/a", DATA)
        with pytest.raises(StorageError, match="certificate"):
            open_stream(uri)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        forget_connections()
        assert whole(uri) == DATA
    forget_connections()


def make_certificate(path: Path) -> Path:
    """A key and a certificate for this machine that it signs itself, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
        + certificate.public_bytes(encoding)
    )
    return path


def test_shards_of_the_web_are_found_by_name_range_list_and_folder(
    web: WebServer, world: list[str], tmp_path: Path
) -> None:
    uris = [web.put(f"/f/{n:05d}.tar", Path(world[n]).read_bytes()) for n in range(2)]
    web.put("/f/deeper/9.tar", b"")
    web.put("/f/readme.txt", b"")
    assert find_shards(f"{web.url}/f/{{00000..00001}}.tar") == uris
    assert find_shards(uris[0]) == uris[:1]
    assert web.requests == []
    (tmp_path / "list.txt").write_text("\n".join(uris))
    assert find_shards(str(tmp_path / "list.txt")) == uris
    for folder in (f"{web.url}/f", f"{web.url}/f/"):
        # Links to other hosts, to other folders and to other orders of the page are none of it.
        assert find_shards(folder) == uris
    assert find_shards(f"{web.url}/f?key=1") == [f"{uri}?key=1" for uri in uris]
    assert list(name_shards(uris)) == ["00000", "00001"]


def test_a_folder_that_is_not_listed_says_how_shards_are_named(web: WebServer) -> None:
    web.put("/f", b"")
    web.put("/g/", b"no page")
    for folder in ("/f", "/g"):
        with pytest.raises(StorageError, match=r"lists no folder at .*\{00000\.\.00099\}\.tar"):
            find_shards(f"{web.url}{folder}")
    web.put("/h/a.mp4", b"")
    with pytest.raises(ShardError, match=r"no \*\.tar in"):
        find_shards(f"{web.url}/h")
    with pytest.raises(ShardError, match="a list is read from a local disk alone"):
        find_shards(f"{web.url}/list.txt")


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_shard_of_the_web_gives_what_it_gives_on_a_disk(
    web: WebServer, world: list[str], has_ranges: bool
) -> None:
    web.has_ranges = has_ranges
    web.cut_bytes = 20_000 if has_ranges else None
    uri = web.put("/a.tar", Path(world[0]).read_bytes())
    here, there = ShardSummary(), ShardSummary()
    assert list(read_shard(uri, summary=there)) == list(read_shard(world[0], summary=here))
    assert here == there
    assert content_sha256(uri) == content_sha256(world[0])
    assert ("bytes=20000-" in web.ranges("/a.tar")) is has_ranges


def test_a_server_that_fails_within_a_shard_is_not_a_truncated_shard(
    web: WebServer, tmp_path: Path
) -> None:
    write_shard(tmp_path / "a.tar", [{"__key__": key, "mp4": 5 * DATA} for key in "abc"])
    uri = web.put("/a.tar", (tmp_path / "a.tar").read_bytes())
    web.cut_bytes = 6_000_000

    def fail(path: str) -> None:
        """Where the one pass over the shard would go on after the cut."""
        asked = web.requests[-1][1]["range"]
        if asked.endswith("-") and asked != "bytes=0-":
            web.failures.append((503, {}))

    web.before_answer = fail
    samples = read_shard(uri)
    assert (next(samples).media, web.failures) == (5 * DATA, [])
    with pytest.raises(StorageError, match=r"a\.tar at byte 6000000: .* 503"):
        list(samples)


@pytest.mark.parametrize(
    "location", ["https://host/out", "http://host/out", "hf://datasets/o/n/out", "ftp://host/out"]
)
def test_the_web_is_never_written(location: str) -> None:
    folder: Folder = open_folder(location)
    for action in (
        lambda: folder.write("a", b""),
        lambda: folder.names(),
        lambda: folder.read("a"),
    ):
        with pytest.raises(StorageError, match=r"give a local"):
            action()


def test_unknown_kinds_of_places_are_refused_with_those_that_are_known() -> None:
    for source in ("ftp://me:sesame@host/a.tar", "ftp://host/{0..3}.tar", "mock:///a"):
        with pytest.raises(StorageError, match=r":// is not read; .*https:// or hf://data") as said:
            find_shards(source)
        assert "sesame" not in str(said.value)


@pytest.fixture
def hub(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    """The hub's own client, asking the server here."""
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN.partition(" ")[2])
    return web


def test_a_data_set_of_the_hub_is_listed_and_read(hub: WebServer, world: list[str]) -> None:
    for repository in ("o/n", "o/private"):
        for revision in ("main", "v1"):
            for number in range(2):
                data = Path(world[number]).read_bytes() + revision.encode()
                hub.put(f"/store/{repository}/{revision}/s/{number}.tar", data)
        root = f"hf://datasets/{repository}"
        uris = [f"{root}/s/{number}.tar" for number in range(2)]
        assert find_shards(f"{root}/s") == uris == find_shards(f"{root}/s/{{0..1}}.tar")
        assert find_shards(f"{root}@v1/s") == [f"{root}@v1/s/{n}.tar" for n in range(2)]
        hub.cut_bytes = 20_000
        for uri, path in zip(uris, world, strict=False):
            assert list(read_shard(uri)) == list(read_shard(path))
            assert whole(uri) == Path(path).read_bytes() + b"main"
            assert whole(uri.replace(repository, f"{repository}@v1")).endswith(b"v1")
        hub.cut_bytes = None
        assert fingerprint(uris[0]) == fingerprint(uris[0]) != fingerprint(uris[1])
    # The token is the hub's: the store behind it is on another host in earnest.
    assert {h.get("authorization") for p, h in hub.requests if p.startswith("/data")} == {TOKEN}


def test_what_the_hub_does_not_give_is_said_in_one_line(
    hub: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ShardError, match=r"hf://datasets/o/n/a.tar: no such file"):
        fingerprint("hf://datasets/o/n/a.tar")
    for location in ("hf://o/n/a.tar", "hf://datasets/o", "hf://spaces/o/n/a.tar"):
        with pytest.raises(StorageError, match="write hf://datasets/OWNER/NAME/PATH"):
            find_shards(location)
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(StorageError, match=r"hf://datasets/o/private/a.tar: .*401.*HF_TOKEN"):
        fingerprint("hf://datasets/o/private/a.tar")
    with pytest.raises(StorageError, match=r"no folder hf://datasets/o/private/s.*HF_TOKEN"):
        find_shards("hf://datasets/o/private/s")
    hub.put("/store/o/n/main/s/0.tar", b"")
    hub.failures = [(500, {})]
    assert find_shards("hf://datasets/o/n/s") == ["hf://datasets/o/n/s/0.tar"]
    monkeypatch.setattr(http_request, "ATTEMPTS", 2)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"cannot read hf://datasets/o/n/s .*2 times in a row"):
        find_shards("hf://datasets/o/n/s")


def test_where_the_hub_redirects_to_is_asked_again_until_that_has_run_out(hub: WebServer) -> None:
    hub.put("/store/o/n/main/a.tar", DATA)
    with open_stream("hf://datasets/o/n/a.tar", seekable=True) as stream:
        for place in (0, 200_000):
            stream.seek(place)
            assert stream.read(100_000) == DATA[place : place + 100_000]
        before = [path.partition("/")[2].partition("/")[0] for path, _ in hub.requests]
        hub.failures.append((403, {}))
        stream.seek(500_000)
        assert stream.read(100_000) == DATA[500_000:600_000]
    after = [path.split("/")[1] for path, _ in hub.requests[len(before) :]]
    assert before == ["datasets", "store", "store", "store"]
    assert after == ["store", "datasets", "store"]
