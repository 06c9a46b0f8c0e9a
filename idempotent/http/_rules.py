"""What the header means, what makes two requests the same, what is kept of an answer, and the answers of our own.

Pure: no I/O, no clock and no framework. The words are those of draft-ietf-httpapi-idempotency-key-header, and of RFC 9457
for the problem answers.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import Any, Final, Literal, NamedTuple, Required, TypedDict, cast

try:
    import http_sf
except ImportError as error:
    raise ImportError("the middleware needs http-sf: pip install 'idempotent-py[http]'") from error
import msgspec
import orjson

from idempotent._options import Duration, seconds
from idempotent._record import FINGERPRINT_BYTES
from idempotent.backends.base import Backend
from idempotent.errors import (
    BackendError,
    FingerprintMismatch,
    IdempotencyError,
    InProgress,
    InvalidKey,
    LeaseLost,
    OutcomeUnknown,
    ResultUnavailable,
    SerializationError,
)
from idempotent.http._fields import checked_name, is_token
from idempotent.keys import check_key
from idempotent.serializers import Codec, Serializer, codec_around

__all__ = ["GLOBAL", "Global", "Headers", "Options", "Refused", "Request", "Response", "Rules", "describe", "problem"]


class Global(Enum):
    """The type of GLOBAL: all callers share one space of keys."""

    GLOBAL = "global"

    def __repr__(self) -> str:
        return "GLOBAL"


GLOBAL: Final = Global.GLOBAL
"""The scope of a service whose callers are all one: whoever sends the same key is given the same answer."""

RawHeaders = list[tuple[bytes, bytes]]


class Headers(Mapping[str, str]):
    """Header fields by name, in any case. A field that came several times is joined with ", "; `raw` has the lines."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self.raw: RawHeaders = [(bytes(name).lower(), bytes(value)) for name, value in raw]

    def lines(self, name: str) -> list[bytes]:
        """The values of the field, a line each."""
        wanted = name.lower().encode("latin-1", "replace")
        return [value for name, value in self.raw if name == wanted]

    def __getitem__(self, name: str) -> str:
        lines = self.lines(name)
        if not lines:
            raise KeyError(name)
        return b", ".join(lines).decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name.decode("latin-1") for name, _ in self.raw))

    def __len__(self) -> int:
        return len({name for name, _ in self.raw})


@dataclass(frozen=True, slots=True)
class Request:
    """A request as `scope`, `paths` and `fingerprint` callables see it: the same for ASGI, WSGI and Django."""

    method: str
    """In capitals."""
    path: str
    """Decoded, with the prefix that the application is mounted under: two mounts of one application differ in it."""
    query: str
    """As it came, without the question mark."""
    headers: Headers
    native: Any
    """What the framework calls it: the ASGI scope, the WSGI environ, Django's HttpRequest."""


class Response(NamedTuple):
    """An answer: what is kept, and what a `scope` callable may refuse a request with."""

    status: int
    headers: RawHeaders = []  # noqa: RUF012  never changed in place
    """Raw lines, in order; a name may come several times."""
    body: bytes = b""


