"""The command line of pyerofs-nbd: what it means, and what it refuses."""

from __future__ import annotations

import os

import pytest
from pyerofs_nbd.devices.mounting import MS_RDONLY, flags_and_data
from pyerofs_nbd.options import Options, UsageError, for_exports, parse, usage

from pyerofs.sources.spec import WORDS, SourceSpec, VeritySpec, split_words


def spec(options: Options) -> SourceSpec:
    assert options.what is not None
    return options.words.spec(options.what)


# --- what it means --------------------------------------------------------------------------


def test_attach() -> None:
    options = parse(["image"])
    assert (options.mode, options.mount, options.nbd_device) == ("attach", None, None)
    assert options.dead_timeout == 3600
    assert spec(options) == SourceSpec(os.path.abspath("image"))


def test_all_of_attach() -> None:
    options = parse(
        ["--mount=a b", "--nbd-device", "/dev/nbd3", "--dead-timeout=10m", "--supervise", "-fv",
         "--oci", "reg/img", "--layer", "2", "-o", "nodev,oci.platform=linux/arm64,x=1"]
    )  # fmt: skip
    assert options.mount == os.path.abspath("a b")
    assert (options.nbd_device, options.dead_timeout) == (3, 600)
    assert (options.supervise, options.foreground, options.verbose) == (True, True, True)
    assert options.mount_words == ["nodev", "x=1"]
    assert spec(options) == SourceSpec("oci://reg/img", layer=2, platform="linux/arm64")


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
    assert spec(parse(words)) == SourceSpec("oci://r/i", blob="sha256:1")


def test_source_words_under_o_are_ours() -> None:
    options = parse(["i", "--mount", "/m", "-o", "offset=512,device=/d,ro,cache_dir=/c,no_cache"])
    assert spec(options) == SourceSpec(os.path.abspath("i"), 512, (SourceSpec("/d"),))
    assert options.mount_words == ["ro"]
    access = options.words.access()
    assert (access.cache, access.cache_dir) == (False, "/c")


def test_verity_of_a_device() -> None:
    options = parse(
        ["i", "--verity-root-hash", "ab", "--verity-hash-offset=8", "--device", "/d",
         "--verity-root-hash=cd", "--verity-hash-offset=9"]
    )  # fmt: skip
    found = spec(options)
    assert found.verity == VeritySpec("ab", hash_offset=8)
    assert found.devices == (SourceSpec("/d", verity=VeritySpec("cd", hash_offset=9)),)


def test_a_password_on_the_command_line_is_noticed() -> None:
    assert parse(["i", "-o", "oci.username=u,oci.password=p"]).secret_typed
    assert not parse(["i", "-o", "oci.username=u"]).secret_typed


@pytest.mark.parametrize("mode", ["disconnect", "unmount", "reattach", "takeover"])
@pytest.mark.parametrize("form", [["--{}", "/dev/nbd1"], ["--{}=/dev/nbd1"], ["/dev/nbd1", "--{}"]])
def test_targets(mode: str, form: list[str]) -> None:
    options = parse([word.format(mode) for word in form])
    assert (options.mode, options.target) == (mode, "/dev/nbd1")


def test_a_mount_point_as_target() -> None:
    assert parse(["--unmount", "some where"]).target == os.path.abspath("some where")
    assert parse(["--unmount", "nbd12"]).target == "nbd12"
    assert parse(["--unmount", "--", "--odd"]).target == os.path.abspath("--odd")


def test_reattach_with_new_credentials() -> None:
    options = parse(["--reattach", "nbd0", "--username=u", "--password-file", "p", "--insecure"])
    assert [name for name, _ in options.given] == ["username", "password-file", "insecure"]
    assert options.password_file == os.path.abspath("p")
    assert parse(["--reattach", "--all", "--accept-unpinned"]).all


def test_list() -> None:
    assert parse(["--list"]).mode == "list"
    assert parse(["--list", "--json"]).json


def test_serve() -> None:
    options = parse(
        ["--socket", "/s", "--listen=:1", "--listen", "h:2", "i", "--export=a=x=y", "--export",
         "b=oci://r", "--tls-cert=c", "--tls-key=k", "--tls-ca=a", "--tls-required"]
    )  # fmt: skip
    assert options.mode == "serve"
    assert (options.sockets, options.listens) == (["/s"], [":1", "h:2"])
    assert options.exports == [("a", "x=y"), ("b", "oci://r")]
    assert options.tls_cert == os.path.abspath("c")
    assert options.tls_required


