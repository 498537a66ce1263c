"""Images behind URLs: ranges, versions, redirects, certificates, proxies, and everything that goes
wrong between us and the server.  Whatever it is, no byte may be wrong."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pyerofs
from pyerofs.errors import (
    AuthenticationError,
    ChangedError,
    CorruptImage,
    ErofsError,
    SourceError,
)
from pyerofs.sources.cache.store import Claimed
from tests.handmade import noise
from tests.helpers import entries_of, every_image
from tests.manifests import Manifest, differences
from tests.remote import faults
from tests.remote.oci import basic
from tests.remote.reading import (
    SEGMENT,
    access,
    assert_all_right,
    big,
    command,
    in_threads,
    opened,
    read_pieces,
)
from tests.remote.server import Content, Fault, Pages, Request, Response, Server, Site, anything
from tests.remote.tls import Authority

MODIFIED = "Sat, 21 Nov 2026 10:00:00 GMT"


@pytest.fixture(name="server")
def serve_big() -> Any:
    """``big()`` at /image."""
    with Server(Pages({"/image": Content(big().image)})) as server:
        yield server


def url_of(server: Server) -> str:
    return f"{server.url}/image"


# --- everything that is right -----------------------------------------------------------------


@every_image
def test_golden(want: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    """From the server; and once more from the cache, with nobody there, which is worth a warning."""
    paths = (want.image, *want.devices)
    pages: dict[str, Site] = {f"/{p.name}": Content(p.read_bytes()) for p in paths}
    with Server(Pages(pages)) as server:
        image, *others = (f"{server.url}/{p.name}" for p in paths)
        devices = tuple(pyerofs.SourceSpec(d, insecure=True) for d in others)
        with opened(image, offset=want.offset, devices=devices) as found:
            assert differences(want, entries_of(found)) == []
    assert not caplog.records
    with opened(image, access(timeout=5.0), offset=want.offset, devices=devices) as found:
        assert differences(want, entries_of(found)) == []
    assert len(caplog.records) == len(paths)


class TestReading:
    def test_in_order(self, server: Server) -> None:
        with opened(url_of(server)) as image:
            assert_all_right(read_pieces(image, big().content))
            assert image.read("/small") == b"small\n"
        assert {r.status for r in server.requests} == {206}
        assert server.sent == len(big().image)  # everything once

    def test_anywhere(self, server: Server) -> None:
        content = big().content
        offsets = [i * 1_000_003 % (len(content) - 5000) for i in range(60)]
        with opened(url_of(server)) as image:
            assert_all_right(read_pieces(image, content, offsets, length=4999))
        assert server.sent <= len(big().image)

    def test_from_many_threads(self, server: Server) -> None:
        content = big().content
        with opened(url_of(server)) as image:

            def read(seed: int) -> int:
                offsets = [(seed + i * 7) * 777_777 % len(content) for i in range(30)]
                found = read_pieces(image, content, offsets, length=100_000)
                return found.wrong + len(found.errors)

            assert in_threads([partial(read, n) for n in range(8)]) == [0] * 8
        assert server.sent <= len(big().image) * 1.01

    def test_connections_are_used_again(self, server: Server) -> None:
        with opened(url_of(server)) as image:
            for offset in range(0, len(big().content), SEGMENT * 2):
                image.read("/big", offset, 100)
        assert server.connections < len(server.requests)

    def test_no_more_than_a_few_connections(self, server: Server) -> None:
        server.inject(faults.late(0.05))
        content = big().content
        with opened(url_of(server)) as image:
            reads = [lambda at=at: image.read("/big", at, 10) for at in range(0, 6 << 20, 1 << 18)]
            found = in_threads(reads)
        assert found == [content[at : at + 10] for at in range(0, 6 << 20, 1 << 18)]
        assert server.busiest <= 8

    def test_no_compression_is_asked_for(self, server: Server) -> None:
        with opened(url_of(server)) as image:
            image.read("/small")
        assert {r.headers.get("accept-encoding") for r in server.requests} == {"identity"}

    def test_small_images(self) -> None:
        """Smaller than a segment."""
        data = big().image[: 64 << 10]
        with Server(Content(data)) as server, opened(server.url) as image:
            assert image.read("/small") == b"small\n"
            assert server.sent <= len(data)

    @pytest.mark.parametrize("length", [SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 1])
    def test_ends_of_segments(self, length: int) -> None:
        """The last segment is hardly ever whole."""
        data = big().image[: len(big().image) - 6 * SEGMENT + length - SEGMENT]
        content = big().content
        with Server(Content(data)) as server, opened(server.url) as image:
            have = max(0, len(data) - SEGMENT)  # of /big
            for at in {0, max(0, have - 10), max(0, have - SEGMENT - 5)}:
                n = min(10, have - at)
                assert image.read("/big", at, n) == content[at : at + n]
            with pytest.raises(ErofsError):
                image.read("/big", max(0, have - 5), 100)

    def test_the_commands(self, server: Server) -> None:
        done = command("ls", "-l", url_of(server))
        assert (done.returncode, done.stderr) == (0, "")
        assert f" {len(big().content)} " in done.stdout
        done = command("cat", url_of(server), "small")
        assert (done.returncode, done.stdout, done.stderr) == (0, "small\n", "")

    def test_queries_are_sent_and_not_shown(self, server: Server) -> None:
        with opened(url_of(server) + "?X-Signature=topsecret&n=1") as image:
            assert image.read("/small") == b"small\n"
            assert server.requests[0].query == {"X-Signature": ["topsecret"], "n": ["1"]}
            server.inject(faults.refused(404))
            with pytest.raises(SourceError) as caught:
                image.read("/big")
        assert "topsecret" not in str(caught.value)
        assert server.authority in str(caught.value)

    @pytest.mark.parametrize(
        ("etag", "modified"),
        [(None, None), ("W/\"weak\"", None), (None, MODIFIED), ('"both"', MODIFIED)],
    )  # fmt: skip
    def test_validators(self, etag: str | None, modified: str | None) -> None:
        with Server(Content(big().image, etag, modified)) as server, opened(server.url) as image:
            assert_all_right(read_pieces(image, big().content))


class TestServersWithoutRanges:
    @pytest.mark.parametrize("length", [True, False], ids=["length", "no length"])
    @pytest.mark.parametrize("cache", [True, False], ids=["cache", "memory"])
    def test_everything_is_fetched_once(self, length: bool, cache: bool) -> None:
        with Server(Content(big().image, ranges=False)) as server:
            if not length:
                server.inject(faults.without_length, when=anything)
            with opened(server.url, access(cache=cache)) as image:
                assert_all_right(read_pieces(image, big().content))
                assert image.read("/small") == b"small\n"
            assert server.sent <= 2.2 * len(big().image)

    def test_resuming_is_beginning_again(self) -> None:
        with Server(Content(big().image, ranges=False)) as server:
            server.inject(faults.short(3 << 20), when=anything, skip=1, times=1)
            with opened(server.url) as image:
                assert_all_right(read_pieces(image, big().content))

    def test_two_downloads_at_once(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two ranges are under way when the server forgets what ranges are: both answers bring
        everything, and segments come while those of the other are still being written."""
        put = Claimed.put

        def slowly(*words: Any) -> None:
            time.sleep(0.02)
            put(*words)

        monkeypatch.setattr(Claimed, "put", slowly)
        content = big().content
        with opened(url_of(server)) as image:
            both = threading.Barrier(2)

            def at_once(request: Request, site: Site) -> Response:
                both.wait(timeout=20)
                return faults.ignoring_range(request, site)

            server.inject(at_once, times=2)
            found = in_threads([lambda: image.read("/big", 0, 10),
                                lambda: image.read("/big", 4 << 20, 10)])  # fmt: skip
            assert found == [content[:10], content[4 << 20 :][:10]]
            assert_all_right(read_pieces(image, content))

    def test_changed_meanwhile(self) -> None:
        content = Content(big().image, ranges=False)
        with Server(content) as server:
            server.inject(faults.short(3 << 20), when=anything, times=1)
            with opened(server.url) as image:
                content.data, content.etag = big(seed=2).image, '"second"'
                found = read_pieces(image, big().content)
            assert found.wrong == 0


