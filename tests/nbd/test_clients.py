"""Other people's clients against our server: libnbd's, QEMU's, fio's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyerofs_nbd.server import listen, tls
from pyerofs_nbd.server.exports import Export

from pyerofs.sources import FileSource
from pyerofs.sources.local.threaded import ThreadedSource
from tests.manifests import IMAGES
from tests.nbd.rig import DATA, SIZE, Rig
from tests.remote.tls import Authority

GOLDEN = sorted(
    path for path in IMAGES.iterdir() if path.suffix not in (".json", ".md", ".py", ".txt")
)
MIB = 1 << 20
SYSTEM_PYTHON = "/usr/bin/python3"  # python3-libnbd is for that one only


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"no {program}")


needs_nbdinfo, needs_nbdcopy = needs("nbdinfo"), needs("nbdcopy")
needs_qemu, needs_fio = needs("qemu-img"), needs("fio")


def run(*words: str | Path, **how: Any) -> str:
    """What a command prints; it has to succeed and to say nothing on stderr."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **how,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 16 MiB: data, hole, data, hole, of 4 MiB each."""
    path = tmp_path_factory.mktemp("nbd") / "big"
    with path.open("wb") as f:
        for n in range(2):
            f.seek(n * 8 * MIB)
            f.write((DATA * 14)[n : n + 4 * MIB])
        f.truncate(16 * MIB)
    return path


