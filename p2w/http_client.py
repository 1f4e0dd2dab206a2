"""HTTP requests of a data set: what the server answers, and when another try may help. Reaches no torch.

`requests` fetches manifests and whole shards, and decides which proxies, certificates and .netrc entries hold for a server.
`p2w.stream.http` receives byte ranges with the same settings, and without `requests` where there is no proxy. A request may
take CONNECT_S to connect and READ_S without a byte; a body that takes longer must arrive at SLOWEST bytes a second at least.

- 5xx, 408, 429, a connection that is refused, reset or silent: tried again, after a pause that doubles up to
  LONGEST_PAUSE_S, or as long as the server's Retry-After says.
- Any other status, and a 206 with other bytes than those asked for: final at once.
"""

import contextlib
import email.utils
import functools
import http.client
import importlib.util
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3

from p2w.errors import UserError

CONNECT_S, READ_S = 30.0, 60.0  # seconds to connect, and without a byte
SLOWEST = 1000  # bytes a second; an answer slower than this counts as none, once it has taken READ_S
TRIES = 5  # at least
PAUSE_S = 0.5  # before the first new try, doubled for each further one
LONGEST_PAUSE_S = 30.0
PIECE = 1 << 20  # bytes read at a time
SIGNED_S = 300  # how long a signed address is used: less than credentials that AWS hands out still hold
_RETRY_STATUS = frozenset({408, 429})  # the statuses below 500 after which another try may succeed
# Answers of a server that cannot give a range of a file that is there
_WITHOUT_RANGES = frozenset({200, 400, 416, 501})
_own = threading.local()  # each thread keeps its own connections
_signing = threading.Lock()  # botocore's sessions are not for several threads

FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)

Headers = Mapping[str, str] | http.client.HTTPMessage
T = TypeVar("T")


class RequestFailed(Exception):
    """A server did not send what was asked for. The message is one line that says why and after how many tries."""


