"""One question to an HTTP server: what it may make us do, and what its answer means.

    redirects   five at most, to http or https, never from https to http, and never from a public
                host to an address inside (loopback, private); credentials go to their own host only
    failures    no connection, a cut, a time-out, a silence, a trickle, status 408, 425, 429 or 5xx
                may pass: asked again after growing pauses or the server's own Retry-After, until
                `ATTEMPTS` in a row brought nothing; other statuses are final

Knows nothing of what is asked for.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import NoReturn
from urllib.parse import urljoin, urlsplit

import httpx

from data_prep.storage.uris import StorageError, shown

log = logging.getLogger("flowreel.prepare")

ATTEMPTS = 7
"""Requests in a row that may bring nothing before it is an error."""
PAUSE_S = 0.5
"""The pause after the first of them; it doubles each time."""
MAX_PAUSE_S = 60.0
CONNECT_S = 10.0
SILENCE_S = 60.0
"""A server that sends nothing for so long is asked again."""
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429)


@dataclass(frozen=True)
class Address:
    """Where a file is, and what its own host is to be told.

    >>> Address("https://host/a.tar?sig=x", {"authorization": "Basic eDp5"}).shown
    'https://host/a.tar'
    """

    url: str = field(repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    """Sent to the address's own scheme, host and port only."""
    name: str = ""
    """What messages call it; by default the URL without its query."""

    @property
    def shown(self) -> str:
        """Without anything secret."""
        return self.name or shown(self.url)


class PassingFailure(Exception):
    """A failure that may pass. `pause_s` is what the server asks for, in seconds."""

    def __init__(self, detail: str, pause_s: float = 0.0) -> None:
        super().__init__(detail)
        self.pause_s = pause_s


class Patience:
    """How often an address is asked in vain.

    >>> patience = Patience(Address("https://host/a.tar"))
    >>> patience.failures
    0
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self.failures = 0
        """In a row."""

    def pause(self, failure: PassingFailure, place: int) -> None:
        """Wait before the next attempt. Raises StorageError if there is none left.

        Args:
            failure: what went wrong.
            place: bytes of the file that have come so far.
        """
        self.failures += 1
        if self.failures >= ATTEMPTS:
            raise StorageError(
                f"cannot read {self._address.shown} at byte {place}: {failure}, {ATTEMPTS} times "
                "in a row; see that the server answers, then run the same command again: what is "
                "finished is kept"
            ) from failure
        # One cut is everyday; who is waited for longer is said aloud.
        level = logging.INFO if self.failures < 3 else logging.WARNING
        log.log(level, "%s at byte %d: %s; asked again", self._address.shown, place, failure)
        pause_s = max(failure.pause_s, PAUSE_S * 2 ** (self.failures - 1))
        time.sleep(min(pause_s, MAX_PAUSE_S))


@lru_cache(maxsize=1)
def _client() -> httpx.Client:
    """One pool of connections a process; proxies and certificates are those of the environment."""
    # The library logs every URL with its query, in which a signature may be.
    logging.getLogger("httpx").addFilter(_without_query)
    return httpx.Client(
        # Bytes come as they are stored: a small answer cannot unfold into a large one.
        headers={"accept-encoding": "identity", "user-agent": "flowreel"},
        timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        follow_redirects=False,
    )


def _without_query(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(shown(str(a)) if isinstance(a, httpx.URL) else a for a in record.args)
    return True


def ask(address: Address, headers: dict[str, str], via: str = "") -> tuple[httpx.Response, str]:
    """The answer at the end of the redirects, open, with its status checked; and its URL.

    Args:
        address: where the file is.
        headers: of the request.
        via: where an earlier request was redirected to, to be asked directly.

    Raises:
        FileNotFoundError: there is no such file.
        PassingFailure: it may be asked again.
        StorageError: it is refused, or a redirect breaks the rules.
    """
    origin, url = httpx.URL(address.url), httpx.URL(via or address.url)
    tag = ""
    for _ in range(_MAX_REDIRECTS + 1):
        own = address.headers if _host_of(url) == _host_of(origin) else {}
        request = _client().build_request("GET", url, headers={**headers, **own})
        response = _client().send(request, stream=True)
        # A hub's tag is of the file; that of the store behind it, where it redirects to, is not.
        tag = tag or response.headers.get("x-linked-etag", "")
        if response.status_code not in _REDIRECTS:
            break
        response.close()
        target = urljoin(str(url), response.headers.get("location", ""))
        check_redirect(address.url, str(url), target)
        url = httpx.URL(target)
    else:
        raise StorageError(f"{address.shown} redirects more than {_MAX_REDIRECTS} times")
    if response.status_code not in (200, 206, 416):
        response.close()
        _refuse(response, address, is_via=bool(via))
    if tag:
        response.headers["x-linked-etag"] = tag
    return response, str(url)


def _host_of(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def check_redirect(named: str, here: str, there: str) -> None:
    """Hold a redirect against the rules at the top of this file.

    >>> check_redirect("https://1.1.1.1/a", "https://1.1.1.1/a", "https://8.8.8.8/b")
    >>> check_redirect("https://1.1.1.1/a", "https://1.1.1.1/a", "http://8.8.8.8/b")
    Traceback (most recent call last):
    ...
    data_prep.storage.uris.StorageError: https://1.1.1.1/a redirects from https to \