@pytest.fixture(scope="module")
def served(big: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a server of ``big`` (by default, and as "big"), and of all golden images by their
    names, without the export's name: ``format`` it."""
    path = tmp_path_factory.mktemp("nbd") / "socket"
    with contextlib.ExitStack() as stack:
        sources = [FileSource(file) for file in (big, *GOLDEN)]
        for source in sources:
            stack.callback(source.close)
        exports = [
            Export(file.name, ThreadedSource(source), f"about {file.name}")
            for file, source in zip((big, *GOLDEN), sources, strict=True)
        ]
        rig = stack.enter_context(Rig(*exports))
        rig.listen(listen.unix(str(path)))
        yield f"nbd+unix:///{{}}?socket={path}"


# --- nbdinfo --------------------------------------------------------------------------------


@needs_nbdinfo
def test_nbdinfo(served: str) -> None:
    found = json.loads(run("nbdinfo", "--json", served.format("big")))
    assert found["protocol"] == "newstyle-fixed"
    assert found["structured"] is True
    (export,) = found["exports"]
    expected = {
        "export-name": "big", "description": "about big", "contexts": ["base:allocation"],
        "export-size": 16 * MIB, "is_read_only": True, "is_rotational": False, "can_cache": True,
        "can_df": True, "can_fast_zero": False, "can_flush": True, "can_fua": False,
        "can_multi_conn": True, "can_trim": False, "can_zero": False, "block_size_minimum": 1,
        "block_size_preferred": 4096, "block_size_maximum": 32 * MIB,
    }  # fmt: skip
    assert {key: export[key] for key in expected} == expected


@needs_nbdinfo
def test_nbdinfo_list(served: str) -> None:
    found = json.loads(run("nbdinfo", "--json", "--list", served.format("")))["exports"]
    assert {e["export-name"]: e["export-size"] for e in found} == {
        "big": 16 * MIB, **{path.name: path.stat().st_size for path in GOLDEN},
    }  # fmt: skip
    assert all(e["description"] == f"about {e['export-name']}" for e in found)


@needs_nbdinfo
def test_nbdinfo_map(served: str) -> None:
    found = json.loads(run("nbdinfo", "--json", "--map", served.format("")))
    quarter = 4 * MIB
    assert [(e["offset"], e["length"], e["type"]) for e in found] == [
        (0, quarter, 0), (quarter, quarter, 3), (2 * quarter, quarter, 0), (3 * quarter, quarter, 3),
    ]  # fmt: skip


@needs_nbdinfo
@pytest.mark.parametrize(
    ("word", "yes"),
    [
        ("--is=read-only", True), ("--is=rotational", False), ("--is=tls", False),
        ("--can=connect", True), ("--can=read", True), ("--can=write", False),
        ("--can=cache", True), ("--can=df", True), ("--can=flush", True), ("--can=fua", False),
        ("--can=multi-conn", True), ("--can=structured-reply", True), ("--can=trim", False),
        ("--can=zero", False), ("--can=fast-zero", False),
    ],
)  # fmt: skip
def test_nbdinfo_can(word: str, yes: bool, served: str) -> None:
    done = subprocess.run(["nbdinfo", word, served.format("")], check=False, timeout=60)
    assert done.returncode == (0 if yes else 2)


@needs_nbdinfo
def test_nbdinfo_of_what_there_is_not(served: str) -> None:
    done = subprocess.run(
        ["nbdinfo", served.format("none")], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "No such file or directory for export: none" in done.stderr


# --- copies ---------------------------------------------------------------------------------


@needs_nbdcopy
@pytest.mark.parametrize("options", [[], ["--connections=1"], ["--synchronous"]], ids=str)
def test_nbdcopy(options: list[str], served: str, big: Path, tmp_path: Path) -> None:
    run("nbdcopy", *options, served.format(""), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == big.read_bytes()


@needs_nbdcopy
def test_nbdcopy_starts_its_server(big: Path) -> None:
    """By socket activation."""
    done = subprocess.run(
        ["nbdcopy", "--", "[", sys.executable, "-m", "tests.nbd.runner", big, "]", "-"],
        stdout=subprocess.PIPE, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == big.read_bytes()


@needs_nbdinfo
def test_nbdinfo_starts_its_server(big: Path) -> None:
    words = ["[", sys.executable, "-m", "tests.nbd.runner", str(big), "]"]
    assert run("nbdinfo", "--size", "--", *words) == f"{16 * MIB}\n"


@needs_nbdcopy
def test_golden_images(served: str) -> None:
    """Each of them, bytewise."""
    for path in GOLDEN:
        done = subprocess.run(
            ["nbdcopy", "--connections=1", served.format(path.name), "-"],
            stdout=subprocess.PIPE, check=True, timeout=60,
        )  # fmt: skip
        assert done.stdout == path.read_bytes(), path.name


# --- QEMU -----------------------------------------------------------------------------------


@needs_qemu
def test_qemu_img(served: str, big: Path, tmp_path: Path) -> None:
    uri = served.format("big")
    info = json.loads(run("qemu-img", "info", "--output=json", uri))
    assert info["virtual-size"] == 16 * MIB
    mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
    assert [(m["start"] // MIB, m["length"] // MIB, m["data"]) for m in mapped] == [
        (0, 4, True), (4, 4, False), (8, 4, True), (12, 4, False),
    ]  # fmt: skip
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, big)
    copy = tmp_path / "copy"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy)
    assert copy.read_bytes() == big.read_bytes()
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "qcow2")
    assert "identical" in run("qemu-img", "compare", "-F", "raw", tmp_path / "qcow2", big)


# --- fio ------------------------------------------------------------------------------------


@needs_fio
@pytest.mark.parametrize("how", ["read", "randread"])
def test_fio(how: str, served: str, tmp_path: Path) -> None:
    help_text = run("fio", "--enghelp")
    if "nbd" not in help_text.split():
        pytest.skip("this fio knows no NBD")
    words = [f"--rw={how}", "--bs=4k-64k", "--iodepth=16", "--size=16M", "--output-format=json"]
    found = run(
        "fio", "--name=x", "--ioengine=nbd", f"--uri={served.format('')}", *words, cwd=tmp_path
    )
    (job,) = json.loads(found[found.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["read"]["io_bytes"] == 16 * MIB


# --- libnbd from Python ---------------------------------------------------------------------

ILLEGAL = """
import errno, sys, nbd
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
size = h.get_size()
def code(f, *arguments, **named):
    try:
        f(*arguments, **named)
    except nbd.Error as e:
        return errno.errorcode.get(e.errnum, e.errnum)
    return "fine"
print(
    code(h.pread, 0, 0), code(h.pread, 1, size), code(h.pread, 10, size - 9),
    code(h.pwrite, b"x" * 100000, 0), code(h.trim, 4096, 0), code(h.zero, 4096, 0),
    code(h.cache, 10, size), code(h.block_status, 10, size, lambda *_: 0),
    code(h.block_status, 0, 0, lambda *_: 0),
    code(h.pread, 33 << 20, 0), code(h.pread, 10, 0, flags=1), code(h.flush, flags=1),
)
print(code(h.pread, 10, 0), code(h.flush), code(h.cache, 10, 0), code(h.pread, 10, 0, flags=4))
cookies = [h.aio_pread(nbd.Buffer(4096), n * 4096) for n in range(64)]
while not all(h.aio_command_completed(c) for c in [cookies[-1]]):
    h.poll(-1)
h.shutdown()
"""


@pytest.fixture(scope="module")
def libnbd() -> str:
    """An interpreter that can import nbd."""
    done = subprocess.run(
        [SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False, timeout=60
    )
    if done.returncode:
        pytest.skip("no python3-libnbd")
    return SYSTEM_PYTHON


def test_illegal_requests(libnbd: str, served: str) -> None:
    refused, fine = run(libnbd, "-c", ILLEGAL, served.format("")).splitlines()
    assert refused.split() == [
        "EINVAL", "EINVAL", "EINVAL", "EPERM", "EPERM", "EPERM", "EINVAL", "EINVAL", "EINVAL",
        "EINVAL", "EINVAL", "EINVAL",
    ]  # fmt: skip
    assert fine.split() == ["fine"] * 4


# --- TLS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URI of a server that insists on TLS, and where libnbd finds the authority."""
    directory = tmp_path_factory.mktemp("tls")
    authority = Authority(directory)
    authority.context("127.0.0.1")
    shutil.copy(authority.certificate, directory / "ca-cert.pem")
    data = directory / "data"
    data.write_bytes(DATA)
    files = [str(directory / f"127.0.0.1.{end}") for end in ("crt", "key")]
    with contextlib.closing(FileSource(data)) as source:
        context = tls.server_context(*files)
        with Rig(ThreadedSource(source), tls=context, tls_required=True) as rig:
            (listener,) = listen.tcp("127.0.0.1:0")
            rig.listen(listener)
            yield listener.uri(tls=True), directory


@needs_nbdinfo
@needs_nbdcopy
def test_libnbd_with_tls(secure: tuple[str, Path], tmp_path: Path) -> None:
    uri, directory = secure
    uri += f"?tls-certificates={directory}"
    found = json.loads(run("nbdinfo", "--json", uri))
    assert found["TLS"] is True
    assert found["exports"][0]["export-size"] == SIZE
    run("nbdcopy", uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA


@needs_nbdinfo
def test_libnbd_without_tls(secure: tuple[str, Path]) -> None:
    plain = secure[0].replace("nbds:", "nbd:")
    done = subprocess.run(["nbdinfo", plain], capture_output=True, check=False, timeout=60)
    assert done.returncode == 1
    assert b"server replied with error" in done.stderr


@needs_qemu
def test_qemu_with_tls(secure: tuple[str, Path], tmp_path: Path) -> None:
    uri, directory = secure
    port = uri.rstrip("/").rpartition(":")[2]
    found = run(
        "qemu-img", "info", "--output=json", "--image-opts",
        "--object", f"tls-creds-x509,id=t,endpoint=client,dir={directory}",
        f"driver=nbd,host=127.0.0.1,port={port},tls-creds=t",
    )  # fmt: skip
    assert json.loads(found)["virtual-size"] == -(-SIZE // 512) * 512


@pytest.fixture(autouse=True)
def _own_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that clients start find the tests as a package, wherever pytest was started."""
    monkeypatch.setenv("PYTHONPATH", os.fspath(Path(__file__).parents[2]))