# --- versions ---------------------------------------------------------------------------------


class TestChanges:
    """The image changes on the server under us: an error, and never bytes of both."""

    @pytest.mark.parametrize("honest", [True, False], ids=["If-Range", "ignores If-Range"])
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ({"etag": '"a"'}, {"etag": '"b"'}),
            ({"etag": 'W/"a"'}, {"etag": 'W/"b"'}),
            ({"etag": None, "modified": MODIFIED}, {"modified": MODIFIED.replace("10:", "11:")}),
            ({"etag": None}, {"data": big(7).image}),  # only the size tells
        ],
        ids=["etag", "weak etag", "date", "size"],
    )
    def test_is_an_error(self, honest: bool, before: Any, after: Any) -> None:
        content = replace(Content(big().image), **before)
        with Server(content) as server:
            if not honest:
                server.inject(faults.ignoring_if_range)
            with opened(server.url) as image:
                assert image.read("/big", 0, 10) == big().content[:10]
                content.data = big(seed=2).image
                for name, value in after.items():
                    setattr(content, name, value)
                found = read_pieces(image, big().content, [3 << 20, 4 << 20, 5 << 20])
                assert found.wrong == 0
                assert found.failed == {ChangedError}
                assert image.read("/big", 0, 10) == big().content[:10]  # that is here already
            with opened(server.url) as image:  # and the new one does not meet the old one's cache
                truth = big(7) if len(content.data) > len(big().image) else big(seed=2)
                assert_all_right(read_pieces(image, truth.content))

    def test_without_validators_nothing_is_taken_from_before(self) -> None:
        content = Content(big().image, etag=None)
        with Server(content) as server:
            for seed in (1, 2, 3):
                content.data = big(seed=seed).image
                with opened(server.url) as image:
                    assert_all_right(read_pieces(image, big(seed=seed).content))