class Options(TypedDict, total=False):
    """What the middlewares and `route_class` take, all by keyword; durations are seconds or timedelta.

    scope: who is asking. A callable on the Request that returns text, such as the account's id, which becomes part of
        the record's id; or a Response, which refuses the request. GLOBAL: all callers share one space of keys.
    backend: where records live, a Backend or its URL. None: what `configure` or `IDEMPOTENT_URL` say.
    namespace: what keys are unique within, beside the scope. Default "http"; one for each service on a shared store.
    methods: those that are served; others are left alone. Default POST and PATCH.
    paths: those that are served. None: all. A list of one path or more, in which `*` stands for any text and a leading `!` takes
        out; or a callable on the Request that returns whether it is served.
    required: whether a served request without a key is refused with 400. Default False: it is left alone.
    header: the name of the field. Default Idempotency-Key.
    ttl: for how long 2xx and 3xx answers are replayed. Default one day.
    error_ttl: for how long 4xx answers are, but for 401, 403, 408, 425 and 429. 0: not at all. Default 60.
    lease: how long a claim outlives a dead worker; renewed while the application runs. Default 30.
    wait: how long a duplicate waits for the running request before it is answered 409. None: no limit. Default 0.
    max_waiting: how many requests of this process wait at once; more are answered 409 without waiting. Default 1,000.
    max_body: bytes of a request's body that are accepted with a key; more is answered 413. Default 1 MiB.
    max_response: bytes of an answer's body that are kept; a larger one is passed on, and duplicates are told that it
        was done. Default 1 MiB.
    fingerprint: what makes two requests with one key the same. True: method, path, query, content type and body.
        False: nothing is compared. A callable on the Request and its body that returns str or bytes.
    keep_headers: names of response fields that are replayed beside those that always are. Default none.
    docs_url: the page where the service publishes its rules; problem answers link to it. None: they do not.
    on_crash: as in `idempotent`: "rerun", "raise", or a probe that returns Applied(Response(...)), NotApplied() or
        StillUnknown(); Applied(None): it was done, and its answer is not to be had. Default "rerun".
    serializer: Compressed(...) or Encrypted(...) with no inner serializer, for answers and results of steps that are
        kept. None: they are kept as they are.
    """

    scope: Required["Callable[[Request], str | Response | Global] | Global"]
    backend: "Backend | str | None"
    namespace: str
    methods: Iterable[str]
    paths: "Iterable[str] | Callable[[Request], bool] | None"
    required: bool
    header: str
    ttl: Duration
    error_ttl: Duration
    lease: Duration
    wait: Duration | None
    max_waiting: int
    max_body: int
    max_response: int
    fingerprint: "bool | Callable[[Request, bytes], str | bytes]"
    keep_headers: Iterable[str]
    docs_url: str | None
    on_crash: "Literal['rerun', 'raise'] | Callable[..., Any]"
    serializer: Serializer | None


SAFE = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "CONNECT"))
"""Methods without an effect to do once, or none of which an answer could be kept."""

_BARE = re.compile(rb"[!#-+\--:<-~]+")  # visible ASCII without '"', ',' and ';'
_VISIBLE = re.compile(r"[!-~]+")
_URL = re.compile(r"[!#-;=?-~]+")  # no space, quotes or angle brackets

MAX_KEY = 255
"""Characters of a key, as it is meant and not as it is quoted."""
PATTERN = r"""^([!#-+\--:<-~]{1,255}|"([!#-\[\]-~]|\\["\\]){1,255}")$"""
"""What `parse_key` takes, for OpenAPI."""


class Refused(Exception):
    """The request cannot be served; `answer` says why."""

    def __init__(self, answer: Response) -> None:
        super().__init__(answer.status)
        self.answer = answer


def parse_key(lines: Sequence[bytes]) -> str | None:
    """The key that the field's lines name: a structured-field string, or a bare run of visible ASCII that means the same.

    None if they name none that is valid: several lines, no or more than 255 characters, parameters, a space inside.
    """
    if len(lines) != 1:
        return None
    text = lines[0].strip(b" \t")
    if len(text) > 2 * MAX_KEY + 2:
        return None
    if _BARE.fullmatch(text):
        key = text.decode("ascii")
    else:
        if not text.startswith(b'"'):
            return None
        try:
            parsed: Any = http_sf.parse(text, tltype="item")
        except ValueError:
            return None
        key, parameters = parsed
        if parameters or not isinstance(key, str):
            return None
    return key if len(key) <= MAX_KEY and _VISIBLE.fullmatch(key) else None


def fingerprint_of(request: Request, body: bytes) -> bytes:
    """Digest of what must not change between two requests with one key."""
    digest = blake2b(digest_size=FINGERPRINT_BYTES)
    content_type = request.headers.get("content-type", "")
    texts = (request.method, request.path, request.query, content_type)
    for part in (*(text.encode("utf-8", "surrogateescape") for text in texts), body):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def record_key(who: str | Global, key: str) -> str:
    """Scope and key as one text, joined without ambiguity. Raises InvalidKey for a scope that makes none."""
    return check_key(f"-:{key}" if who is GLOBAL else f"{len(who)}:{who}:{key}")


_NEVER_KEPT = frozenset((401, 403, 408, 425, 429))
"""Of the 4xx: the next try may well be answered otherwise."""
BODILESS = (204, 304)

