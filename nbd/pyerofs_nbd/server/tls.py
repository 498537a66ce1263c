"""The server's TLS context, from certificate files."""

from __future__ import annotations

import ssl

from pyerofs_nbd.errors import NbdError


class TlsError(NbdError):
    """A certificate or key file can't be used; the message is one line."""


def server_context(certificate: str, key: str, client_ca: str | None = None) -> ssl.SSLContext:
    """TLS 1.2 or later with a certificate (PEM, its chain included) and its key, which must not be
    encrypted.  With ``client_ca`` clients must show a certificate that one of these authorities
    signed.  Raises TlsError."""
    for path in (certificate, key, client_ca):
        if path is not None:
            _check_readable(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except TlsError as e:
        raise TlsError(f"{key}: {e}") from None
    except (ssl.SSLError, OSError) as e:
        if getattr(e, "reason", "") == "KEY_VALUES_MISMATCH":
            raise TlsError(f"{key}: is not the key of {certificate}") from None
        raise TlsError(f"{certificate}, {key}: hold no certificate and key in PEM") from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError):
            raise TlsError(f"{client_ca}: holds no certificate in PEM") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb") as f:
            f.read(1)
    except OSError as e:
        raise TlsError(f"{path}: {e.strerror}") from None


def _no_password() -> str:
    raise TlsError("is encrypted; use a key without a password")