# --- faults -----------------------------------------------------------------------------------

RIGHT = "right"  # what the reader sees: nothing of it
FAULTS: dict[str, tuple[Fault, object]] = {
    "200 for a range": (faults.ignoring_range, RIGHT),
    "short body": (faults.short(), RIGHT),
    "short by one byte": (faults.short(1), RIGHT),
    "reset in the body": (faults.reset(), RIGHT),
    "reset before the body": (faults.reset(0), RIGHT),
    "reset instead of an answer": (faults.hanging_up, RIGHT),
    "408": (faults.refused(408), RIGHT),
    "429": (faults.refused(429, Retry_After="0"), RIGHT),
    "429 without Retry-After": (faults.refused(429), RIGHT),
    "500": (faults.refused(500), RIGHT),
    "502": (faults.refused(502), RIGHT),
    "503": (faults.refused(503), RIGHT),
    "504": (faults.refused(504), RIGHT),
    "trickle": (faults.trickle(4 << 20), RIGHT),
    "late": (faults.late(0.2), RIGHT),
    "less than asked for": (faults.shrunk, RIGHT),
    "no Content-Length": (faults.without_length, RIGHT),
    "no Content-Length, and short": (faults.without_length_and_short, RIGHT),
    "another range": (faults.shifted(), SourceError),
    "an earlier range": (faults.shifted(-SEGMENT), SourceError),
    "no Content-Range": (faults.without_content_range, SourceError),
    "another size": (faults.other_total, ChangedError),
    "403": (faults.refused(403), AuthenticationError),
    "401": (faults.refused(401), AuthenticationError),
    "404": (faults.refused(404), SourceError),
    "400": (faults.refused(400), SourceError),
    "416": (faults.refused(416), SourceError),
    "a page": (faults.in_a_page, SourceError),
    "redirected to nowhere": (faults.refused(307), SourceError),
    "redirected to itself": (faults.redirected("{path}"), SourceError),
    "redirected to a file": (faults.redirected("file:///etc/passwd"), SourceError),
}
# no faults at all if they last, or like others that are in the table
BRIEF = (
    "trickle", "late", "short by one byte", "reset before the body", "408", "429", "500", "502",
    "504",
)  # fmt: skip


