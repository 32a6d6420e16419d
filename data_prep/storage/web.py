"""Files that are read from the web: `https://` addresses, and data sets of the Hugging Face hub.

    https://host/path/00000.tar              as it is, `http://` too; a query may hold a signature
    hf://datasets/OWNER/NAME/path/00000.tar  at the branch `main`; `NAME@REVISION` is at another,
                                             whose slashes are written %2F

Credentials are those of the environment: `~/.netrc` (or `$NETRC`) for https, `HF_TOKEN` or the
login of the `hf` command for the hub, which is at `HF_ENDPOINT`. They are in no URI, message or
manifest. Nothing is written to the web. Knows nothing of what the files hold.
"""

from __future__ import annotations

import base64
import io
import netrc
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any, NoReturn, cast
from urllib.parse import quote, unquote, urljoin, urlsplit

from data_prep.storage.http_file import PART_BYTES, HttpFile
from data_prep.storage.http_request import (
    Address,
    PassingFailure,
    Patience,
    may_pass,
    read_text,
)
from data_prep.storage.uris import StorageError, shown

_LISTING_BYTES = 32 * 2**20
_HF = "hf://datasets/"


def open_web(location: str, *, seekable: bool = False) -> IO[bytes]:
    """Open a file of the web for reading.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: see `data_prep.storage.http_file.HttpFile`, `address_of`.
    """
    file = HttpFile(address_of(location), seekable=seekable)
    return cast("IO[bytes]", io.BufferedReader(file, PART_BYTES) if seekable else file)


def web_version(location: str) -> str:
    """Size, and etag or time, of a file; raises as `open_web`. A server may know neither."""
    with HttpFile(address_of(location), seekable=True) as file:
        return file.version


def address_of(location: str) -> Address:
    """Where the file of an `https://`, `http://` or `hf://` location is.

    >>> address_of("hf://datasets/owner/name@v1/a b.tar").url.partition("/datasets")[2]
    '/owner/name/resolve/v1/a%20b.tar'

    Raises:
        StorageError: it holds credentials, or names no file.
    """
    parts = urlsplit(location)
    if parts.scheme == "hf":
        return _hub_address(location)
    if "@" in parts.netloc:
        # The location is written into manifests and logs, where a secret must not be.
        raise StorageError(
            f"the address of {shown(location)} holds credentials; put them into ~/.netrc"
        )
    if not parts.hostname:
        raise StorageError(f"{shown(location)} names no host; write https://HOST/PATH")
    return Address(location, _credentials(parts.scheme, parts.hostname))


def _credentials(scheme: str, host: str) -> dict[str, str]:
    """What `~/.netrc` has for a host; it is sent in the clear to this machine alone."""
    if scheme != "https" and host not in ("localhost", "127.0.0.1", "::1"):
        return {}
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        found = netrc.netrc(path).authenticators(host) if path.is_file() else None
    except (OSError, netrc.NetrcParseError) as error:
        raise StorageError(f"cannot read the credentials in {path}: {error}") from error
    if found is None:
        return {}
    pair = base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()
    return {"authorization": f"Basic {pair}"}


def _hub() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _hub_parts(location: str) -> tuple[str, str, str]:
    """Repository, revision and path of a location on the hub."""
    pieces = location.removeprefix(_HF).split("/")
    if not location.startswith(_HF) or len(pieces) < 2 or not all(pieces[:2]):
        raise StorageError(f"{location} is no place on the hub; write {_HF}OWNER/NAME/PATH")
    name, _, revision = pieces[1].partition("@")
    return f"{pieces[0]}/{name}", unquote(revision) or "main", "/".join(pieces[2:])


def _hub_address(location: str) -> Address:
    from huggingface_hub import get_token

    repository, revision, path = _hub_parts(location)
    url = f"{_hub()}/datasets/{repository}/resolve/{quote(revision, safe='')}/{quote(path)}"
    token = get_token()
    return Address(url, {"authorization": f"Bearer {token}"} if token else {}, name=location)


def names_in(location: str) -> list[str]:
    """Names of the files right below a folder of the web, sorted, as a location spells them.

    On the hub they are listed by its own file system; elsewhere they are the links of the page
    that the server shows of a folder, as far as they stay right below it.

    Raises:
        StorageError: the server lists nothing there, or refuses, or fails for long.
    """
    if urlsplit(location).scheme == "hf":
        return _names_on_hub(location)
    place, mark, query = location.partition("?")
    folder = place.rstrip("/") + "/"
    address = address_of(folder + mark + query)
    try:
        page, kind = read_text(address, _LISTING_BYTES)
    except FileNotFoundError:
        _no_listing(address, "it answers that there is no such file")
    if kind not in ("text/html", "application/xhtml+xml"):
        _no_listing(address, f"it sends {kind[:50] or 'no known type'}, no page of links")
    links = _Links()
    links.feed(page)
    below = [urljoin(folder, link.partition("?")[0]) for link in links.found]
    names = {link.removeprefix(folder) for link in below if link.startswith(folder)}
    return sorted(name for name in names if name and "/" not in name)


def _no_listing(address: Address, why: str) -> NoReturn:
    raise StorageError(
        f"the server lists no folder at {address.shown}: {why}; name the shards, as "
        "{00000..00099}.tar or in a .txt list"
    )


class _Links(HTMLParser):
    """The addresses that a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _names_on_hub(location: str) -> list[str]:
    repository, revision, path = _hub_parts(location.rstrip("/"))
    folder = f"datasets/{repository}@{quote(revision, safe='')}/{path}".rstrip("/")
    patience = Patience(Address(_hub(), name=location))
    while True:
        try:
            entries = _entries_on_hub(folder, location)
            break
        except PassingFailure as failure:
            patience.pause(failure, 0)
    names = (str(entry["name"]) for entry in entries if entry["type"] == "file")
    return sorted(name.rpartition("/")[2] for name in names)


def _entries_on_hub(folder: str, location: str) -> list[dict[str, Any]]:
    """What lies in a folder of a repository. Raises StorageError, PassingFailure."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    filesystem = HfFileSystem(endpoint=_hub(), skip_instance_cache=True)
    try:
        found = filesystem.ls(folder, detail=True, refresh=True)
    except FileNotFoundError as error:
        raise StorageError(
            f"there is no folder {location}, or it may not be read; see the spelling, and HF_TOKEN"
        ) from error
    except HTTPError as error:
        response = getattr(error, "response", None)
        why = " ".join(str(error).split())[:300]
        if response is None or may_pass(response.status_code):
            raise PassingFailure(why) from error
        raise StorageError(f"cannot list {location}: {why}; see that you may read it") from error
    except (ValueError, OfflineModeIsEnabled) as error:
        raise StorageError(f"cannot list {location}: {' '.join(str(error).split())}") from error
    return [entry for entry in found if isinstance(entry, dict)]
