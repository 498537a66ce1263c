"""The rigs do what the tests believe: seen with curl, which knows HTTP better than we do."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.handmade import noise
from tests.remote import faults, oci, pretend, verity
from tests.remote.conftest import Registries
from tests.remote.registry import PASSWORD, USER, Relay
from tests.remote.server import Content, Server, anything, ranged

DATA = noise(300_000)

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")


def curl(*words: str) -> tuple[int, bytes]:
    """Exit status and what was got."""
    done = subprocess.run(
        ["curl", "--silent", "--max-time", "20", *words], capture_output=True, check=False
    )
    return done.returncode, done.stdout


def ask(
    server: Server, method: str = "GET", target: str = "/", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(server.authority, timeout=20)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, target, headers=named)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


@needs_curl
class TestServer:
    def test_ranges(self) -> None:
        with Server(Content(DATA)) as server:
            assert curl(server.url) == (0, DATA)
            for words, want in (
                ("0-0", DATA[:1]),
                ("1000-1999", DATA[1000:2000]),
                ("299990-", DATA[-10:]),
                ("-7", DATA[-7:]),
                ("299999-400000", DATA[-1:]),
            ):
                assert curl("--range", words, server.url) == (0, want)
            assert [r.status for r in server.requests] == [200] + [206] * 5
            assert server.sent == len(DATA) + 1 + 1000 + 10 + 7 + 1
            assert curl("--fail", "--range", "300000-", server.url)[0] == 22

    def test_keep_alive(self) -> None:
        with Server(Content(DATA)) as server:
            assert curl(server.url, server.url, server.url) == (0, DATA * 3)
            assert server.connections == 1

    def test_validators(self) -> None:
        with Server(Content(DATA, modified="Sat, 21 Nov 2026 10:00:00 GMT")) as server:
            part = {"Range": "bytes=0-9"}
            assert ask(server, **part, If_Range='"first"')[0] == 206
            assert ask(server, **part, If_Range='"second"')[2] == DATA
            assert ask(server, **part, If_Match='"second"')[0] == 412
            assert ask(server, If_None_Match='"first"')[0] == 304
            status, headers, body = ask(server, "HEAD")
            assert (status, headers["Content-Length"], body) == (200, "300000", b"")

    @pytest.mark.parametrize(
        ("fault", "status"),
        [(faults.short(), 18), (faults.reset(), 56), (faults.hanging_up, 56)],
        ids=["short", "reset", "hanging up"],
    )
    def test_broken_off(self, fault: Any, status: int) -> None:
        with Server(Content(DATA)) as server:
            server.inject(fault, when=anything, times=1)
            assert curl(server.url)[0] == status
            assert curl(server.url) == (0, DATA)

    def test_plans(self) -> None:
        with Server(Content(DATA)) as server:
            server.inject(faults.refused(503, Retry_After="1"), skip=1, times=2)
            found = [ask(server, Range="bytes=0-9")[0] for _ in range(5)]
            assert found == [206, 503, 503, 206, 206]
            server.inject(faults.refused(429), seconds=0.3)
            assert ask(server)[0] == 200  # no range
            assert ask(server, Range="bytes=0-9")[0] == 429
            time.sleep(0.4)
            assert ask(server, Range="bytes=0-9")[0] == 206

    def test_wrong_ranges(self) -> None:
        with Server(Content(DATA)) as server:
            server.inject(faults.shifted(), times=1)
            status, headers, body = ask(server, Range="bytes=100-199")
            assert (status, body) == (206, DATA[612:712])
            assert headers["Content-Range"] == "bytes 612-711/300000"
            server.inject(faults.ignoring_range, times=1)
            assert ask(server, Range="bytes=100-199")[2] == DATA
            server.inject(faults.shrunk, times=1)
            assert ask(server, Range="bytes=100-199")[2] == DATA[100:150]
            server.inject(faults.bit_flip(), times=1)
            assert ask(server, Range="bytes=100-199")[2] != DATA[100:200]

    def test_slowness(self) -> None:
        with Server(Content(DATA)) as server:
            server.inject(faults.trickle(1_000_000), when=anything, times=1)
            start = time.monotonic()
            assert curl(server.url) == (0, DATA)
            assert time.monotonic() - start > 0.25
        with Server(Content(DATA), rate=1_000_000) as server:
            start = time.monotonic()
            assert curl(server.url, server.url) == (0, DATA * 2)
            assert time.monotonic() - start > 0.4

    def test_stalls_end_with_the_server(self) -> None:
        server = Server(Content(DATA))
        server.inject(faults.silent, when=anything)
        with subprocess.Popen(["curl", "--silent", "-o", "/dev/null", server.url]) as process:
            while not server.requests:
                time.sleep(0.01)
            server.stop()
            assert process.wait(timeout=20) != 0


@needs_curl
class TestRegistries:
    def test_a_real_one(self, registries: Registries) -> None:
        made = oci.image(DATA)
        name = "rigs/app"
        nested = oci.index(oci.index(made.for_platform(oci.platform("linux/amd64"))))
        bare = oci.manifest(oci.layer(DATA), declared=False)
        for tag, what in (("1", made), ("nested", nested), ("bare", bare)):
            assert oci.publish(registries.push, name, tag, what) == what.digest
        blob = f"/v2/{name}/blobs/{made.blobs[1].digest}"
        with Server(Relay(registries.open.url)) as server:
            assert curl("--range", "100-199", server.url + blob) == (0, DATA[100:200])
            found = ask(server, target=f"/v2/{name}/manifests/nested", Accept=oci.OCI_INDEX)
            assert json.loads(found[2])["manifests"][0]["mediaType"] == oci.OCI_INDEX
            server.inject(faults.garbage, times=1)
            assert curl("--range", "100-199", server.url + blob)[1] != DATA[100:200]
            assert [ranged(r) for r in server.requests] == [True, False, True]

    def test_logging_in(self, registries: Registries) -> None:
        oci.publish(registries.push, "rigs/app", "1", oci.image(DATA))
        target = f"/v2/rigs/app/blobs/{oci.digest_of(DATA)}"
        url = registries.htpasswd.url + target
        assert curl("--fail", url)[0] == 22
        assert curl("--user", f"{USER}:{PASSWORD}", url) == (0, DATA)

    def test_redirecting(self, registries: Registries) -> None:
        oci.publish(registries.push, "rigs/app", "1", oci.image(DATA))
        url = f"{registries.redirecting.url}/v2/rigs/app/blobs/{oci.digest_of(DATA)}"
        registries.blob_server.forget()
        words = ("--location", "--user", f"{USER}:{PASSWORD}", "--range", "5-9", url)
        assert curl(*words) == (0, DATA[5:10])
        assert [r.status for r in registries.blob_server.requests] == [206]

    def test_tokens_expire(self, registries: Registries) -> None:
        oci.publish(registries.push, "rigs/app", "1", oci.image(DATA))
        url = f"{registries.by_token.url}/v2/rigs/app/blobs/{oci.digest_of(DATA)}"
        status, challenge = curl("--include", url)
        assert status == 0
        assert b'service="registry.test"' in challenge
        realm = f"{registries.token_server.url}/token?service=registry.test"
        realm += "&scope=repository:rigs/app:pull"

        def header() -> str:
            said = json.loads(curl("--user", f"{USER}:{PASSWORD}", realm)[1])
            return f"Authorization: Bearer {said['token']}"

        assert curl("--header", header(), url) == (0, DATA)
        registries.tokens.lifetime = 1
        short = header()
        registries.tokens.lifetime = 300
        time.sleep(2.2)
        assert curl("--fail", "--header", short, url)[0] == 22

    def test_a_pretended_one(self) -> None:
        registry = pretend.Pretend("Bearer", denied=403)
        registry.put_blob("app", oci.layer(DATA))
        with pretend.serve(registry) as server, Server(pretend.SignedStore(registry)) as store:
            registry.elsewhere = store.url
            url = f"{server.url}/v2/app/blobs/{oci.digest_of(DATA)}"
            assert b"scope=" in curl("--include", url)[1]
            header = f"Authorization: Bearer {json.loads(curl(registry.realm)[1])['token']}"
            assert curl("--location", "--header", header, url) == (0, DATA)
            registry.revoke()
            assert ask(server, target="/v2/app/blobs/x", Authorization=header[15:])[0] == 403
            assert ask(store, target=store.requests[0].target)[0] == 403


class TestLayouts:
    def test_layout(self, tmp_path: Path) -> None:
        layout = oci.Layout(tmp_path / "layout")
        made = oci.image(DATA)
        oci.publish(layout, "", "1", made)
        entry = json.loads((tmp_path / "layout/index.json").read_text())["manifests"][0]
        assert entry["digest"] == made.digest
        blob = tmp_path / "layout/blobs" / oci.digest_of(DATA).replace(":", "/")
        assert blob.read_bytes() == DATA


@pytest.mark.skipif(not verity.available(), reason="no veritysetup")
@pytest.mark.parametrize("appended", [True, False], ids=["appended", "apart"])
@pytest.mark.parametrize("superblock", [True, False], ids=["superblock", "bare"])
def test_veritysetup_agrees_with_itself(tmp_path: Path, appended: bool, superblock: bool) -> None:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    tree = verity.make(path, appended=appended, superblock=superblock, salt="")
    words = [f"--hash-offset={tree.hash_offset}", "--salt=-", f"--data-blocks={tree.data_blocks}"]
    words += [] if superblock else ["--no-superblock"]
    program = verity.veritysetup()
    assert program is not None
    files = [str(tree.data), str(tree.hashes)]
    command = [program, "verify", *words, *files, tree.root_hash]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    verity.spoil(path, 123_456)
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert path.read_bytes()[:123_456] == DATA[:123_456]
