"""How huggingface_hub talks to a server that may be silent, endless or hostile: every answer is bounded and looked at.

What is refused here has not been written anywhere.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from functools import cache
from time import monotonic
from typing import Any

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import _http, logging

from converters.errors import ModelError, UnreachableError
from converters.mask import masked

_NAME = re.compile(r'(?:W/)?"?[A-Za-z0-9][A-Za-z0-9._-]*"?')
_DIGEST = re.compile(r"[0-9a-f]{40,64}")
_NAMES = (("x-linked-etag", "etag"), ("x-repo-commit",), ("x-xet-hash",))  # of each, the first that is there
_DIGESTS = ("sha", "oid", "xetHash")  # in answers about repositories: names of files in the cache, too
_AGAIN = 100  # times that one address is asked for without its body, or one page of a list: less than any loop
_ANSWER_BYTES = 1 << 28  # of what is no file
_UNSIZED_BYTES = 1 << 30  # of a file whose length is not announced: text that the server compresses
_SLOWEST = 256  # bytes a second
_MEND = "See whether the Hub can be reached, and HF_ENDPOINT."


@cache
def use_bounded_client() -> None:
    """Have huggingface_hub ask through BoundedClient from now on, in this process."""

    def make() -> httpx2.Client:
        return BoundedClient(
            event_hooks={"request": [_http.hf_request_event_hook]},
            follow_redirects=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )

    set_client_factory(make)
    logging.set_verbosity_error()  # its warnings show addresses, with credentials, and what is told again as an error


class BoundedClient(httpx2.Client):
    """Waits for nobody longer than its timeout, and takes no more than was announced. UnreachableError says so.

    ModelError for an answer by whose names a file would be written outside of the cache.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        """See httpx2.Client."""
        self._count(request)
        limits = request.extensions.get("timeout", {})  # huggingface_hub asks for some lists without any
        given = self.timeout.as_dict()
        request.extensions["timeout"] = {name: limits.get(name) or given[name] for name in given}
        try:
            response = super().send(request, stream=True, **options)
        except (httpx2.TimeoutException, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
            raise _unreachable(request, _told(error)) from error
        try:
            for each in (*response.history, response):
                _require_names(each)
            _require_short_wait(request, response)
            response.stream = _Bounded(response.stream, request, response, self.timeout.read or 0)
            if not stream:
                response.read()
                _require_digests(response)
        except httpx2.TimeoutException as error:
            response.close()
            raise _unreachable(request, _told(error)) from error
        except BaseException:
            response.close()
            raise
        return response

    def _count(self, request: httpx2.Request) -> None:
        """What redirects to itself, or names itself as its own next page, is asked for without end."""
        if request.method not in ("GET", "HEAD"):
            return
        with self._lock:
            asked = f"{request.method} {request.url}"
            self._asked[asked] += 1
            if self._asked[asked] > _AGAIN:
                raise _unreachable(request, "it leads back to itself")


class _Bounded(httpx2.SyncByteStream):
    """A body, given up when it is longer than it may be, or comes by drops."""

    def __init__(self, stream: Any, request: httpx2.Request, response: httpx2.Response, seconds: float) -> None:
        self._stream, self._request, self._seconds = stream, request, seconds
        is_file = "/resolve/" in request.url.path
        sized = "content-length" in response.headers
        self._most = None if is_file and sized else _UNSIZED_BYTES if is_file else _ANSWER_BYTES

    def __iter__(self) -> Iterator[bytes]:
        count, start, since = 0, monotonic(), 0
        for chunk in self._stream:
            count += len(chunk)
            if self._most is not None and count > self._most:
                raise _unreachable(self._request, f"an answer without end, {count:,} bytes so far")
            passed = monotonic() - start
            if self._seconds and passed > self._seconds:
                if (count - since) / passed < _SLOWEST:
                    raise _unreachable(self._request, f"{count - since:,} bytes in {passed:.0f} s")
                start, since = monotonic(), count
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _require_names(response: httpx2.Response) -> None:
    """Of the answer that huggingface_hub takes the names of files in its cache from; other ETags are any text."""
    if response.request.method != "HEAD":
        return
    for headers in _NAMES:
        header = next((header for header in headers if response.headers.get(header)), None)
        if header is not None and not _NAME.fullmatch(response.headers[header]):
            raise _hostile(str(response.request.url), header, response.headers[header])


def _require_digests(response: httpx2.Response) -> None:
    """Of the answer about a repository, or of each file in a list of them."""
    url = response.request.url
    if not url.path.startswith("/api/") or "json" not in response.headers.get("content-type", ""):
        return
    try:
        answer = json.loads(response.content)
    except (ValueError, RecursionError):
        return  # huggingface_hub says what it misses
    for entry in answer if isinstance(answer, list) else [answer]:
        for part in (entry, entry.get("lfs")) if isinstance(entry, dict) else ():
            if not isinstance(part, dict):
                continue
            for key in _DIGESTS:
                value = part.get(key)
                if value is not None and not (isinstance(value, str) and _DIGEST.fullmatch(value)):
                    raise _hostile(str(url), key, value)


def _require_short_wait(request: httpx2.Request, response: httpx2.Response) -> None:
    """huggingface_hub would sleep for as long as a server asks."""
    reset = _http.parse_ratelimit_headers(response.headers)
    asked = response.headers.get("retry-after", "")
    wait = max(reset.reset_in_seconds if reset else 0, int(asked) if asked.isdecimal() else 0)
    if response.status_code >= 400 and wait > constants.HF_HUB_ETAG_TIMEOUT:
        raise _unreachable(request, f"HTTP status {response.status_code}, to be asked again in {wait:,} s")


def _told(error: Exception) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time"
    return "redirects without end" if isinstance(error, httpx2.TooManyRedirects) else "no valid address"


def _unreachable(request: httpx2.Request, found: str) -> UnreachableError:
    host = f"{request.url.scheme}://{request.url.netloc.decode()}"
    return UnreachableError("the Hub could not be reached", where=masked(host), found=found, mend=_MEND)


def _hostile(url: str, name: str, value: object) -> ModelError:
    return ModelError(
        "the server's answer names no digest",
        where=f"{masked(url).split('?')[0]}: {name}",
        expected="letters and digits",
        found=repr(value)[:100],
        mend="It would be written outside of the cache. Trust HF_ENDPOINT no more, or leave it out.",
    )