_KEPT = frozenset(
    b"accept-patch accept-post allow content-digest content-disposition content-encoding content-language"
    b" content-location content-security-policy content-type deprecation etag last-modified link location"
    b" preference-applied repr-digest retry-after sunset vary warning x-content-type-options".split()
)
_NEVER_REPLAYED = frozenset(
    b"connection content-length date keep-alive proxy-authenticate proxy-authorization proxy-connection set-cookie"
    b" set-cookie2 te trailer transfer-encoding upgrade".split()
)
"""Hop-by-hop fields, those that are made anew for each answer, and what would hand one client's session to another."""

REPLAYED = (b"idempotency-replayed", b"true")
NOT_STORED = (b"idempotency-stored", b"false")
_NO_STORE = (b"cache-control", b"no-store")

_PROBLEMS: dict[str, tuple[int, str, str]] = {
    "key-missing": (400, "Idempotency key missing", "This operation needs a key in the {header} header."),
    "key-invalid": (
        400,
        "Idempotency key invalid",
        "The {header} header must come once and hold 1 to 255 visible ASCII characters, best as a quoted string.",
    ),
    "key-reused": (
        422,
        "Idempotency key reused",
        "This key was used with another request. Use a new key for a new operation.",
    ),
    "in-progress": (
        409,
        "Request in progress",
        "A request with this key is still being processed. Send the same request again later.",
    ),
    "outcome-unknown": (
        409,
        "Outcome unknown",
        "A request with this key was interrupted, and whether it took effect has to be found out first.",
    ),
    "result-unavailable": (
        409,
        "Result unavailable",
        "A request with this key was processed and is not processed again, but its answer was not kept.",
    ),
    "body-too-large": (413, "Request body too large", "With an idempotency key the body may have {max_body} bytes."),
    "backend-unavailable": (
        503,
        "Idempotency store unavailable",
        "The request was not processed. Send it again later, with the same key.",
    ),
}
_OUTAGE_PAUSE = 5.0
"""Seconds after which clients may ask again while the backend is out."""


class ResponseCodec:
    """How a Response is kept: MessagePack, an array of status, header lines and body."""

    name = "http1"

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(Response)

    def ready(self) -> None:
        """Nothing to prepare."""

    def keep(self, value: Response | None, record: str) -> tuple[bytes, Response]:
        """None stands for an answer that is not at hand: a stream, or larger than `max_response`."""
        if value is None:
            raise SerializationError("it was a stream, or larger than max_response")
        return msgspec.msgpack.encode(value), value

    def decode(self, data: bytes, record: str) -> Response:
        """The response. Raises msgspec's errors for other bytes."""
        return self._decoder.decode(data)