class Refused(Exception):
    """The answer is not the one asked for. `final`: another try is useless; `pause_s`: the wait that the server asks for."""

    def __init__(self, reason: str, final: bool, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.final, self.pause_s = final, pause_s


def reaches(url: str) -> bool:
    """Whether requests can be sent for a URL: http, https, and s3 where botocore is installed."""
    if url.startswith("s3:"):
        return importlib.util.find_spec("botocore") is not None
    return url.startswith(("http:", "https:"))


def address(url: str) -> str:
    """The address that requests for a URL go to: for s3 a signed https address, valid for an hour, else the URL itself.

    Messages name the URL and not the address, which lets anyone read the object. Raises OSError, or Refused.
    """
    return _signed(url, int(time.monotonic() // SIGNED_S)) if url.startswith("s3:") else url


@functools.lru_cache(4096)
def _signed(url: str, _turn: int) -> str:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    with _signing:
        client = _s3_client(bucket)
    parameters = {"Bucket": bucket, "Key": key}
    signed: str = client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=3600)
    return signed


@functools.lru_cache(64)
def _s3_client(bucket: str) -> Any:
    """botocore's client for the region of a bucket, unsigned where this machine has no credentials.

    Credentials, profiles, endpoints and regions are those of AWS's own programs (AWS_ENDPOINT_URL, AWS_PROFILE, roles …).
    """
    import botocore.exceptions  # noqa: PLC0415 - the extra `s3`
    import botocore.session  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    try:
        own = botocore.session.get_session()
        version = "s3v4" if own.get_credentials() else botocore.UNSIGNED
        config = Config(signature_version=version)
        client = own.create_client("s3", config=config)
        # Anybody is told the region of a bucket, without the right to read it; other stores than AWS may not know any.
        url = f"{client.meta.endpoint_url}/{bucket}"
        with session().head(url, timeout=(CONNECT_S, READ_S), allow_redirects=False) as answer:
            region = answer.headers.get("x-amz-bucket-region")
        if region and region != client.meta.region_name:
            client = own.create_client("s3", region_name=region, config=config)
        return client
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise Refused(f"AWS's settings: {error}", final=True) from error


def session() -> requests.Session:
    """This thread's session, which keeps its connections."""
    if not hasattr(_own, "session"):
        _own.session = requests.Session()
    found: requests.Session = _own.session
    return found


def get(url: str, headers: dict[str, str]) -> requests.Response:
    """The answer to a GET, its body still to be read.

    `requests` reads the environment (proxies, certificates, .netrc) for every request, which takes as long as receiving a
    sub-scan; here it is read once for each thread and server. A server that redirects is asked in the usual way, since
    other settings may hold for the server that it names.
    """
    url = address(url)
    parts = urlsplit(url)
    origin = (parts.scheme, parts.netloc)
    servers: dict[tuple[str, str], requests.Session] = _own.__dict__.setdefault("servers", {})
    if origin not in servers:
        servers[origin] = fixed_session(url)
    answer = servers[origin].get(
        url,
        headers=headers,
        stream=True,
        timeout=(CONNECT_S, READ_S),
        allow_redirects=servers[origin].trust_env,
    )
    if answer.is_redirect:
        answer.close()
        servers[origin] = session()
        return get(url, headers)
    return answer


def fixed_session(url: str) -> requests.Session:
    """A session with the settings of the environment for this server, which are not read again."""
    settings = session().merge_environment_settings(url, {}, True, None, None)
    fixed = requests.Session()
    fixed.trust_env = False
    fixed.proxies, fixed.verify, fixed.cert = settings["proxies"], settings["verify"], settings["cert"]
    fixed.auth = requests.utils.get_netrc_auth(url)
    return fixed


def retried(
    ask: Callable[[], T],
    url: str,
    retry_s: float = 0.0,
    on_wait: Callable[[], None] = lambda: None,
    pause_s: float = PAUSE_S,
) -> T:
    """What `ask()`, one request for `url`, returns; tried `TRIES` times at least, and for `retry_s` seconds after a failure.

    `on_wait` is called at least once a second while waiting for the next try, and once for every failure. Raises
    RequestFailed where another try cannot help, or tries and time are used up.
    """
    failed, first = 0, 0.0
    while True:
        try:
            return ask()
        except (*FAILURES, Refused) as error:
            on_wait()
            failed += 1
            now = time.monotonic()
            first = first or now
            refused = error if isinstance(error, Refused) else None
            reason = str(error) if refused else innermost_reason(error)
            pause = min(LONGEST_PAUSE_S, pause_s * 2 ** min(failed - 1, 20)) * random.uniform(0.75, 1.0)
            if refused and refused.pause_s is not None and retry_s:
                pause = max(0.1, min(refused.pause_s, retry_s))  # the server knows better
            # No such host: mistyped, as a rule
            patience = 0.0 if f"[Errno {socket.EAI_NONAME}]" in reason else retry_s
            if (failed >= TRIES and now + pause - first > patience) or (refused and refused.final):
                took = f" over {now - first:.0f} s" if now - first >= 60 else ""
                raise RequestFailed(f"({reason}), tried {failed} times{took}") from error
        logging.getLogger(__name__).warning("%s: %s; trying again", url, reason)
        end = now + pause
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
            on_wait()


def range_headers(start: int, nbytes: int) -> dict[str, str]:
    """Request headers for a range of bytes of the file, uncompressed."""
    return {"Range": f"bytes={start}-{start + nbytes - 1}", "Accept-Encoding": "identity"}


def check_status(status: int, reason: str, headers: Headers, wanted: int) -> None:
    """Raise Refused unless an answer has the status `wanted`."""
    if status == wanted:
        return
    final = status < 500 and status not in _RETRY_STATUS
    raise Refused(f"the server answers {status} {reason}", final, _retry_after(headers))


def check_range(status: int, reason: str, headers: Headers, start: int, nbytes: int) -> None:
    """Raise Refused unless an answer has these bytes of the file, as they are."""
    check_status(status, reason, headers, 206)
    found = headers.get("Content-Range", "")
    if found.partition("/")[0] != f"bytes {start}-{start + nbytes - 1}":
        raise Refused(f"the server gives '{found}' for bytes {start}-{start + nbytes - 1}", final=True)
    _check_encoding(headers)


def _check_encoding(headers: Headers) -> None:
    packed = headers.get("Content-Encoding", "identity")
    if packed != "identity":
        raise Refused(f"the server compresses its answers ({packed})", final=True)


def _retry_after(headers: Headers) -> float | None:
    """Seconds to wait as the header Retry-After says, a number or a date; None without a valid one."""
    said = headers.get("Retry-After", "")
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, float(said))
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    return None


def read_range(url: str, start: int, nbytes: int) -> bytes:
    """Ask once for a range of a file. Raises Refused, or an error of the connection."""
    headers = range_headers(start, nbytes)
    with get(url, headers) as answer:
        check_range(answer.status_code, answer.reason, answer.headers, start, nbytes)
        data: bytes = answer.raw.read(nbytes, decode_content=False)
        if len(data) < nbytes:
            raise Refused(f"{len(data):,} bytes of {nbytes:,} arrived", final=False)
        answer.raw.read(1)  # reads the end of the answer, so that the connection can be used again
        return data


def read_pieces(url: str) -> Generator[bytes, None, None]:
    """Ask once for a whole file, and yield its bytes in pieces. Raises Refused, or an error of the connection."""
    own = {"Accept-Encoding": "identity"}
    with session().get(address(url), headers=own, stream=True, timeout=(CONNECT_S, READ_S)) as answer:
        check_status(answer.status_code, answer.reason, answer.headers, 200)
        _check_encoding(answer.headers)
        began, done = time.monotonic(), 0
        expected = answer.headers.get("Content-Length")
        while data := answer.raw.read(PIECE, decode_content=False):
            yield data
            done += len(data)
            if time.monotonic() - began > READ_S + done / SLOWEST:
                raise Refused(f"{done:,} bytes in {time.monotonic() - began:.0f} s", final=False)
        if expected is not None and done != int(expected):
            raise Refused(f"{done:,} bytes of {int(expected):,} arrived", final=False)


def fetch(url: str, most: int, retry_s: float = 0.0, pause_s: float = PAUSE_S) -> bytes:
    """All bytes of a small file.

    Raises UserError: it cannot be fetched, or has `most` bytes or more.
    """
    try:
        return retried(lambda: _read_file(url, most), url, retry_s, pause_s=pause_s)
    except RequestFailed as error:
        raise UserError(
            f"{url}: cannot be fetched {error}: check the address, and that it is readable from this machine"
        ) from error


def _read_file(url: str, most: int) -> bytes:
    data = bytearray()
    for piece in read_pieces(url):
        data += piece
        if len(data) >= most:
            raise UserError(f"{url}: has {most:,} bytes or more, which no manifest has: check the address")
    return bytes(data)


def supports_ranges(url: str, retry_s: float, pause_s: float) -> bool:
    """Whether the server answers a request for the first byte of a file, which exists, with that byte alone.

    Raises UserError: the server refuses or does not answer, so that this remains unknown.
    """
    try:
        return retried(lambda: _has_ranges(url), url, retry_s, pause_s=pause_s)
    except RequestFailed as error:
        raise UserError(
            f"{url}: whether the server gives byte ranges could not be found out {error}; the order of a run depends on "
            "it: repeat the command when the server answers"
        ) from error


def _has_ranges(url: str) -> bool:
    headers = range_headers(0, 1)
    with session().get(address(url), headers=headers, stream=True, timeout=(CONNECT_S, READ_S)) as answer:
        if answer.status_code == 206:
            with contextlib.suppress(Refused):
                check_range(answer.status_code, answer.reason, answer.headers, 0, 1)
                return True
            return False
        if answer.status_code not in _WITHOUT_RANGES:
            check_status(answer.status_code, answer.reason, answer.headers, 206)
        answer.close()  # the rest of the file is not read
        return False


def refuses(url: str) -> bool:
    """Whether an http(s) server answers a request for this file in a way that another try will not change; asked once."""
    if not reaches(url):
        return False
    try:
        with session().get(address(url), stream=True, timeout=(CONNECT_S, READ_S)) as answer:
            check_status(answer.status_code, answer.reason, answer.headers, 200)
    except Refused as error:
        return error.final
    except FAILURES:
        return False
    return False


def innermost_reason(error: BaseException) -> str:
    """The message of the innermost error; the errors around it repeat the address and print objects."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return innermost_reason(reason)
    return (str(error).splitlines() or [type(error).__name__])[0]
