"""A certificate, made on the spot, and a door that speaks TLS in front of a server that does not."""

import datetime as dt
import ipaddress
import socket
import ssl
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def certificate(folder: Path, host: str) -> tuple[Path, Path]:
    """The files of a certificate for `host`, its own authority, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "idempotent tests")])
    now = dt.datetime.now(dt.UTC)
    try:
        known: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        known = x509.DNSName(host)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([known]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / f"{host}.pem", folder / f"{host}.key"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


class TLSDoor:
    """Forwards what comes by TLS to `port` of 127.0.0.1 to a port there that speaks none, while its context lasts."""

    def __init__(self, target: int, files: tuple[Path, Path]) -> None:
        self._target = target
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*files)
        self._sockets = ExitStack()

    def __enter__(self) -> Self:
        listening = self._sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = listening.getsockname()[1]
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()
        self._sockets.callback(listening.shutdown, socket.SHUT_RDWR)  # wakes the thread, which closing does not
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._sockets.close()

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=listening.accept()[:1], daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with suppress(OSError), raw, self._context.wrap_socket(raw, server_side=True) as outer:
            with socket.create_connection(("127.0.0.1", self._target)) as inner:
                threading.Thread(target=self._copy, args=(inner, outer), daemon=True).start()
                self._copy(outer, inner)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