@dataclass(frozen=True, slots=True)
class Rules:
    """`Options`, checked, with the defaults; durations in seconds."""

    scope: Callable[[Request], str | Response | Global] | Global
    backend: Backend | str | None
    namespace: str
    methods: frozenset[str]
    served: Callable[[Request], bool] | None
    """Which paths; None: all."""
    required: bool
    header: str
    ttl: float
    error_ttl: float
    lease: float
    wait: float | None
    max_waiting: int
    max_body: int
    max_response: int
    fingerprint: bool | Callable[[Request, bytes], str | bytes]
    keep: frozenset[bytes]
    docs_url: str | None
    on_crash: str | Callable[..., Any]
    serializer: Serializer | None
    codec: Codec

    @classmethod
    def checked(cls, options: Mapping[str, Any]) -> "Rules":
        """The rules that `options` make; a TypeError or ValueError that names the first wrong one."""
        given = dict(options)
        if "scope" not in given:
            raise TypeError(
                "scope is required: a callable on the request that says who is asking, or idempotent.http.GLOBAL"
            )
        scope: Any = given.pop("scope")
        if scope is not GLOBAL and (not callable(scope) or is_async(scope)):
            raise TypeError(f"scope must be a sync callable on the request, or idempotent.http.GLOBAL, not {scope!r}")
        wait = given.pop("wait", 0)
        fingerprint: Any = given.pop("fingerprint", True)
        if not isinstance(fingerprint, bool) and (not callable(fingerprint) or is_async(fingerprint)):
            raise TypeError(f"fingerprint must be True, False or a sync callable, not {fingerprint!r}")
        serializer = given.pop("serializer", None)
        docs_url = given.pop("docs_url", None)
        if docs_url is not None and not (isinstance(docs_url, str) and _URL.fullmatch(docs_url)):
            raise ValueError(f"docs_url must be a URL, not {docs_url!r}")
        rules = cls(
            scope=cast("Any", scope),
            backend=given.pop("backend", None),
            namespace=_namespace(given.pop("namespace", "http")),
            methods=_methods(given.pop("methods", ("POST", "PATCH"))),
            served=_served(given.pop("paths", None)),
            required=_flag("required", given.pop("required", False)),
            header=checked_name("header", given.pop("header", "Idempotency-Key")),
            ttl=seconds("ttl", given.pop("ttl", 86_400)),
            error_ttl=seconds("error_ttl", given.pop("error_ttl", 60), zero=True),
            lease=seconds("lease", given.pop("lease", 30)),
            wait=None if wait is None else seconds("wait", wait, zero=True),
            max_waiting=_count("max_waiting", given.pop("max_waiting", 1000)),
            max_body=_count("max_body", given.pop("max_body", 1 << 20)),
            max_response=_count("max_response", given.pop("max_response", 1 << 20)),
            fingerprint=cast("Any", fingerprint),
            keep=_KEPT | _also_kept(given.pop("keep_headers", ())),
            docs_url=docs_url,
            on_crash=given.pop("on_crash", "rerun"),
            serializer=serializer,
            codec=codec_around(serializer, ResponseCodec()),
        )
        if given:
            raise TypeError(f"there is no option {next(iter(given))!r}")
        return rules

    def covers(self, request: Request) -> bool:
        """Whether requests of this method and path are served."""
        return request.method in self.methods and (self.served is None or self.served(request))

    def key_of(self, request: Request) -> str | None:
        """The key of a request that is served; None: it has none and goes on as it is. Raises Refused."""
        lines = request.headers.lines(self.header)
        if not lines:
            if self.required:
                raise Refused(self.problem("key-missing"))
            return None
        key = parse_key(lines)
        if key is None:
            raise Refused(self.problem("key-invalid"))
        return key

    def length_of(self, request: Request) -> int | None:
        """The length that the request's body claims to have. Raises Refused if that is over the cap."""
        claimed = request.headers.get("content-length", "").strip()
        if not (claimed.isascii() and claimed.isdecimal()):
            return None
        if len(claimed) > 18 or int(claimed) > self.max_body:
            raise Refused(self.problem("body-too-large"))
        return int(claimed)

    def record_of(self, request: Request, key: str) -> str:
        """What the record is named within the namespace. Raises Refused, and what the scope callable raises."""
        who = self.scope if isinstance(self.scope, Global) else self.scope(request)
        if isinstance(who, Response):
            raise Refused(sendable(who, "scope= refused the request by"))
        if not isinstance(who, (str, Global)) or who == "":
            raise TypeError(
                f"scope= must return who is asking, as text that is not empty, and gave {type(who).__name__} for"
                f" {request.method} {request.path}; return a Response(401) to refuse, or GLOBAL for one space of keys"
            )
        try:
            return record_key(who, key)
        except InvalidKey:
            raise Refused(self.problem("key-invalid")) from None

    def fingerprint_of(self, request: Request, body: bytes) -> bytes:
        """16 bytes that tell requests with one key apart; b"": nothing is compared."""
        if isinstance(self.fingerprint, bool):
            return fingerprint_of(request, body) if self.fingerprint else b""
        given = self.fingerprint(request, body)
        if isinstance(given, str):
            given = given.encode("utf-8", "surrogatepass")
        if not isinstance(given, bytes):
            raise TypeError(f"fingerprint= must return str or bytes, not {type(given).__name__}")
        return blake2b(given, digest_size=FINGERPRINT_BYTES).digest()

    def kept_for(self, status: int) -> float | None:
        """For how many seconds an answer of this status is kept; None: the key is free again."""
        if 200 <= status < 400:
            return self.ttl
        if 400 <= status < 500 and status not in _NEVER_KEPT and self.error_ttl > 0:
            return self.error_ttl
        return None

    def kept(self, response: Response) -> Response:
        """What is kept of an answer: of its headers those on the allow-list."""
        named = {
            word.strip().lower()
            for name, value in response.headers
            if name.lower() == b"connection"
            for word in value.split(b",")
        }
        allowed = self.keep - named
        headers = [(name.lower(), value) for name, value in response.headers if name.lower() in allowed]
        return Response(response.status, headers, response.body)

    def replayed(self, kept: Response) -> Response:
        """A kept answer as a duplicate gets it."""
        headers = [*kept.headers, REPLAYED, _NO_STORE]
        if kept.status not in BODILESS:
            headers.append((b"content-length", b"%d" % len(kept.body)))
        return Response(kept.status, headers, kept.body)

    def problem(self, kind: str, *, retry_after: float | None = None) -> Response:
        """The answer to a request that is not served; see `problem`."""
        answer = problem(kind, header=self.header, max_body=self.max_body, docs_url=self.docs_url)
        if retry_after is not None:
            answer.headers.append((b"retry-after", b"%d" % max(1, math.ceil(retry_after))))
        return answer

    def problem_of(self, error: BaseException) -> Response | None:
        """What the client is told of an error of ours; None: it is none, and goes on its way."""
        if not isinstance(error, IdempotencyError):
            return None
        if isinstance(error, FingerprintMismatch):
            return self.problem("key-reused")
        if isinstance(error, InProgress):
            return self.problem("in-progress", retry_after=error.retry_after)
        if isinstance(error, LeaseLost):  # another run holds the key, and its answer will be the answer
            return self.problem("in-progress", retry_after=1)
        if isinstance(error, OutcomeUnknown):
            return self.problem("outcome-unknown")
        if isinstance(error, ResultUnavailable):
            return self.problem("result-unavailable")
        if isinstance(error, BackendError):
            return self.problem("backend-unavailable", retry_after=_OUTAGE_PAUSE)
        return None


