"""The command line of pyerofs-nbd: what it means, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import pytest
from pyerofs_nbd.devices.mounting import MS_RDONLY, flags_and_data
from pyerofs_nbd.options import (
    Attach,
    Behaviour,
    Certificates,
    Disconnect,
    ListDevices,
    Reattach,
    Serve,
    Show,
    TakeOver,
    Unmount,
    parse,
    usage,
)  # fmt: skip

from pyerofs.sources.spec import SourceSpec, VeritySpec
from pyerofs.system.arguments import UsageError, split_words

M = TypeVar("M")


def parsed(kind: type[M], *words: str, activated: bool = False) -> M:
    """What a command line means, which is of this kind."""
    mode = parse(list(words), activated=activated)
    assert isinstance(mode, kind)
    return mode


def spec(*words: str) -> SourceSpec:
    return parsed(Attach, *words).source.spec()


# --- what it means --------------------------------------------------------------------------


def test_attach() -> None:
    wanted = parsed(Attach, "image")
    assert (wanted.mount, wanted.device, wanted.mount_words) == (None, None, ())
    assert (wanted.dead_timeout, wanted.ioctl, wanted.behaviour) == (3600, False, Behaviour())
    assert wanted.source.spec() == SourceSpec(os.path.abspath("image"))


def test_all_of_attach() -> None:
    wanted = parsed(
        Attach, "--mount=a b", "--nbd-device", "/dev/nbd3", "--dead-timeout=10m", "--supervise",
        "-fv", "--oci", "reg/img", "--layer", "2", "-o", "nodev,oci.platform=linux/arm64,x=1",
    )  # fmt: skip
    assert wanted.mount == os.path.abspath("a b")
    assert (wanted.device, wanted.dead_timeout) == (3, 600)
    assert wanted.behaviour == Behaviour(foreground=True, verbose=True, supervise=True)
    assert wanted.mount_words == ("nodev", "x=1")
    want = SourceSpec("oci://reg/img", layer=2, platform="linux/arm64")
    assert wanted.source.spec() == want


@pytest.mark.parametrize(
    "words",
    [
        ["oci://r/i", "--blob", "sha256:1"],
        ["--oci", "r/i", "--blob=sha256:1"],
        ["r/i", "-ooci.blob=sha256:1"],
        ["-o", "oci.blob=sha256:1", "r/i"],
    ],
)
def test_ways_to_name_a_blob(words: list[str]) -> None:
    assert spec(*words) == SourceSpec("oci://r/i", blob="sha256:1")


def test_source_words_under_o_are_ours() -> None:
    wanted = parsed(
        Attach, "i", "--mount", "/m", "-o", "offset=512,device=/d,ro,cache_dir=/c,no_cache"
    )
    assert wanted.source.spec() == SourceSpec(os.path.abspath("i"), 512, (SourceSpec("/d"),))
    assert wanted.mount_words == ("ro",)
    access = wanted.source.words.access()
    assert (access.cache, access.cache_dir) == (False, "/c")


def test_verity_of_a_device() -> None:
    found = spec(
        "i", "--verity-root-hash", "ab", "--verity-hash-offset=8", "--device", "/d",
        "--verity-root-hash=cd", "--verity-hash-offset=9",
    )  # fmt: skip
    assert found.verity == VeritySpec("ab", hash_offset=8)
    assert found.devices == (SourceSpec("/d", verity=VeritySpec("cd", hash_offset=9)),)


def test_a_password_on_the_command_line_is_noticed() -> None:
    assert parsed(Attach, "i", "-o", "oci.username=u,oci.password=p").source.secret_typed
    assert not parsed(Attach, "i", "-o", "oci.username=u").source.secret_typed


TARGETED: dict[str, type[Disconnect | Unmount | Reattach | TakeOver]] = {
    "disconnect": Disconnect,
    "unmount": Unmount,
    "reattach": Reattach,
    "takeover": TakeOver,
}


@pytest.mark.parametrize("mode", TARGETED)
@pytest.mark.parametrize("form", [["--{}", "/dev/nbd1"], ["--{}=/dev/nbd1"], ["/dev/nbd1", "--{}"]])
def test_targets(mode: str, form: list[str]) -> None:
    wanted = parse([word.format(mode) for word in form])
    assert isinstance(wanted, TARGETED[mode])
    assert wanted.target == "/dev/nbd1"


def test_a_mount_point_as_target() -> None:
    assert parsed(Unmount, "--unmount", "some where").target == os.path.abspath("some where")
    assert parsed(Unmount, "--unmount", "nbd12").target == "nbd12"
    assert parsed(Unmount, "--unmount", "--", "--odd").target == os.path.abspath("--odd")


@pytest.mark.parametrize("mode", ["reattach", "takeover"])
def test_new_credentials(mode: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("p\n")
    wanted = parse(
        [f"--{mode}", "nbd0", "--username=u", f"--password-file={secret}", "--insecure",
         "--cacert=c"]
    )  # fmt: skip
    assert isinstance(wanted, (Reattach, TakeOver))
    login = wanted.login
    assert (login.username, login.insecure) == ("u", True)
    assert login.cacert == os.path.abspath("c")
    assert login.words.access().password == "p"


def test_all_devices() -> None:
    wanted = parsed(Reattach, "--reattach", "--all", "--accept-unpinned")
    assert (wanted.target, wanted.accept_unpinned) == (None, True)
    login = wanted.login
    assert (login.username, login.insecure, login.cacert) == (None, False, None)


def test_list() -> None:
    assert not parsed(ListDevices, "--list").json
    assert parsed(ListDevices, "--list", "--json").json


def test_serve() -> None:
    wanted = parsed(
        Serve, "--socket", "/s", "--listen=:1", "--listen", "h:2", "/i", "--export=a=/x=y",
        "--export", "b=oci://r", "--tls-cert=c", "--tls-key=k", "--tls-ca=a",
    )  # fmt: skip
    assert (wanted.sockets, wanted.listens, wanted.stdio) == (("/s",), (":1", "h:2"), False)
    want = (("", SourceSpec("/i")), ("a", SourceSpec("/x=y")), ("b", SourceSpec("oci://r")))
    assert wanted.named == want
    certificate, key, authority = map(os.path.abspath, "cka")
    assert wanted.tls == Certificates(certificate, key, authority, required=True)


def test_tls_without_an_authority_is_offered_only() -> None:
    wanted = parsed(Serve, "--socket=/s", "i", "--tls-cert=c", "--tls-key=k")
    assert wanted.tls is not None
    assert not wanted.tls_required
    wanted = parsed(Serve, "--socket=/s", "i", "--tls-cert=c", "--tls-key=k", "--tls-required")
    assert wanted.tls_required


def test_exports_share_only_what_is_about_all() -> None:
    wanted = parsed(
        Serve, "--stdio", "/i", "--offset=9", "--device=/d", "--insecure", "--export=a=/x"
    )
    own = SourceSpec("/i", 9, (SourceSpec("/d", insecure=True),), insecure=True)
    assert wanted.named == (("", own), ("a", SourceSpec("/x", insecure=True)))


def test_sockets_of_systemd() -> None:
    assert isinstance(parse(["i"], activated=True), Serve)
    assert isinstance(parse(["i", "--export", "n=/x"], activated=True), Serve)
    assert isinstance(parse(["i", "--mount", "/m"], activated=True), Attach)
    assert isinstance(parse(["--list"], activated=True), ListDevices)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("90s", 90), ("2m", 120), ("1h", 3600), ("30d", 2592000)],
)
def test_times(text: str, seconds: int) -> None:
    assert parsed(Attach, "i", "--dead-timeout", text).dead_timeout == seconds


@pytest.mark.parametrize("word", ["-h", "--help", "-V", "--version"])
def test_help_and_version(word: str) -> None:
    assert parsed(Show, word).what == ("help" if "h" in word else "version")


def test_help_is_complete_and_tidy() -> None:
    text = usage()
    from pyerofs_nbd.options import _TAKES

    for name in _TAKES:
        assert f"--{name}" in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.endswith("\n")


# --- what it refuses ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], "needs a source"),
        (["-f"], "needs a source"),
        ([""], "empty"),
        (["--oci="], "empty"),
        (["a", "b"], "unexpected argument 'b'"),
        (["a", "--oci", "b"], "exclude each other"),
        (["a", "--nonsense"], "unknown option --nonsense"),
        (["a", "-x"], "unknown option -x"),
        (["a", "--mount"], "--mount needs a value"),
        (["a", "--mount="], "needs a directory"),
        (["a", "--mount=x", "--mount=y"], "once"),
        (["a", "--ioctl=1"], "takes no value"),
        (["a", "--insecure=1"], "takes no value"),
        (["a", "-o", "nodev"], "-o nodev: needs --mount"),
        (["a", "-o", "oci.tarindex=/x"], "oci.tarindex: is not supported"),
        (["a", "-o", "offset=x"], "offset=x"),
        (["a", "--offset", "-1"], "must not be negative"),
        (["a", "--nbd-device", "/dev/sda"], "--device names an extra device"),
        (["a", "--nbd-device", "/dev/nbd1p1"], "is not like /dev/nbd0"),
        (["a", "--dead-timeout", "soon"], "is not a time such as"),
        (["a", "--ioctl", "--supervise"], "can't be replaced"),
        (["a", "--ioctl", "--dead-timeout=1"], "can't be replaced"),
        (["a", "-f", "--log-file=x"], "--foreground logs to stderr"),
        (["a", "--export", "n=x"], "serve with --socket"),
        (["a", "--tls-required"], "serve with --socket"),
        (["a", "--json"], "belongs to --list"),
        (["a", "--all"], "belongs to --reattach"),
        (["a", "--accept-unpinned"], "belongs to --reattach"),
        (["--list", "--reattach", "nbd0"], "--list and --reattach exclude each other"),
        (["--socket", "s", "--list"], "--socket and --list exclude each other"),
        (["--unmount", "--disconnect", "nbd0"], "exclude each other"),
        (["--list", "a"], "takes no argument"),
        (["--list", "--offset=1"], "no source options"),
        (["--list", "--mount=x"], "--mount does not go with --list"),
        (["--list=1"], "takes no value"),
        (["--unmount"], "needs /dev/nbdN or its mount point"),
        (["--unmount", ""], "needs /dev/nbdN"),
        (["--unmount", "a", "b"], "unexpected argument 'b'"),
        (["--unmount", "a", "--unmount", "b"], "once"),
        (["--unmount", "a", "--offset=1"], "--offset does not go with --unmount"),
        (["--unmount", "a", "--json"], "belongs to --list"),
        (["--reattach"], "or --all"),
        (["--reattach", "--all", "nbd0"], "exclude each other"),
        (["--reattach", "--all", "--supervise"], "starts daemons"),
        (["--reattach", "nbd0", "--offset=1"], "--offset does not go with --reattach"),
        (["--reattach", "nbd0", "-o", "ro"], "-o does not go with --reattach"),
        (["--takeover", "nbd0", "--all"], "belongs to --reattach"),
        (["--socket=s"], "needs a source"),
        (["--socket=s", "a", "--mount=m"], "--mount does not go with --socket"),
        (["--socket=s", "a", "--nbd-device=nbd0"], "does not go with --socket"),
        (["--socket=s", "a", "-o", "ro"], "-o does not go with --socket"),
        (["--stdio", "--socket=s", "a"], "--stdio excludes"),
        (["--stdio", "a", "--tls-cert=c", "--tls-key=k"], "--stdio does not support TLS"),
        (["--socket=s", "a", "--tls-cert=c"], "must be given together"),
        (["--socket=s", "a", "--tls-ca=c"], "TLS needs"),
        (["--socket=s", "--export", "x"], "NAME=SOURCE"),
        (["--socket=s", "--export", "=x"], "NAME=SOURCE"),
        (["--socket=s", "--export=a=x", "--export=a=y"], "twice"),
        (["--socket=s", "--export=a=x", "--offset=1"], "applies to SOURCE only"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(words: list[str], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert hint in str(caught.value)


# --- mount options --------------------------------------------------------------------------


def test_splitting() -> None:
    assert split_words("a,b=c\\,d,,e\\\\") == ["a", "b=c,d", "", "e\\"]


@pytest.mark.parametrize(
    ("words", "flags", "data"),
    [
        ([], 0, ""),
        (["ro", "rw", "defaults", "noauto", "_netdev", "nofail", "x-a=b"], 0, ""),
        (["nodev", "nosuid", "noexec", "noatime"], 2 | 4 | 8 | 1024, ""),
        (["nodev", "dev"], 0, ""),
        (["cache_strategy=disabled", "nodev", "dax=never"], 4, "cache_strategy=disabled,dax=never"),
    ],
)
def test_what_the_kernel_gets(words: list[str], flags: int, data: str) -> None:
    assert flags_and_data(words) == (MS_RDONLY | flags, data)
