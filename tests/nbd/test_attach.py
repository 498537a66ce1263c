"""What of attaching can be tried without the driver; the rest is in tests/vm."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from pyerofs_nbd.devices import sysfs
from pyerofs_nbd.errors import NbdError

from pyerofs.errors import SourceError
from pyerofs.format.placement import flat_layout
from pyerofs.images import flat
from pyerofs.sources import MemorySource
from pyerofs.sources.local.threaded import ThreadedSource
from pyerofs.system import mountinfo
from pyerofs.system.mountinfo import Mount
from tests.manifests import IMAGES, golden

PLAIN = IMAGES / "plain.erofs"
COMMAND = [sys.executable, "-m", "pyerofs_nbd"]

no_driver = pytest.mark.skipif(
    os.path.exists("/sys/module/nbd"), reason="this machine has an nbd driver"
)


def run(*words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=60, check=False, **how
    )


def refused(*words: str | Path, status: int = 1, **how: Any) -> str:
    """The one line that it fails with."""
    done = run(*words, **how)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("pyerofs-nbd: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


# --- the command ----------------------------------------------------------------------------


def test_help_and_version() -> None:
    import pyerofs

    assert run("--help").stdout.startswith("usage: pyerofs-nbd")
    assert run("--version").stdout == f"pyerofs-nbd {pyerofs.__version__}\n"


def test_usage_errors() -> None:
    assert "--help shows how" in refused(status=2)
    assert "exclude each other" in refused("--list", "--unmount", "x", status=2)
    refused("--nonsense\nsecond line", status=2)


@no_driver
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to get that far")
@pytest.mark.parametrize("words", [[], ["--ioctl"], ["--mount", "/"], ["--supervise"]])
def test_without_the_driver(words: list[str], tmp_path: Path) -> None:
    done = run(PLAIN, *words, env={**os.environ, "PYEROFS_NBD_DIR": str(tmp_path / "run")})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "no nbd driver" in last
    assert "--socket" in last
    assert "pyerofs-fuse" in last
    assert not (tmp_path / "run").exists() or not os.listdir(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_without_privilege() -> None:
    child = os.fork()
    if not child:  # in this process, whose files a nobody could not import
        from pyerofs_nbd.devices.driver import check_privilege

        os.setuid(65534)
        try:
            check_privilege()
        except NbdError as e:
            os._exit(0 if "--socket" in str(e) and "pyerofs-fuse" in str(e) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_source_that_is_not_there() -> None:
    if os.geteuid() == 0:
        assert "/no/such/image: No such file" in refused("/no/such/image")


@no_driver
def test_nothing_is_attached() -> None:
    assert run("--list").stdout == ""
    assert run("--list", "--json").stdout == "[]\n"
    assert "neither an nbd device nor" in refused("--reattach", "/usr")
    assert run("--reattach", "--all").returncode == (0 if os.geteuid() == 0 else 1)


def test_start_up_is_light() -> None:
    """What a list, an error or the help costs: no event loop, no codec, no network."""
    code = (
        "import sys; from pyerofs_nbd import cli; cli.main(['--version']); cli.main([]);"
        "heavy = {'trio', 'httpx', 'ssl', 'lz4', 'zstandard', 'asyncio', 'argparse', 'subprocess'};"
        "sys.exit(','.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.splitlines()[1:]) == (0, [])


# --- the server modes -----------------------------------------------------------------------


def test_a_server_says_where_it_is_and_leaves_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with subprocess.Popen(
        [*COMMAND, "--socket", path, PLAIN, "--export", f"second={PLAIN}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == f"nbd+unix:///?socket={path}\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(path))
            assert client.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
        process.terminate()
        assert process.wait(30) == 0
        assert process.communicate() == ("", "")
    assert not path.exists()


@pytest.mark.skipif(shutil.which("nbdinfo") is None, reason="no nbdinfo (package libnbd-bin)")
def test_passed_sockets_are_served_and_nothing_is_said() -> None:
    done = subprocess.run(
        ["nbdinfo", "--json", "--", "[", *COMMAND, PLAIN, "]"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    (export,) = json.loads(done.stdout)["exports"]
    assert export["export-size"] == PLAIN.stat().st_size
    assert export["is_read_only"]


def test_servers_that_can_not_start(tmp_path: Path) -> None:
    where = tmp_path / "s"
    assert "/no/such/place" in refused("--socket", "/no/such/place", PLAIN)
    assert "/no/such/image" in refused("--socket", where, "/no/such/image")
    assert "/no/key" in refused(
        "--socket", where, PLAIN, f"--tls-cert={PLAIN}", "--tls-key=/no/key"
    )
    assert not where.exists()


# --- mountinfo and names --------------------------------------------------------------------


def test_mountinfo() -> None:
    text = (
        "36 35 43:0 / /mnt/a\\040b\\134\\011 ro,nodev shared:1 master:2 - erofs /dev/nbd0 ro,x=1\n"
        "37 35 0:5 / /dev rw - devtmpfs udev rw\n"
        "38 36 43:32 /sub /\udcff ro - erofs /dev/nbd1 ro\n"
        "nonsense\n\n1 2 3 4 5 6 - x\n"
    )
    assert mountinfo.parse(text) == [
        Mount("43:0", "/mnt/a b\\\t", "erofs", "/dev/nbd0", "ro,nodev,ro,x=1"),
        Mount("0:5", "/dev", "devtmpfs", "udev", "rw,rw"),
        Mount("43:32", "/\udcff", "erofs", "/dev/nbd1", "ro,ro"),
    ]


@pytest.mark.parametrize(
    ("name", "index"),
    [("/dev/nbd0", 0), ("nbd15", 15), ("/dev/nbd0p1", None), ("nbd", None), ("/dev/sda", None),
     ("nbd١", None), ("x/dev/nbd0", None), ("nbd1\n", None)],
)  # fmt: skip
def test_names_of_devices(name: str, index: int | None) -> None:
    assert sysfs.index_of(name) == index


def test_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, files in {
        "nbd0": {"pid": "1", "backend": "/run/a b \n", "size": "8\n"},
        "nbd1": {"size": "0\n"},
        "nbd10": {"pid": "2"},
        "sda": {"pid": "3"},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    monkeypatch.setattr(sysfs, "SYSFS", str(tmp_path))
    assert sysfs.devices() == [0, 10]
    assert sysfs.backend(0) == "/run/a b "
    assert sysfs.backend(10) is None
    assert sysfs.owned_by("/run/a b ") == [0]
    assert (sysfs.size(0), sysfs.size(1), sysfs.size(7)) == (4096, 0, 0)


# --- several sources as one device ----------------------------------------------------------


def far(data: bytes) -> ThreadedSource:
    return ThreadedSource(MemorySource(data))


def in_trio(function: Callable[[], Any]) -> Any:
    return trio.run(function)


def test_zeros_between_parts() -> None:
    a, b = os.urandom(1000), os.urandom(500)
    source = flat.FlatSource([(0, 900, far(a)), (1500, 500, far(b))], 2560)
    want = a[:900] + bytes(600) + b + bytes(560)

    async def check() -> None:
        for offset in range(0, 2560, 37):
            for length in (1, 100, 700, 2560 - offset):
                length = min(length, 2560 - offset)
                assert await source.read_at(offset, length) == want[offset : offset + length]
                assert source.peek(offset, length) == want[offset : offset + length]
        with pytest.raises(SourceError):
            await source.read_at(2560, 1)
        await source.aclose()

    in_trio(check)
    assert source.peek(2560, 1) is None


def test_a_device_does_not_end_within_a_sector() -> None:
    assert flat.whole(even := far(bytes(1024))) is even
    odd = flat.whole(far(b"x" * 1025))
    assert odd.size == 1536
    assert odd.peek(1020, 516) == b"x" * 5 + bytes(511)


@pytest.mark.parametrize("name", ["tar-index", "blobdev"])
def test_devices_where_the_image_has_them(name: str) -> None:
    want = golden(name)
    data = [path.read_bytes() for path in (want.image, *want.devices)]

    async def combined() -> Any:
        return await flat.combine([far(d) for d in data])

    found = in_trio(combined)
    places = flat_layout(lambda at, n: data[0][at : at + n], len(data[0]))
    assert places is not None
    ((offset, size),) = places
    assert found.size == offset + size
    assert found.peek(0, len(data[0])) == data[0]
    length = min(size, len(data[1]))
    assert found.peek(offset, length) == data[1][:length]


def test_too_many_devices() -> None:
    want = golden("blobdev")

    async def combine() -> None:
        source = [far(path.read_bytes()) for path in (want.image, *want.devices, *want.devices)]
        await flat.combine(source)

    with pytest.raises(SourceError, match="has 1 extra devices, but 2 were given"):
        in_trio(combine)


def test_devices_of_what_is_no_image() -> None:
    async def combine() -> None:
        await flat.combine([far(bytes(8192)), far(bytes(512))])

    with pytest.raises(SourceError, match="can't be placed"):
        in_trio(combine)


def test_an_image_without_devices_has_no_layout() -> None:
    data = PLAIN.read_bytes()
    assert flat_layout(lambda at, n: data[at : at + n], len(data)) is None


# --- the recovery file's pattern ------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "environment", "want"),
    [
        (["i"], {}, ("none", None)),
        (["i", "--username=u"], {"PYEROFS_PASSWORD": "x"}, ("environment", None)),
        (["i", "--password-file={}"], {}, ("file", "{}")),
        (["i", "-o", "oci.username=u,oci.password=x"], {}, ("terminal", None)),
    ],
)
def test_where_the_password_comes_from(
    words: list[str],
    environment: dict[str, str],
    want: tuple[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pyerofs_nbd.cli import credentials
    from pyerofs_nbd.options import Attach, parse

    secret = tmp_path / "secret"
    secret.write_text("x\n")
    monkeypatch.delenv("PYEROFS_PASSWORD", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    wanted = parse([word.replace("{}", str(secret)) for word in words])
    assert isinstance(wanted, Attach)
    found = credentials(wanted.source, wanted.source.words.access())
    assert (found.source, found.path) == (want[0], want[1] and str(secret))