def problem(kind: str, *, header: str, max_body: int, docs_url: str | None) -> Response:
    """A problem answer (RFC 9457) of the type `urn:idempotent:<kind>`; nothing in it comes from the request."""
    status, title, detail = _PROBLEMS[kind]
    body = orjson.dumps(
        {
            "type": f"urn:idempotent:{kind}",
            "title": title,
            "status": status,
            "detail": detail.format(header=header, max_body=max_body),
        }
    )
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
    if docs_url is not None:
        headers.append((b"link", f'<{docs_url}>; rel="describedby"'.encode("ascii")))
    return Response(status, headers, body)


def sendable(answer: Any, whose: str) -> Response:
    """A Response that a callable of the service's gave. Raises TypeError for what no server could send."""
    if not isinstance(answer, Response):
        raise TypeError(f"{whose} {type(answer).__name__}, which is no idempotent.http.Response")
    status, headers, body = cast("tuple[Any, Any, Any]", answer)
    wrong = None
    if isinstance(status, bool) or not isinstance(status, int) or not 200 <= status <= 599:
        wrong = f"a status of {status!r}, which must be a number from 200 to 599"
    elif not isinstance(body, bytes):
        wrong = f"a body of {type(body).__name__}, which must be bytes"
    elif not isinstance(headers, list) or not all(
        isinstance(line, (tuple, list)) and len(line) == 2 and all(isinstance(part, bytes) for part in line)
        for line in headers
    ):
        wrong = "headers that are no list of pairs of bytes, as [(b'www-authenticate', b'Bearer')] is"
    if wrong is not None:
        raise TypeError(f"{whose} a Response with {wrong}")
    return answer


def is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  an object whose __call__ is async is async
    )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, and is {value}")
    return value


def _name(option: str, value: Any) -> str:
    if not is_token(value):
        raise ValueError(f"{option} must be the name of a header field, not {value!r}")
    return value


def _several(option: str, value: Any) -> Iterable[Any]:
    if not isinstance(value, Iterable):
        raise TypeError(f"{option} must be a list or a tuple, not {value!r}")
    return value


def _namespace(value: Any) -> str:
    try:
        return check_key(value)
    except IdempotencyError as error:
        raise ValueError(f"namespace must be text that makes a key, not {value!r}") from error


def _methods(given: Any) -> frozenset[str]:
    if isinstance(given, str):
        raise TypeError(f"methods must be a tuple of methods, such as ({given!r},)")
    methods = frozenset(_several("methods", given))
    if not methods:
        raise ValueError("methods must name one at least; without any no request is served")
    for method in methods:
        if not is_token(method) or method != method.upper():
            raise ValueError(f"methods must be HTTP methods in capitals, not {method!r}")
        if method in SAFE:
            raise ValueError(f"methods must not name {method}: it changes nothing that a key could protect")
    return methods


