"""How results become bytes: the default by the return annotation, and the others that are shipped.

Users see `Serializer`, a protocol of two methods. Inside, each decorated function has a `Codec`: a serializer that also
knows which record it works for, so that bytes cannot be moved from one record to another where that matters.
"""

import hashlib
import hmac
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from idempotent import canonical
from idempotent._failures import decode_error, encode_error, why
from idempotent._typed import TypedJSON
from idempotent.errors import SerializationError

__all__ = [
    "Codec",
    "Compressed",
    "Encrypted",
    "PickleSerializer",
    "Serializer",
    "codec_around",
    "codec_for",
    "decode_error",
    "encode_error",
    "why",
]

_NAME = 100
"""The longest name of a codec, in bytes."""
_RESERVED = ("-", "!", "error1")
"""What the flows write in place of a codec's name."""


class Serializer(Protocol):
    """How values become bytes and bytes values.

    A serializer may have a `name`, text of at most 100 bytes that changes with its format; it is stored with each
    record, and a record of another name is ResultUnavailable. Without one it is the name of its class. What its
    exceptions say is never repeated, as it may quote the value; errors name their class and where they were raised.
    """

    def dumps(self, value: Any, /) -> bytes:
        """`value` as bytes. Any exception makes the result unavailable; the function does not run again."""
        ...

    def loads(self, data: bytes, /) -> Any:
        """The value that `dumps` was given. Any exception makes the result unavailable."""
        ...


class Codec(Protocol):
    """A serializer of one function, told which record it works for."""

    @property
    def name(self) -> str:
        """What is stored with the record; changes with the format."""
        ...

    def ready(self) -> None:
        """Called before the first run. Raises SerializationError if the function's results cannot be served."""
        ...

    def keep(self, value: Any, record: str) -> tuple[bytes, Any]:
        """`value` as bytes for the record with the id `record`, and what `decode` makes of them."""
        ...

    def decode(self, data: bytes, record: str) -> Any:
        """The value, from the bytes of the record with the id `record`."""
        ...


def codec_for(function: Callable[..., Any], serializer: Any) -> Codec:
    """The codec of `function`; `serializer` None: the default.

    Raises:
        SerializationError: the return annotation cannot be served.
        TypeError, ValueError: the serializer is none.
    """
    if serializer is None:
        return TypedJSON(function)
    if isinstance(serializer, _Wrapper):
        return _Wrapped(serializer, codec_for(function, serializer.inner))
    if isinstance(serializer, PickleSerializer):
        return _Wrapped(serializer, None)
    return _Foreign(serializer)


def codec_around(serializer: Any, innermost: Codec) -> Codec:
    """`innermost` in the wrappers that `serializer` names, for what is no function's result; None: in none.

    Raises TypeError if they are around anything else.
    """
    if serializer is None:
        return innermost
    if isinstance(serializer, _Wrapper):
        return _Wrapped(serializer, codec_around(serializer.inner, innermost))
    raise TypeError(f"serializer must be Compressed(...) or Encrypted(...) around nothing, not {serializer!r}")


class _Foreign:
    """The codec of a user's own serializer."""

    def __init__(self, serializer: Serializer) -> None:
        name = getattr(serializer, "name", None) or type(serializer).__qualname__
        if not isinstance(name, str) or len(name.encode()) > _NAME:
            raise ValueError(f"the name of serializer= must be text of at most {_NAME} bytes, not {name!r}")
        if name in _RESERVED:
            raise ValueError(f"the name of serializer= must not be {name!r}, which marks records of another kind")
        self.name = name
        self._serializer = serializer

    def ready(self) -> None:
        pass

    def keep(self, value: Any, record: str) -> tuple[bytes, Any]:
        body = self._serializer.dumps(value)
        if not isinstance(body, bytes):
            raise SerializationError(f"{self.name}.dumps must return bytes, not {type(body).__name__}")
        return body, self.decode(body, record)

    def decode(self, data: bytes, record: str) -> Any:
        return self._serializer.loads(data)


