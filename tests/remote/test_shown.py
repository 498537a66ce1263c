"""What servers say is shown to people, never obeyed by their terminals, and ends no program: one line
on stderr, whatever is in a media type, a platform, a realm or a header."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyerofs.cli.main import main
from tests.remote.oci import (
    EROFS_ZSTD,
    OCI_MANIFEST,
    Blob,
    Manifest,
    image,
    index,
    layer,
    manifest,
    publish,
)
from tests.remote.pretend import Pretend, serve
from tests.remote.reading import big, cache_files, command
from tests.remote.server import Content, Fault, Request, Response, Server, Site, anything

TEXTS = {
    "escapes": "\x1b]0;owned\x07\x1b[2J\x1b[31m",
    "C1": "\x9b2J\x9d0;owned\x9c",
    "newline": "x\npyerofs: all is well",
    "carriage return": "x\rpyerofs: all is well",
    "separators": "x\x0b\x0c\x85\u2028\u2029y",
    "DEL": "\x7f\x08\x08\x08",
    "NUL": "x\0y",
    "override": "\u202egnp.exe\u2066",
    "lone surrogate": "\ud800",
    "surrogate of a byte": "\udc9b2J",
    "pair the wrong way round": "\udfff\ud800",
}
# as bytes that are possible in a header
HEADERS = {
    "escapes": TEXTS["escapes"],
    "C1": TEXTS["C1"],
    "C1 in UTF-8": TEXTS["C1"].encode().decode("latin-1"),
    "DEL": TEXTS["DEL"],
    "override": TEXTS["override"].encode().decode("latin-1"),
    "surrogate": "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
}


def assert_one_line(said: bytes) -> None:
    """A message that a terminal shows as it is."""
    assert b"Traceback" not in said
    text = said.decode()  # raw bytes of a C1 character are no UTF-8
    assert text.startswith("pyerofs: ")
    assert text.endswith("\n")
    assert len(text) > len("pyerofs: x\n")
    assert text[:-1].isprintable(), ascii(text)
    assert len(text) < 4000


def document(**members: object) -> Manifest:
    """A manifest, or what claims to be one."""
    found = {"schemaVersion": 2, "mediaType": OCI_MANIFEST} | members
    return Manifest(Blob(json.dumps(found).encode(), OCI_MANIFEST))


def compressed(diff_id: str) -> Manifest:
    """An image whose configuration says this of its layer."""
    return manifest(layer(b"no matter what", EROFS_ZSTD), diff_ids=[diff_id])


def elsewhere(text: str) -> Manifest:
    """Images for two platforms, which are nobody's."""
    found = [image(b"x"), image(b"y")]
    places = [{"os": text, "architecture": "vax"}, {"os": "plan9", "architecture": text}]
    return index(*(m.for_platform(p) for m, p in zip(found, places, strict=True)))


def entry(**members: object) -> dict[str, object]:
    return layer(b"x").descriptor | members


DOCUMENTS: dict[str, Callable[[str], Manifest]] = {
    "type of a layer": lambda text: manifest(layer(b"x", text)),
    "types of two EROFS layers": lambda text: manifest(
        layer(b"x", f"application/vnd.erofs.layer{text}"),
        layer(b"y", "application/vnd.erofs.layer"),
    ),
    "type of the document": lambda text: document(mediaType=text),
    "type inside another value": lambda text: document(mediaType=[{text: text}]),
    "digest of a layer": lambda text: document(layers=[entry(digest=text)]),
    "size of a layer": lambda text: document(layers=[entry(size=text)]),
    "key of the size": lambda text: document(layers=[entry(size={text: 1})]),
    "platform": elsewhere,
    "variant": lambda text: index(
        *(
            image(data).for_platform({"os": "a", "architecture": "b", "variant": text})
            for data in (b"x", b"y")
        )
    ),
    "digest in a configuration": compressed,
}


def with_header(name: str, text: str, status: int = 0) -> Fault:
    """An answer that says this in a header."""

    def fault(request: Request, site: Site) -> Response:
        response = site(request)
        headers = response.headers | {name: text}
        return Response(status or response.status, headers, response.body)

    return fault


def blobs(request: Request) -> bool:
    return "/blobs/" in request.path


def manifests(request: Request) -> bool:
    return "/manifests/" in request.path


ANSWERS: dict[str, Callable[[str], tuple[Fault, Callable[[Request], bool]]]] = {
    "Content-Encoding of a document": lambda t: (with_header("Content-Encoding", t), manifests),
    "Content-Encoding of a blob": lambda t: (with_header("Content-Encoding", t), blobs),
    "Content-Range": lambda t: (with_header("Content-Range", f"bytes {t}"), blobs),
    "Location": lambda t: (with_header("Location", f"ftp://{t}", 307), blobs),
    "Location of HTTP": lambda t: (with_header("Location", f"http://{t}/", 307), manifests),
    "realm": lambda t: (
        with_header("WWW-Authenticate", f'Bearer realm="ftp://{t}"', 401), anything,
    ),
    "realm of HTTP": lambda t: (
        with_header("WWW-Authenticate", f'Bearer realm="http://127.0.0.1:1/{t}"', 401), anything,
    ),
    "service": lambda t: (
        with_header(
            "WWW-Authenticate", f'Bearer realm="http://127.0.0.1:1/",service="{t}"', 401
        ), anything,
    ),
}  # fmt: skip