def _also_kept(given: Any) -> frozenset[bytes]:
    if isinstance(given, str):
        raise TypeError(f"keep_headers must be a tuple of names, such as ({given!r},)")
    names = frozenset(_name("keep_headers", name).lower().encode() for name in _several("keep_headers", given))
    for name in names & _NEVER_REPLAYED:
        raise ValueError(f"keep_headers must not name {name.decode()}, which is never replayed")
    return names


def _served(paths: Any) -> Callable[[Request], bool] | None:
    if paths is None:
        return None
    if is_async(paths):  # what it returns would be true whatever it says
        raise TypeError(f"paths must be a list of paths or a sync callable on the request, not {paths!r}")
    if callable(paths):
        return lambda request: bool(paths(request))
    match = _matcher(paths)
    return lambda request: match(request.path)


def _matcher(paths: Any) -> Callable[[str], bool]:
    if isinstance(paths, str):
        raise TypeError(f"paths must be a list of paths, such as [{paths!r}]")
    wanted: list[str] = []
    unwanted: list[str] = []
    for path in _several("paths", paths):
        if not isinstance(path, str) or not path.removeprefix("!").startswith(("/", "*")):
            raise ValueError(f"paths must begin with '/', after a '!' where they are taken out, not {path!r}")
        (unwanted if path.startswith("!") else wanted).append(path.removeprefix("!"))
    if not wanted and not unwanted:
        raise ValueError("paths must name one at least; without any no request is served, and None serves all")
    yes, no = _pattern(wanted or ["*"]), _pattern(unwanted)
    return lambda path: yes.fullmatch(path) is not None and no.fullmatch(path) is None


def _pattern(paths: list[str]) -> re.Pattern[str]:
    if not paths:
        return re.compile(r"(?!)")  # matches nothing
    return re.compile("|".join(".*".join(map(re.escape, path.split("*"))) for path in paths), re.DOTALL)


_PROBLEM_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
    "required": ["type", "title", "status"],
}


def operation(*, header: str, required: bool, ttl: float, error_ttl: float) -> dict[str, Any]:
    """The `parameters` and `responses` that the middleware adds to an OpenAPI operation; durations in seconds."""
    kinds: dict[int, list[str]] = {}
    for kind, (status, _, _) in _PROBLEMS.items():
        kinds.setdefault(status, []).append(kind)
    return {
        "parameters": [
            {
                "name": header,
                "in": "header",
                "required": required,
                "description": "A fresh key for each operation, kept through its retries: best a quoted UUID."
                f" Its answer is kept for {ttl:.15g} seconds, a 4xx one for {error_ttl:.15g}.",
                "schema": {"type": "string", "pattern": PATTERN},
            }
        ],
        "responses": {
            str(status): {
                "description": "; ".join(_PROBLEMS[kind][1] for kind in names),
                "content": {"application/problem+json": {"schema": _PROBLEM_SCHEMA}},
            }
            for status, names in kinds.items()
        },
    }


def describe(
    schema: dict[str, Any],
    *,
    methods: Iterable[str] = ("POST", "PATCH"),
    paths: Iterable[str] | None = None,
    required: bool = False,
    header: str = "Idempotency-Key",
    ttl: Duration = 86_400,
    error_ttl: Duration = 60,
) -> dict[str, Any]:
    """Add the header and the problem answers to the operations of an OpenAPI schema, which is changed and returned.

    The options are those of the middleware (`paths` as a list). What an operation says of the header already stays,
    and so do the other contents and descriptions of its answers.
    """
    checked_name("header", header)
    _flag("required", required)
    kept_for, errors_for = seconds("ttl", ttl), seconds("error_ttl", error_ttl, zero=True)
    match = (lambda _: True) if paths is None else _matcher(paths)
    wanted = {method.lower() for method in _methods(methods)}
    for path, item in schema.get("paths", {}).items():
        for method, found in item.items():
            if method not in wanted or not match(path):
                continue
            extra = operation(header=header, required=required, ttl=kept_for, error_ttl=errors_for)
            parameters = found.setdefault("parameters", [])
            if not any(str(each.get("name", "")).lower() == header.lower() for each in parameters):
                parameters.extend(extra["parameters"])
            responses = found.setdefault("responses", {})
            for status, answer in extra["responses"].items():
                there = responses.setdefault(status, {"description": answer["description"]})
                if "$ref" not in there:
                    for kind, content in answer["content"].items():
                        there.setdefault("content", {}).setdefault(kind, content)
    return schema