def test_exports_share_only_what_is_about_all() -> None:
    options = parse(["--stdio", "i", "--offset=9", "--device=d", "--insecure", "--export=a=/x"])
    assert for_exports(options).spec("/x") == SourceSpec("/x", insecure=True)


def test_sockets_of_systemd() -> None:
    assert parse(["i"], activated=True).mode == "serve"
    assert parse(["i", "--export", "n=/x"], activated=True).mode == "serve"
    assert parse(["i", "--mount", "/m"], activated=True).mode == "attach"
    assert parse(["--list"], activated=True).mode == "list"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("90s", 90), ("2m", 120), ("1h", 3600), ("30d", 2592000)],
)
def test_times(text: str, seconds: int) -> None:
    assert parse(["i", "--dead-timeout", text]).dead_timeout == seconds


def test_help_and_version() -> None:
    assert parse(["-h"]).mode == "help"
    assert parse(["--version", "--nonsense-is-not-looked-at-before=1"][:1]).mode == "version"


def test_help_is_complete_and_tidy() -> None:
    text = usage()
    from pyerofs_nbd.options import _MODES, _OWN

    for name in [*_OWN, *_MODES, *WORDS, "help", "version"]:
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
        (["a", "b"], "unexpected 'b'"),
        (["a", "--oci", "b"], "exclude each other"),
        (["a", "--nonsense"], "unknown option --nonsense"),
        (["a", "-x"], "unknown option -x"),
        (["a", "--mount"], "--mount needs a value"),
        (["a", "--mount="], "needs a directory"),
        (["a", "--mount=x", "--mount=y"], "once"),
        (["a", "--ioctl=1"], "takes no value"),
        (["a", "--insecure=1"], "takes no value"),
        (["a", "-o", "nodev"], "-o nodev: is for --mount"),
        (["a", "-o", "oci.tarindex=/x"], "oci.tarindex: is not supported"),
        (["a", "-o", "offset=x"], "offset=x"),
        (["a", "--offset", "-1"], "must not be negative"),
        (["a", "--nbd-device", "/dev/sda"], "--device names an extra device"),
        (["a", "--nbd-device", "/dev/nbd1p1"], "is not like /dev/nbd0"),
        (["a", "--dead-timeout", "soon"], "no time like"),
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
        (["--unmount"], "needs /dev/nbdN or where it is mounted"),
        (["--unmount", ""], "needs /dev/nbdN"),
        (["--unmount", "a", "b"], "unexpected 'b'"),
        (["--unmount", "a", "--unmount", "b"], "once"),
        (["--unmount", "a", "--offset=1"], "--offset does not go with --unmount"),
        (["--unmount", "a", "--json"], "belongs to --list"),
        (["--reattach"], "or --all"),
        (["--reattach", "--all", "nbd0"], "exclude each other"),
        (["--reattach", "--all", "--supervise"], "leaves daemons"),
        (["--reattach", "nbd0", "--offset=1"], "--offset does not go with --reattach"),
        (["--reattach", "nbd0", "-o", "ro"], "-o does not go with --reattach"),
        (["--takeover", "nbd0", "--all"], "belongs to --reattach"),
        (["--socket=s"], "needs a source"),
        (["--socket=s", "a", "--mount=m"], "--mount does not go with --socket"),
        (["--socket=s", "a", "--nbd-device=nbd0"], "does not go with --socket"),
        (["--socket=s", "a", "-o", "ro"], "-o does not go with --socket"),
        (["--stdio", "--socket=s", "a"], "--stdio excludes"),
        (["--stdio", "a", "--tls-cert=c", "--tls-key=k"], "--stdio is without TLS"),
        (["--socket=s", "a", "--tls-cert=c"], "belong together"),
        (["--socket=s", "a", "--tls-ca=c"], "TLS needs"),
        (["--socket=s", "--export", "x"], "NAME=SOURCE"),
        (["--socket=s", "--export", "=x"], "NAME=SOURCE"),
        (["--socket=s", "--export=a=x", "--export=a=y"], "twice"),
        (["--socket=s", "--export=a=x", "--offset=1"], "is about SOURCE"),
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
