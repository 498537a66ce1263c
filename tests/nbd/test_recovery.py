"""Recovery files: ours, mount.erofs', and what is none."""

from __future__ import annotations

import base64
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyerofs_nbd.devices import foreign, recovery, sysfs
from pyerofs_nbd.devices.recovery import Credentials, Fingerprint, Record
from pyerofs_nbd.errors import NbdError
from pyerofs_nbd.lifecycle import control
from pyerofs_nbd.lifecycle.messages import StatusAsked

from pyerofs.sources.spec import Access, SourceSpec, VeritySpec

RECORD = Record(
    SourceSpec(
        "oci://registry.example/image@sha256:" + "a" * 64,
        devices=(SourceSpec("/dev0"),),
        verity=VeritySpec("ab" * 32, hash_offset=4096),
        username="me",
        insecure=True,
    ),
    Fingerprint(430080, "cd" * 32),
    Access(password="hush", timeout=3.5, cache=False, cache_dir="/c"),
    Credentials("file", "/etc/secret"),
    part=1,
    flat=True,
    mountpoint="/mnt/a b\n",
)


@pytest.fixture(autouse=True)
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run" / "nbd"
    monkeypatch.setenv(recovery.OVERRIDE, str(path))
    return path


def write(name: str = "0" * 16, part: int = 0) -> tuple[str, int]:
    path = recovery.path_of(name, part)
    return path, recovery.write(path, replace(RECORD, part=part))


# --- ours -----------------------------------------------------------------------------------


def test_all_of_it_comes_back_but_the_password(where: Path) -> None:
    path, fd = write(part=1)
    os.close(fd)
    assert recovery.load(path) == replace(RECORD, access=replace(RECORD.access, password=None))
    assert "hush" not in Path(path).read_text()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(where.stat().st_mode) == 0o700
    assert os.listdir(where) == [os.path.basename(path)]


def test_it_is_locked_from_the_first_moment() -> None:
    path, fd = write()
    assert recovery.alive(path)
    assert recovery.lock(path) is None
    os.close(fd)
    assert not recovery.alive(path)
    again = recovery.lock(path)
    assert again is not None
    assert recovery.alive(path)
    os.close(again)


def test_a_failed_write_leaves_nothing(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NbdError, match="No space left"):
        write()
    assert os.listdir(where) == []


def test_a_directory_that_others_can_write_is_not_used(where: Path) -> None:
    where.mkdir(parents=True, mode=0o755)
    with pytest.raises(NbdError, match="0700"):
        write()
    where.chmod(0o700)
    os.close(write()[1])


def test_a_directory_that_is_a_link_is_not_used(where: Path, tmp_path: Path) -> None:
    where.parent.mkdir()
    where.symlink_to(tmp_path)
    with pytest.raises(NbdError, match="not a directory"):
        write()


BROKEN: list[Any] = [
    None, 3, [], "x", {}, {"pyerofs-nbd": 2}, {"pyerofs-nbd": 1},
]  # fmt: skip


def changed(**fields: Any) -> dict[str, Any]:
    return RECORD.to_json() | fields


@pytest.mark.parametrize(
    "value",
    [
        *BROKEN,
        changed(source={"what": 3}),
        changed(source=[]),
        changed(fingerprint=None),
        changed(fingerprint={"size": "1", "sha256": ""}),
        changed(fingerprint={"size": True, "sha256": ""}),
        changed(part="0"),
        changed(flat=0),
        changed(mountpoint=7),
        changed(access=None),
        changed(access={"timeout": "soon"}),
        changed(credentials={"source": "file"}),
        changed(credentials={"source": "file", "path": 3}),
    ],
)
def test_what_is_no_record(value: Any, where: Path) -> None:
    path, fd = write()
    os.close(fd)
    Path(path).write_text(json.dumps(value))
    with pytest.raises(NbdError) as caught:
        recovery.load(path)
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"{" * 50000, b"[" * 60000, b"{" + b" " * 70000]
)
def test_what_is_no_json(data: bytes, where: Path) -> None:
    path, fd = write()
    os.close(fd)
    Path(path).write_bytes(data)
    with pytest.raises(NbdError):
        recovery.load(path)


def test_unknown_fields_of_a_later_minor_change_are_no_matter() -> None:
    found = recovery.from_json(changed(extra=1))
    assert found.source == RECORD.source