class _Sealing:
    """A serializer of ours that may bind its bytes to a record; on its own it binds them to none."""

    name: str

    def dumps(self, value: Any) -> bytes:
        """`value` as bytes that belong to no record."""
        return self._seal(self._plain(value), "")

    def loads(self, data: bytes) -> Any:
        """The value that `dumps` was given. Raises SerializationError for bytes that it did not make."""
        return self._value(self._open(data, ""))

    def _plain(self, value: Any) -> bytes:
        raise NotImplementedError

    def _value(self, data: bytes) -> Any:
        raise NotImplementedError

    def _seal(self, data: bytes, record: str) -> bytes:
        raise NotImplementedError

    def _open(self, data: bytes, record: str) -> bytes:
        raise NotImplementedError


class _Wrapper(_Sealing):
    """A serializer around another one; `inner` None: around the function's default."""

    def __init__(self, inner: Serializer | None) -> None:
        if inner is not None and not (hasattr(inner, "dumps") and hasattr(inner, "loads")):
            raise TypeError(f"inner must have dumps(value) and loads(bytes), which a {type(inner).__name__} has not")
        self.inner = inner

    def _plain(self, value: Any) -> bytes:
        return canonical.dumps(value)[0] if self.inner is None else self.inner.dumps(value)

    def _value(self, data: bytes) -> Any:
        return canonical.loads(data) if self.inner is None else self.inner.loads(data)


class _Wrapped:
    """The codec of a serializer of ours, around the codec of what it wraps (None: it wraps nothing)."""

    def __init__(self, outer: _Sealing, inner: Codec | None) -> None:
        self.name = outer.name if inner is None else f"{outer.name}+{inner.name}"
        if len(self.name.encode()) > _NAME:
            raise ValueError(f"the names of nested serializers make {self.name!r}, which is over {_NAME} bytes")
        self._outer = outer
        self._inner = inner

    def ready(self) -> None:
        if self._inner is not None:
            self._inner.ready()

    def keep(self, value: Any, record: str) -> tuple[bytes, Any]:
        inner, outer = self._inner, self._outer
        if inner is None:
            body = outer._seal(outer._plain(value), record)
            return body, self.decode(body, record)
        plain, found = inner.keep(value, record)
        return outer._seal(plain, record), found

    def decode(self, data: bytes, record: str) -> Any:
        inner, outer = self._inner, self._outer
        plain = outer._open(data, record)
        return outer._value(plain) if inner is None else inner.decode(plain, record)


class PickleSerializer(_Sealing):
    """Pickle, for results that nothing else can hold, signed so that nobody else's pickle is ever loaded.

    Whoever knows the secret and can write to the store can run code in this process. The signature (HMAC-SHA256 over
    record id and pickle) is checked, in constant time, before a byte is loaded.

    Args:
        secret: at least 16 bytes, the same in every process that shares the records.

    Raises:
        TypeError, ValueError: the secret is not bytes, or too short.
    """

    name = "pickle1"

    def __init__(self, secret: bytes) -> None:
        if not isinstance(secret, bytes):
            raise TypeError(f"secret must be bytes, not {type(secret).__name__}")
        if len(secret) < 16:
            raise ValueError("secret must be at least 16 bytes; secrets.token_bytes(32) makes one")
        self._secret = secret

    def _plain(self, value: Any) -> bytes:
        import pickle

        return pickle.dumps(value, protocol=5)

    def _value(self, data: bytes) -> Any:
        import pickle

        return pickle.loads(data)  # noqa: S301  signed by us: see _open

    def _sign(self, data: bytes, record: str) -> bytes:
        text = record.encode()
        return hmac.digest(self._secret, len(text).to_bytes(8, "big") + text + data, hashlib.sha256)

    def _seal(self, data: bytes, record: str) -> bytes:
        return self._sign(data, record) + data

    def _open(self, data: bytes, record: str) -> bytes:
        signature, plain = data[:32], data[32:]
        if not hmac.compare_digest(signature, self._sign(plain, record)):
            raise SerializationError("its signature is wrong: another secret, another record, or not ours")
        return plain


