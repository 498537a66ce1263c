"""What can go wrong between a client and a server, one function each.

A fault gets the request and the site that would have answered it well.  ``Server.inject`` says which
requests it strikes.
"""

from __future__ import annotations

from dataclasses import replace

from tests.handmade import noise
from tests.remote.server import Fault, Request, Response, Site

FOREVER = 3600.0


def ignoring_range(request: Request, site: Site) -> Response:
    """The server has never heard of ranges."""
    return site(request.without("range", "if-range"))


def ignoring_if_range(request: Request, site: Site) -> Response:
    """The server gives the range, of whatever version."""
    return site(request.without("if-range", "if-match"))


def short(missing: int = 1000) -> Fault:
    """The connection ends in peace before all that was promised has come."""

    def fault(request: Request, site: Site) -> Response:
        response = site(request)
        return replace(response, cut=max(0, len(response.body) - missing))

    return fault


def reset(after: int = 5000) -> Fault:
    """The connection is reset in the middle of the body."""

    def fault(request: Request, site: Site) -> Response:
        return replace(site(request), cut=after, reset=True)

    return fault


def hanging_up(request: Request, site: Site) -> Response:
    """A reset instead of an answer."""
    return Response(0, reset=True)


def refused(status: int, **headers: str) -> Fault:
    """An error; ``Retry_After="1"`` is a header."""
    shown = {name.replace("_", "-"): value for name, value in headers.items()}

    def fault(request: Request, site: Site) -> Response:
        return Response(status, dict(shown), b"sorry\n")

    return fault


def garbage(request: Request, site: Site) -> Response:
    """Something between rewrites what comes through."""
    response = site(request)
    return replace(response, body=noise(len(response.body), seed=666))


def bit_flip(at: int = 100) -> Fault:
    """One bit of the body is wrong."""

    def fault(request: Request, site: Site) -> Response:
        response = site(request)
        body = bytearray(response.body)
        body[at % len(body)] ^= 1
        return replace(response, body=bytes(body))

    return fault


def shifted(by: int = 512) -> Fault:
    """Another range than was asked for, and it says so."""

    def fault(request: Request, site: Site) -> Response:
        assert request.range is not None
        first, end = request.range
        last = "" if end is None else str(end - 1 + by)
        headers = request.headers | {"range": f"bytes={first + by}-{last}"}
        return site(replace(request, headers=headers))

    return fault


def shrunk(request: Request, site: Site) -> Response:
    """Only the first half of the range, properly declared."""
    assert request.range is not None
    first, end = request.range
    if end is None or end - first < 2:
        return site(request)
    headers = request.headers | {"range": f"bytes={first}-{first + (end - first) // 2 - 1}"}
    return site(replace(request, headers=headers))


def without_length(request: Request, site: Site) -> Response:
    """The end of the connection is the end of the body."""
    return replace(site(request), length=False)


def without_length_and_short(request: Request, site: Site) -> Response:
    """The same, but the end comes early."""
    response = site(request)
    return replace(response, length=False, cut=len(response.body) // 2)


def without_content_range(request: Request, site: Site) -> Response:
    """206, but of what?"""
    response = site(request)
    headers = {k: v for k, v in response.headers.items() if k != "Content-Range"}
    return replace(response, headers=headers)


def other_total(request: Request, site: Site) -> Response:
    """The right range of something that has suddenly another size."""
    response = site(request)
    shown, _, total = response.headers["Content-Range"].rpartition("/")
    return replace(
        response, headers=response.headers | {"Content-Range": f"{shown}/{int(total) + 4096}"}
    )


def trickle(rate: float) -> Fault:
    """So many bytes a second."""

    def fault(request: Request, site: Site) -> Response:
        return replace(site(request), rate=rate)

    return fault


def late(seconds: float) -> Fault:
    """Latency."""

    def fault(request: Request, site: Site) -> Response:
        return replace(site(request), delay=seconds)

    return fault


def silent(request: Request, site: Site) -> Response:
    """No answer at all."""
    return replace(site(request), delay=FOREVER)


def stalling(after: int = 5000) -> Fault:
    """The body begins well, and then nothing comes any more."""

    def fault(request: Request, site: Site) -> Response:
        response = site(request)
        body = bytes(response.body[:after])
        headers = response.headers | {"Content-Length": str(len(response.body))}
        return replace(response, headers=headers, body=body)

    return fault


def redirected(to: str, status: int = 307) -> Fault:
    """Elsewhere; ``{path}`` in ``to`` is the path that was asked for."""

    def fault(request: Request, site: Site) -> Response:
        return Response(status, {"Location": to.format(path=request.path)})

    return fault


def in_a_page(request: Request, site: Site) -> Response:
    """A captive portal: 200, and it is HTML."""
    return Response(200, {"Content-Type": "text/html"}, b"<html>please log in</html>\n")