@contextmanager
def registry(what: Manifest | None = None) -> Iterator[Server]:
    """A registry with app:1."""
    pretend = Pretend()
    publish(pretend, "app", "1", what or image(big().image))
    with serve(pretend) as server:
        yield server


def words(server: Server, verb: str = "ls") -> list[str]:
    return [verb, "--oci", f"{server.authority}/app:1", "--insecure", "--timeout", "1"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("place", DOCUMENTS)
def test_documents(place: str, text: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with registry(DOCUMENTS[place](TEXTS[text])) as server:
        status = main(words(server))
    out, said = capfdbinary.readouterr()
    assert (status, out) == (1, b"")
    assert_one_line(said)


@pytest.mark.parametrize("text", HEADERS)
@pytest.mark.parametrize("place", ANSWERS)
def test_headers(place: str, text: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    fault, when = ANSWERS[place](HEADERS[text])
    with registry() as server:
        server.inject(fault, when=when)
        status = main(words(server))
    out, said = capfdbinary.readouterr()
    assert (status, out) == (1, b"")
    assert_one_line(said)


@pytest.mark.parametrize("text", ["escapes", "lone surrogate", "surrogate of a byte"])
@pytest.mark.parametrize("verb", ["ls", "info", "tree", "check"])
def test_commands(verb: str, text: str) -> None:
    """The same in a process of its own, where a traceback would go to stderr; in any locale."""
    with registry(manifest(layer(b"x", TEXTS[text]))) as server:
        for locale in ("C.UTF-8", "C"):
            done = command(*words(server, verb), env=os.environ | {"LC_ALL": locale})
            assert (done.returncode, done.stdout) == (1, "")
            assert_one_line(done.stderr.encode("utf-8", "surrogateescape"))


def test_realms_in_a_process() -> None:
    with registry() as server:
        fault, when = ANSWERS["realm"](HEADERS["escapes"])
        server.inject(fault, when=when)
        done = command(*words(server, "info"))
    assert done.returncode == 1
    assert_one_line(done.stderr.encode("utf-8", "surrogateescape"))


def test_what_is_meant_can_still_be_read(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Escaped, not left out; and what is harmless stays as it is."""
    with registry(manifest(layer(b"x", "application/\x1b[2Jérofs"))) as server:
        assert main(words(server)) == 1
    said = capfdbinary.readouterr().err.decode()
    assert "érofs" in said
    assert "x1b[2j" in said.lower() or "u001b[2j" in said.lower()


# --- the cache --------------------------------------------------------------------------------


def listed(*more: object, lines: int | None = None) -> None:
    """``cache ls`` shows nothing that a terminal would obey, and one line for each blob."""
    done = command("cache", "ls", *more)
    assert done.returncode == 0
    assert lines is None or done.stdout.count("\n") <= lines
    assert done.stderr.count("\n") <= 1
    for said in (done.stderr, done.stdout):
        for each in said.split("\n"):
            assert not each or each.isprintable(), ascii(each)
    assert "Traceback" not in done.stderr


def test_cache_after_hostile_registries() -> None:
    for what in (DOCUMENTS["type of a layer"], DOCUMENTS["platform"], compressed):
        for text in ("escapes", "lone surrogate"):
            with registry(what(TEXTS[text])) as server:
                assert main(words(server)) == 1
    with registry() as server:
        assert main(words(server)) == 0
        server.inject(with_header("ETag", '"\x1b[2J"'))
        assert main(["ls", f"{server.url}/v2/app/manifests/1", "--insecure"]) == 1
    listed()


@pytest.mark.parametrize("text", ["\\u001b[2J", "\\nfake", "\\ud800", "\\u009b31m", "\x1b[31m"])
def test_cache_with_names_that_others_wrote(text: str) -> None:
    """Whoever could write there once, or a disk that forgot something."""
    name = "image-0123456789abcdef"
    with Server(Content(big().image)) as server:
        assert main(["ls", f"{server.url}/{name}"]) == 0
    planted = (text.encode() + b"x" * len(name))[: len(name)]
    small: list[Path] = [path for path in cache_files() if path.stat().st_size < 1 << 20]
    for path in small:
        found = path.read_bytes()
        if name.encode() in found:
            path.write_bytes(found.replace(name.encode(), planted))
    listed(lines=1)
    listed("--json")