class Compressed(_Wrapper):
    """Zstandard around another serializer; what does not shrink is kept as it is.

    Args:
        inner: the serializer whose bytes are compressed; None: the function's default.

    Raises:
        ImportError: the extra `zstd` is not installed.
    """

    name = "zstd1"

    def __init__(self, inner: Serializer | None = None) -> None:
        super().__init__(inner)
        try:
            import zstandard
        except ImportError as error:
            raise ImportError("Compressed needs zstandard: pip install 'idempotent-py[zstd]'") from error
        self._zstd = zstandard

    def _seal(self, data: bytes, record: str) -> bytes:
        packed = self._zstd.compress(data)
        return b"\x01" + packed if len(packed) < len(data) else b"\x00" + data

    def _open(self, data: bytes, record: str) -> bytes:
        if data[:1] == b"\x00":
            return data[1:]
        try:
            return self._zstd.decompress(data[1:])
        except self._zstd.ZstdError as error:
            raise SerializationError(f"it cannot be decompressed: {error}") from error


class Encrypted(_Wrapper):
    """AES-GCM around another serializer (NIST SP 800-38D), with the record's id as associated data.

    A ciphertext that is moved to another record does not decrypt. To rotate keys, add the new one first in `keys` and
    drop the old one when the last record made with it has expired.

    Args:
        inner: the serializer whose bytes are encrypted; None: the function's default.
        keys: keys of 16, 24 or 32 bytes by an id of 1 to 255 bytes; the first encrypts, all of them decrypt.

    Raises:
        ImportError: the extra `crypto` is not installed.
        TypeError, ValueError: there is no key, or one is not what it should be.
    """

    name = "aesgcm1"

    def __init__(self, inner: Serializer | None = None, keys: Mapping[str, bytes] | None = None) -> None:
        super().__init__(inner)
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ImportError("Encrypted needs cryptography: pip install 'idempotent-py[crypto]'") from error
        if not keys:
            raise ValueError("keys must hold at least one key, such as {'2026': AESGCM.generate_key(256)}")
        if not isinstance(keys, Mapping):
            raise TypeError(
                f"keys must be a dict such as {{'2026': AESGCM.generate_key(256)}}, not {type(keys).__name__}"
            )
        for key_id, key in keys.items():
            if not isinstance(key_id, str):
                raise TypeError(f"the id of a key must be text, not {type(key_id).__name__}")
            if not isinstance(key, bytes):
                raise TypeError(f"the key {key_id!r} must be bytes, not {type(key).__name__}")
            if not 0 < len(key_id.encode()) < 256:
                raise ValueError(f"the id of a key must be text of 1 to 255 bytes, not {len(key_id.encode())}")
            if len(key) not in (16, 24, 32):
                raise ValueError(f"the key {key_id!r} must be 16, 24 or 32 bytes, not {len(key)}")
        self._ciphers = {key_id.encode(): AESGCM(key) for key_id, key in keys.items()}
        self._first = next(iter(self._ciphers))
        self._invalid = InvalidTag

    def _seal(self, data: bytes, record: str) -> bytes:
        key_id, nonce = self._first, os.urandom(12)
        sealed = self._ciphers[key_id].encrypt(nonce, data, record.encode())
        return bytes([len(key_id)]) + key_id + nonce + sealed

    def _open(self, data: bytes, record: str) -> bytes:
        at = 1 + (data[0] if data else 0)
        key_id, nonce, sealed = data[1:at], data[at : at + 12], data[at + 12 :]
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise SerializationError(
                f"it was encrypted with the key {key_id.decode(errors='replace')!r}, not among keys="
            )
        try:
            return cipher.decrypt(nonce, sealed, record.encode())
        except (self._invalid, ValueError) as error:
            raise SerializationError("it does not decrypt: another key, another record, or not ours") from error