def test_files_that_may_be_someone_elses_are_not_read(where: Path, tmp_path: Path) -> None:
    path, fd = write()
    os.close(fd)
    os.chmod(path, 0o620)
    with pytest.raises(NbdError, match="others could have written it"):
        recovery.read(path)
    os.chmod(path, 0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(NbdError):
        recovery.read(str(link))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(NbdError, match="regular"):
        recovery.read(str(fifo))
    for bad in ("relative", "", "/no/such/file", "/a\0b", str(where)):
        with pytest.raises(NbdError):
            recovery.read(bad)


def test_groups(where: Path) -> None:
    paths = []
    for name, parts in (("a" * 16, 12), ("b" * 16, 1)):
        for part in range(parts):
            path, fd = write(name, part)
            os.close(fd)
            paths.append(path)
    assert recovery.group(paths[5]) == paths[:12]
    assert recovery.group(paths[12]) == paths[12:]
    assert recovery.group("/var/run/other/x.json") == ["/var/run/other/x.json"]
    assert len({recovery.control_path(p) for p in paths[:12]}) == 1


def test_what_is_stale_is_collected(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale, fd = write("a" * 16)
    os.close(fd)
    attached, fd = write("b" * 16)
    os.close(fd)
    alive, held = write("c" * 16)
    for path in (stale, attached, alive):
        Path(recovery.control_path(path)).touch()
    old = where / ".x.new"
    old.touch()
    os.utime(old, (0, 0))
    young = where / ".y.new"
    young.touch()
    monkeypatch.setattr(sysfs, "SYSFS", str(where))
    monkeypatch.setattr(sysfs, "devices", lambda: [3])
    monkeypatch.setattr(sysfs, "backend", lambda index: attached)
    assert recovery.collect() == [stale]
    left = {attached, alive, str(young)} | {recovery.control_path(p) for p in (attached, alive)}
    assert {str(p) for p in where.iterdir()} == left
    os.close(held)


def test_nothing_is_collected_where_devices_can_not_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, fd = write()
    os.close(fd)
    monkeypatch.setattr(sysfs, "SYSFS", "/no/such/sysfs")
    assert recovery.collect() == []
    assert os.path.exists(path)


def test_the_control_socket(where: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    path = str(deep / "x.sock")
    with control.listen(path) as listener:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with control.dial(path) as client:
            server, _ = listener.accept()
            with server, open(os.devnull) as f:
                control.send(client, StatusAsked(), [f.fileno()])
                message, fds = control.receive(server)
                assert message == StatusAsked()
                assert len(fds) == 1
                os.close(fds[0])
        with control.listen(path):  # takes its place
            pass
    assert control.ask(path, StatusAsked()) is None
    assert control.ask(str(deep / "none.sock"), StatusAsked()) is None


# --- mount.erofs' ---------------------------------------------------------------------------

DIGEST = "sha256:" + "0123456789abcdef" * 4
SECRET = base64.b64encode(b"user:pass:word").decode()


def parse(line: str, *, unpinned: bool = False) -> Record:
    return foreign.parse(os.fsencode(line), accept_unpinned=unpinned)


@pytest.mark.parametrize("path", ["/srv/image", "/a b  c", "/trailing ", "/\udcff"])
def test_local(path: str) -> None:
    assert parse(f"LOCAL {path}\n").source == SourceSpec(path)


def test_a_blob() -> None:
    found = parse(f"OCI_NATIVE_BLOB reg.io/a/b:t linux/arm64 {DIGEST} {SECRET}\n")
    assert found.source == SourceSpec(
        "oci://reg.io/a/b:t", platform="linux/arm64", blob=DIGEST, username="user"
    )
    assert found.access.password == "pass:word"
    assert found.fingerprint is None
    assert "word" not in json.dumps(found.source.to_json())


@pytest.mark.parametrize("rest", [f"{DIGEST} \n", f"{DIGEST}\n", f"{DIGEST}"])
def test_without_credentials(rest: str) -> None:
    found = parse(f"OCI_NATIVE_BLOB img linux/amd64 {rest}")
    assert (found.source.blob, found.source.username, found.access.password) == (DIGEST, None, None)


def test_an_empty_platform() -> None:
    assert parse(f"OCI_NATIVE_BLOB img  {DIGEST} \n").source.platform is None


def test_a_user_without_a_name() -> None:
    token = base64.b64encode(b":token").decode()
    found = parse(f"OCI_NATIVE_BLOB img p {DIGEST} {token}\n")
    assert (found.source.username, found.access.password) == (None, "token")


def test_a_layer_pins_nothing() -> None:
    line = "OCI_LAYER img linux/amd64 2 \n"
    with pytest.raises(NbdError, match="--accept-unpinned"):
        parse(line)
    assert parse(line, unpinned=True).source.layer == 2


@pytest.mark.parametrize(
    "line",
    [
        f"TARINDEX_OCI_BLOB img p {DIGEST}  /index /zinfo\n",
        f"TARINDEX_OCI_BLOB img p {DIGEST} {SECRET} /index \n",
        f"S3_OBJECT bucket/key host 0 1 (nil) {SECRET}\n",
    ],
)
def test_kinds_that_are_not_known_yet(line: str) -> None:
    with pytest.raises(NbdError, match=line.split(" ")[0]) as caught:
        parse(line)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\n",
        "LOCAL",
        "LOCAL relative",
        "LOCAL /a\0b",
        "local /a",
        "OCI_LAYER",
        "OCI_LAYER img p",
        "OCI_LAYER img p -1 ",
        "OCI_LAYER img p 1x ",
        "OCI_LAYER img p ² ",
        "OCI_LAYER img p 99999999999 ",
        "OCI_LAYER  p 1 ",
        "OCI_LAYER img p 1 !!!",
        "OCI_LAYER img p 1 bm9jb2xvbg==",
        "OCI_LAYER img p 1 x y",
        "OCI_NATIVE_BLOB img p sha256:12 ",
        f"OCI_NATIVE_BLOB img p {DIGEST[7:]} ",
        f"OCI_NATIVE_BLOB img p  {DIGEST} ",
        f"OCI_NATIVE_BLOB img p {DIGEST} {SECRET} ",
    ],
)
def test_lines_that_make_no_sense(line: str) -> None:
    with pytest.raises(NbdError):
        parse(line, unpinned=True)