http://8.8.8.8/b; such a redirect is not followed: give the address that it should lead to

    Args:
        named: the address that the user gave.
        here: the address that redirects, `named` itself or one that it led to.
        there: where it leads to.

    Raises:
        StorageError: it is not to be followed.
    """
    scheme = urlsplit(there).scheme
    if scheme not in ("http", "https"):
        why = f"redirects to {shown(there)}, which is neither http nor https"
    elif urlsplit(here).scheme == "https" and scheme == "http":
        why = f"redirects from https to {shown(there)}"
    elif _is_inside(httpx.URL(there).host) and not _is_inside(httpx.URL(named).host):
        why = f"redirects from a public host to an address inside, {shown(there)}"
    else:
        return
    raise StorageError(
        f"{shown(named)} {why}; such a redirect is not followed: give the address that it should "
        "lead to"
    )


def _is_inside(host: str) -> bool:
    """Whether a host has an address that is not public; a name that only a proxy knows has none."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    addresses = (ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found)
    return any(not address.is_global for address in addresses)


def may_pass(status: int) -> bool:
    """Whether another request may have another answer than this status.

    >>> may_pass(503), may_pass(403)
    (True, False)
    """
    return status in _PASSING or status >= 500


def _refuse(response: httpx.Response, address: Address, *, is_via: bool) -> NoReturn:
    """Raise what a status means that brings no bytes."""
    status = response.status_code
    reason = f"status {status} {response.reason_phrase}"[:100].strip()
    if may_pass(status):
        wait = response.headers.get("retry-after", "")
        raise PassingFailure(f"the server answers {reason}", float(wait) if wait.isdigit() else 0.0)
    if is_via:
        # Signed addresses, to which stores redirect, end after a while.
        raise PassingFailure(f"where it redirected to, the server answers {reason}")
    if status in (404, 410):
        raise FileNotFoundError("no such file")
    if status in (401, 403):
        advice = "see that you may read it; credentials are those of ~/.netrc, for hf:// HF_TOKEN"
    else:
        advice = "see that this is the address of a file"
    raise StorageError(f"cannot read {address.shown}: the server answers {reason}; {advice}")


@contextmanager
def network_failures(address: Address) -> Iterator[None]:
    """What the network does, as PassingFailure; an address that is none, as StorageError."""
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise StorageError(f"{address.shown} is no address of a file: {error}") from error
    except httpx.TransportError as error:
        raise PassingFailure(_in_words(error)) from error


def _in_words(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection in {CONNECT_S:g} s"
    if isinstance(error, httpx.TimeoutException):
        return f"the server sent nothing for {SILENCE_S:g} s"
    if isinstance(error, httpx.ConnectError):
        return f"no connection ({' '.join(str(error).split())[:200]})"
    return f"the connection was cut ({type(error).__name__})"


def read_text(address: Address, max_bytes: int) -> tuple[str, str]:
    """A small text, and the type that the server gives it, such as `text/html`.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it is longer than `max_bytes`, or the server refuses it or fails for long.
    """
    patience = Patience(address)
    while True:
        try:
            with network_failures(address):
                response, _ = ask(address, {})
                return _text_of(response, address, max_bytes)
        except PassingFailure as failure:
            patience.pause(failure, 0)


def _text_of(response: httpx.Response, address: Address, max_bytes: int) -> tuple[str, str]:
    data = bytearray()
    try:
        for chunk in response.iter_raw():
            data += chunk
            if len(data) > max_bytes:
                raise StorageError(
                    f"{address.shown} answers with more than {max_bytes} bytes of text; name the "
                    "shards in a .txt list"
                )
    finally:
        response.close()
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return data.decode("utf-8", "replace"), kind