class TestFaults:
    @pytest.mark.parametrize("name", FAULTS)
    def test_once(self, server: Server, name: str) -> None:
        """It happens twice; what can be put right by asking again is."""
        fault, want = FAULTS[name]
        with opened(url_of(server)) as image:
            server.inject(fault, times=2)
            found = read_pieces(image, big().content)
            assert found.wrong == 0
            if want is RIGHT:
                assert found.errors == []
            # a failed read does no harm to those after it
            server.heal()
            if want is not ChangedError:
                assert_all_right(read_pieces(image, big().content))

    @pytest.mark.parametrize("name", [n for n in FAULTS if n not in BRIEF])
    def test_for_good(self, server: Server, name: str) -> None:
        """It never ends: errors, in time; what is here stays readable; and once it has ended after
        all, everything is."""
        fault, want = FAULTS[name]
        endless = name not in ("200 for a range", "less than asked for", "no Content-Length")
        with opened(url_of(server), access(timeout=0.6)) as image:
            first = image.read("/big", 0, 100)
            server.inject(fault)
            found = read_pieces(image, big().content, [4 << 20])
            assert found.wrong == 0
            if endless:
                assert len(found.errors) == 1
            if endless and want is not RIGHT:
                assert all(isinstance(e, want) for e in found.errors)  # type: ignore[arg-type]
                assert all(server.authority in str(e) for e in found.errors)
                assert not any("\n" in str(e) for e in found.errors)
            assert image.read("/big", 0, 100) == first == big().content[:100]
            server.heal()
            assert_all_right(read_pieces(image, big().content))

    @pytest.mark.parametrize("fault", [faults.silent, faults.stalling()], ids=["silent", "stall"])
    def test_stalls(self, server: Server, fault: Fault) -> None:
        with opened(url_of(server), access(timeout=0.8)) as image:
            server.inject(fault)
            found = read_pieces(image, big().content, [4 << 20])
            assert (found.right, found.wrong, len(found.errors)) == (0, 0, 1)
            server.heal()
            assert_all_right(read_pieces(image, big().content))

    def test_ten_seconds_of_503(self, server: Server) -> None:
        with opened(url_of(server), access(timeout=60.0)) as image:
            server.inject(faults.refused(503), seconds=10)
            start = time.monotonic()
            assert_all_right(read_pieces(image, big().content))
            assert time.monotonic() - start >= 10
        assert len(server.requests) < 200  # it backs off

    def test_retry_after_is_obeyed(self, server: Server) -> None:
        with opened(url_of(server)) as image:
            server.inject(faults.refused(429, Retry_After="1"), times=1)
            server.forget()
            start = time.monotonic()
            assert image.read("/big", 4 << 20, 10) == big().content[4 << 20 :][:10]
            assert time.monotonic() - start >= 0.95
            asked = [r.range for r in server.requests if r.status == 429]
            assert len(asked) == 1

    def test_half_of_all_requests_fail(self, server: Server) -> None:
        wild = [faults.reset(300_000), faults.short(), faults.refused(503), faults.hanging_up]
        count = iter(range(1 << 30))

        def fault(request: Request, site: Site) -> Response:
            n = next(count)
            return wild[n // 2 % len(wild)](request, site) if n % 2 else site(request)

        with opened(url_of(server)) as image:
            server.inject(fault)
            assert_all_right(read_pieces(image, big().content))

    def test_the_server_is_gone_and_comes_back(self) -> None:
        content = Content(big().image)
        server = Server(content)
        port = server.port
        with opened(server.url, access(timeout=0.7)) as image:
            assert image.read("/big", 0, 10) == big().content[:10]
            server.stop()
            found = read_pieces(image, big().content, [4 << 20, 5 << 20])
            assert (found.wrong, len(found.errors)) == (0, 2)
            assert image.read("/big", 0, 10) == big().content[:10]
            with Server(content, port=port):
                assert_all_right(read_pieces(image, big().content))

    def test_a_dead_read_does_not_hold_up_others(self, server: Server) -> None:
        """One range is never answered; what is elsewhere is read meanwhile."""
        with opened(url_of(server), access(timeout=2.0)) as image:
            stuck = 5 << 20

            def is_stuck(request: Request) -> bool:
                assert request.range is not None
                end = request.range[1]
                return end is None or end > stuck + SEGMENT

            server.inject(faults.silent, when=is_stuck)
            ended = threading.Event()

            def read_stuck() -> None:
                with pytest.raises(SourceError):
                    image.read("/big", stuck, 10)
                ended.set()

            thread = threading.Thread(target=read_stuck)
            thread.start()
            try:
                assert image.read("/big", 1 << 20, 10) == big().content[1 << 20 :][:10]
                assert not ended.is_set()
            finally:
                thread.join(timeout=30)
            assert ended.is_set()

    def test_unasked_encoding(self, server: Server) -> None:
        def packed(request: Request, site: Site) -> Response:
            response = site(request)
            return replace(response, headers=response.headers | {"Content-Encoding": "gzip"})

        with opened(url_of(server)) as image:
            server.inject(packed, times=1)
            found = read_pieces(image, big().content, [4 << 20])
            assert found.wrong == 0

    def test_a_long_page_of_unknown_length(self, server: Server) -> None:
        """A captive portal that sends more than the image is large, and not how much."""

        def portal(request: Request, site: Site) -> Response:
            body = b"<p>please log in</p>\n" * (len(big().image) // 10)
            return Response(200, {"Content-Type": "text/html"}, body, length=False)

        with opened(url_of(server)) as image:
            server.inject(portal, times=1)
            assert read_pieces(image, big().content).wrong == 0
            server.heal()
        with opened(url_of(server)) as image:
            assert read_pieces(image, big().content).wrong == 0


class TestOpening:
    @pytest.mark.parametrize("name", [n for n in FAULTS if FAULTS[n][1] is RIGHT])
    def test_with_faults(self, server: Server, name: str) -> None:
        server.inject(FAULTS[name][0], times=1)
        with opened(url_of(server)) as image:
            assert image.read("/small") == b"small\n"
            assert image.read("/big", 5 << 20, 10) == big().content[5 << 20 :][:10]

    @pytest.mark.parametrize(
        ("status", "error"),
        [(401, AuthenticationError), (403, AuthenticationError), (404, SourceError),
         (410, SourceError), (400, SourceError), (501, SourceError)],
    )  # fmt: skip
    def test_refused(self, status: int, error: type[Exception]) -> None:
        with Server(lambda _: Response(status, body=b"no\n")) as server:
            with pytest.raises(error, match=server.authority) as caught:
                opened(server.url)
            assert len(server.requests) <= 3  # it would not help to ask again
            assert "\n" not in str(caught.value)

    def test_outage(self, server: Server) -> None:
        server.inject(faults.refused(503))
        with pytest.raises(SourceError, match="503"):
            opened(url_of(server), access(timeout=0.6))

    def test_nobody_there(self) -> None:
        with Server(Content(b"")) as server:
            pass
        with pytest.raises(SourceError, match=server.authority):
            opened(server.url, access(timeout=0.6))

    def test_silence(self, server: Server) -> None:
        server.inject(faults.silent)
        with pytest.raises(SourceError, match=server.authority):
            opened(url_of(server), access(timeout=0.6))

    def test_unknown_host(self) -> None:
        with pytest.raises(SourceError, match=r"images\.invalid"):
            opened("http://images.invalid/x", access(timeout=0.6))

    @pytest.mark.parametrize("data", [b"", b"<html>hello</html>", noise(100_000)])
    def test_not_an_image(self, data: bytes) -> None:
        with Server(Content(data)) as server, pytest.raises((CorruptImage, SourceError)):
            opened(server.url)

    @pytest.mark.parametrize("url", ["http://", "http:///x", "http://[::1", "http://h:99999/x"])
    def test_not_a_url(self, url: str) -> None:
        with pytest.raises(ErofsError):
            opened(url, access(timeout=0.6))

    def test_commands_fail_in_one_line(self, server: Server) -> None:
        done = command("ls", f"{server.url}/nothing")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("pyerofs: ")
        assert done.stderr.count("\n") == 1


# --- redirects --------------------------------------------------------------------------------


class TestRedirects:
    def test_within_a_server(self) -> None:
        pages = Pages({"/image": Content(big().image)})
        pages.pages["/old"] = lambda _: Response(302, {"Location": "/image"})
        with Server(pages) as server, opened(f"{server.url}/old") as image:
            assert_all_right(read_pieces(image, big().content))
            assert len(server.of("/old")) == 1  # resolved once

    def test_elsewhere_without_credentials(self) -> None:
        """Authorization never crosses to another origin: not even to another port."""
        want = basic("ada", "secret")

        def door(request: Request) -> Response:
            if request.headers.get("authorization") != want:
                return Response(401, {"WWW-Authenticate": 'Basic realm="door"'})
            return Response(307, {"Location": f"{store.url}/image"})

        with Server(Pages({"/image": Content(big().image)})) as store, Server(door) as server:
            with opened(server.url, access(password="secret"), username="ada") as image:
                assert_all_right(read_pieces(image, big().content))
            assert store.requests
            assert not any("authorization" in r.headers for r in store.requests)
            assert not any("cookie" in r.headers for r in store.requests)

    @pytest.mark.parametrize("status", [401, 403, 404, 410])
    def test_refreshed_when_what_they_lead_to_expires(self, status: int) -> None:
        """A signed URL goes stale in the middle."""
        valid = {"1"}

        def signing(request: Request) -> Response:
            (number,) = valid
            return Response(302, {"Location": f"{store.url}/image?signature={number}"})

        def checking(request: Request) -> Response:
            if set(request.query.get("signature", [])) != valid:
                return Response(status)
            return Content(big().image)(request)

        with Server(checking) as store, Server(signing) as server:
            with opened(server.url) as image:
                assert image.read("/big", 0, 10) == big().content[:10]
                valid = {"2"}
                assert_all_right(read_pieces(image, big().content))
            assert len(server.requests) <= 2 + 6  # those that were under way may all have to ask

    def test_round_and_round(self) -> None:
        def loop(request: Request) -> Response:
            return Response(302, {"Location": f"/{len(server.requests)}"})

        with Server(loop) as server:
            with pytest.raises(SourceError, match="redirect"):
                opened(server.url)
            assert len(server.requests) < 30

    def test_to_what_always_refuses(self) -> None:
        with Server(lambda _: Response(403)) as store:
            site = faults.redirected(store.url)
            with Server(lambda r: site(r, Pages())) as server:
                with pytest.raises(SourceError):
                    opened(server.url)
                assert len(server.requests) + len(store.requests) < 30


class TestLoggingIn:
    def test_basic(self) -> None:
        want = basic("ada", "s3cret:with:colons and ümlauts")

        def door(request: Request) -> Response:
            if request.headers.get("authorization") != want:
                return Response(401, {"WWW-Authenticate": 'Basic realm="x", charset="UTF-8"'})
            return Content(big().image)(request)

        with Server(door) as server:
            how = access(password="s3cret:with:colons and ümlauts")
            with opened(server.url, how, username="ada") as image:
                assert_all_right(read_pieces(image, big().content))
            with pytest.raises(AuthenticationError) as caught:
                opened(server.url, access(password="wrong-pass"), username="ada")
            assert "wrong-pass" not in str(caught.value)
            with pytest.raises(AuthenticationError, match="--username"):
                opened(server.url)


# --- TLS and proxies --------------------------------------------------------------------------


@pytest.fixture(name="authority", scope="module")
def make_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


class TestCertificates:
    def test_trusted(self, authority: Authority) -> None:
        with Server(Content(big().image), tls=authority.context("127.0.0.1")) as server:
            how: dict[str, Any] = {"insecure": False, "cacert": str(authority.certificate)}
            with opened(server.url, **how) as image:
                assert_all_right(read_pieces(image, big().content))

    def test_by_the_usual_variable(
        self, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        tls = authority.context("127.0.0.1")
        with (
            Server(Content(big().image), tls=tls) as server,
            opened(server.url, insecure=False) as image,
        ):
            assert image.read("/small") == b"small\n"

    def test_not_trusted(self, authority: Authority) -> None:
        with Server(Content(big().image), tls=authority.context("127.0.0.1")) as server:
            with pytest.raises(SourceError, match="--cacert"):
                opened(server.url, insecure=False)
            assert server.requests == []

    def test_for_another_host(self, authority: Authority) -> None:
        with Server(Content(big().image), tls=authority.context("10.9.8.7")) as server:
            with pytest.raises(SourceError, match="certificate"):
                opened(server.url, insecure=False, cacert=str(authority.certificate))
            assert server.requests == []

    def test_insecure(self, authority: Authority) -> None:
        tls = authority.context("10.9.8.7")
        with Server(Content(big().image), tls=tls) as server, opened(server.url) as image:
            assert image.read("/small") == b"small\n"

    def test_no_such_authority(self, authority: Authority, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.touch()
        for path in (tmp_path / "absent", empty):
            with pytest.raises(SourceError, match=path.name):
                opened("https://127.0.0.1:1/x", cacert=str(path), insecure=False)

    def test_plain_http_on_the_other_side(self, server: Server) -> None:
        with pytest.raises(SourceError, match=server.authority):
            opened(url_of(server).replace("http:", "https:"), access(timeout=2.0))

    def test_no_way_down(self, authority: Authority, server: Server) -> None:
        """A redirect from https to plain http is refused."""
        site = faults.redirected(url_of(server))
        tls = authority.context("127.0.0.1")
        with (
            Server(lambda r: site(r, Pages()), tls=tls) as door,
            pytest.raises(SourceError, match="plain http"),
        ):
            opened(door.url, insecure=False, cacert=str(authority.certificate))
        assert server.requests == []


class TestProxies:
    """The usual variables."""

    def test_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with Server(Content(big().image)) as proxy:
            monkeypatch.setenv("http_proxy", proxy.url)
            with opened("http://images.invalid/image") as image:
                assert_all_right(read_pieces(image, big().content))
            assert {r.target for r in proxy.requests} == {"http://images.invalid/image"}

    def test_not_used(self, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
        with Server(Content(big().image)) as proxy:
            monkeypatch.setenv("http_proxy", proxy.url)
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            with opened(url_of(server)) as image:
                assert image.read("/small") == b"small\n"
            assert proxy.requests == []


def test_forgetting_to_close(server: Server) -> None:
    """A program that does not close its image ends all the same."""
    code = f"""
import pyerofs
from pyerofs.sources.spec import parse_spec
image = pyerofs.open(parse_spec({url_of(server)!r}, insecure=True))
print(image.read("/small"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True)
    assert done.stdout == b"b'small\\n'\n"
