"""What people call images: the grammar of references, and what mount.erofs' own tests say of them."""

from __future__ import annotations

import pytest

from pyerofs.errors import SourceError
from pyerofs.sources.oci.reference import Reference, parse_digest, parse_reference

HEX = "0123456789abcdef" * 4
SHA256 = f"sha256:{HEX}"
SHA512 = f"sha512:{HEX}{HEX}"
HUB, SERVER = "docker.io", "registry-1.docker.io"

GOOD = [
    # text, registry, server, repository, tag, digest
    ("alpine", HUB, SERVER, "library/alpine", "latest", None),
    ("alpine:3.20", HUB, SERVER, "library/alpine", "3.20", None),
    ("user/app", HUB, SERVER, "user/app", "latest", None),
    ("user/app:1", HUB, SERVER, "user/app", "1", None),
    ("library/alpine", HUB, SERVER, "library/alpine", "latest", None),
    ("docker.io/alpine", HUB, SERVER, "library/alpine", "latest", None),
    ("docker.io/user/app:1", HUB, SERVER, "user/app", "1", None),
    ("index.docker.io/user/app", HUB, SERVER, "user/app", "latest", None),
    ("registry-1.docker.io/library/alpine", HUB, SERVER, "library/alpine", "latest", None),
    ("ghcr.io/org/app", "ghcr.io", "ghcr.io", "org/app", "latest", None),
    ("quay.io/app", "quay.io", "quay.io", "app", "latest", None),  # library/ is for the Hub only
    ("ghcr.io/a/b/c/d:v1.2.3-rc_4", "ghcr.io", "ghcr.io", "a/b/c/d", "v1.2.3-rc_4", None),
    ("localhost/app", "localhost", "localhost", "app", "latest", None),
    ("localhost/org/app:1", "localhost", "localhost", "org/app", "1", None),
    ("localhost:5000/app", "localhost:5000", "localhost:5000", "app", "latest", None),
    ("localhost:5000/app:1", "localhost:5000", "localhost:5000", "app", "1", None),
    ("127.0.0.1:5000/app:1", "127.0.0.1:5000", "127.0.0.1:5000", "app", "1", None),
    ("[::1]:5000/app", "[::1]:5000", "[::1]:5000", "app", "latest", None),
    ("[2001:db8::1]/app:1", "[2001:db8::1]", "[2001:db8::1]", "app", "1", None),
    ("host:443/app", "host:443", "host:443", "app", "latest", None),
    ("my-host.example/app", "my-host.example", "my-host.example", "app", "latest", None),
    ("Host/app", "Host", "Host", "app", "latest", None),  # no repository has capitals
    ("nohost/app", HUB, SERVER, "nohost/app", "latest", None),
    (f"alpine@{SHA256}", HUB, SERVER, "library/alpine", None, SHA256),
    (f"alpine:3.20@{SHA256}", HUB, SERVER, "library/alpine", "3.20", SHA256),
    (f"ghcr.io/org/app@{SHA256}", "ghcr.io", "ghcr.io", "org/app", None, SHA256),
    (f"ghcr.io/org/app:1@{SHA512}", "ghcr.io", "ghcr.io", "org/app", "1", SHA512),
    (f"localhost:5000/app:1@{SHA256}", "localhost:5000", "localhost:5000", "app", "1", SHA256),
    ("a/b", HUB, SERVER, "a/b", "latest", None),
    ("a", HUB, SERVER, "library/a", "latest", None),
    ("a__b/c.d/e-f/g---h", HUB, SERVER, "a__b/c.d/e-f/g---h", "latest", None),
    ("app:" + "t" * 128, HUB, SERVER, "library/app", "t" * 128, None),
    ("app:_1", HUB, SERVER, "library/app", "_1", None),
    ("app:TAG", HUB, SERVER, "library/app", "TAG", None),
    (HEX[:12], HUB, SERVER, f"library/{HEX[:12]}", "latest", None),
]

BAD = [
    "", ":", "@", "/", ":tag", f"@{SHA256}", "app:", "app@", "/app", "app/", "a//b", "host.x/",
    "UPPER", "ghcr.io/Org/app", "ghcr.io/org/App:1", "app:tag:tag", "app:-tag", "app:.tag",
    "app:" + "t" * 129, "app:t/x", "app tag", "app\n", " app", "app:1 ", "a..b", "a___b", "-a", "a-",
    "_a", "a_", "a.", ".a/b", "ghcr.io:port/app", "ghcr.io:/app", "ghcr.io:123456/app", "-host.x/app",
    "host-.x/app", "app@sha256", "app@sha256:", f"app@sha256:{HEX[1:]}", f"app@sha256:{HEX}0",
    f"app@sha256:{HEX.upper()}", f"app@md5:{HEX[:32]}", f"app@{SHA256}:tag", f"app@{SHA256}@{SHA256}",
    f"app@{HEX}", "http://host/app", "https://host/app", "oci://oci://app", "a" * 256, "äpp", "app:ä",
    "[::1/app", "::1/app", "[::1]x/app", "user:password@host/app", "app?x=1", "app#x", "app%20",
]  # fmt: skip


@pytest.mark.parametrize("line", GOOD, ids=[line[0][:40] for line in GOOD])
def test_good(line: tuple[str, str, str, str, str | None, str | None]) -> None:
    text, registry, server, repository, tag, digest = line
    found = parse_reference(text)
    assert found == Reference(registry, repository, tag, digest)
    assert found.server == server
    assert found.wanted == (digest or tag)


@pytest.mark.parametrize("line", GOOD, ids=[line[0][:40] for line in GOOD])
def test_what_is_shown_means_the_same(line: tuple[str, ...]) -> None:
    found = parse_reference(line[0])
    assert parse_reference(str(found)) == found


@pytest.mark.parametrize("text", BAD, ids=[repr(text)[:40] for text in BAD])
def test_bad(text: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_reference(text)
    assert "\n" not in str(caught.value)


def test_capitals_get_a_hint() -> None:
    with pytest.raises(SourceError, match="lower case"):
        parse_reference("ghcr.io/Org/App")


def test_digests() -> None:
    assert parse_digest(SHA256) == parse_digest(HEX) == SHA256
    assert parse_digest(SHA512) == SHA512
    for text in ("", "sha256:", HEX[1:], f"md5:{HEX}", f"sha256:{HEX}\n", f"sha256:{HEX.upper()}"):
        with pytest.raises(SourceError):
            parse_digest(text)
