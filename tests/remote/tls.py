"""A certificate authority for tests, made with the openssl command."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


class Authority:
    """Signs certificates for servers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.certificate = directory / "authority.crt"
        self._key = directory / "authority.key"
        _openssl(
            "req", "-x509", *_new(self._key), "-out", self.certificate, "-days", "30",
            "-subj", "/CN=Tests of pyerofs", "-addext", "basicConstraints=critical,CA:TRUE",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip

    def context(self, address: str) -> ssl.SSLContext:
        """What a server needs to be taken for an address."""
        key, certificate = (self._directory / f"{address}.{end}" for end in ("key", "crt"))
        if not certificate.exists():
            request, extensions = (self._directory / f"{address}.{e}" for e in ("csr", "ext"))
            _openssl("req", *_new(key), "-out", request, "-subj", f"/CN={address}")
            extensions.write_text(
                f"subjectAltName=IP:{address}\nauthorityKeyIdentifier=keyid\n"
                "keyUsage=digitalSignature\nextendedKeyUsage=serverAuth\n"
            )
            _openssl(
                "x509", "-req", "-in", request, "-out", certificate, "-days", "30",
                "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial",
                "-extfile", extensions,
            )  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context


def _new(key: Path) -> list[str | Path]:
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    return [*curve, "-nodes", "-keyout", key]


def _openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)
