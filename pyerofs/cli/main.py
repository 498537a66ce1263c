"""The command line parser, and the only place where errors become messages and exit statuses."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from pyerofs import __version__
from pyerofs.cli.messages import complain
from pyerofs.errors import CorruptImage, ErofsError, UnsupportedFeature
from pyerofs.sources.spec import DEFAULT_CACHE_LIMIT, OCI, WORDS, SourceWords
from pyerofs.system.arguments import UsageError
from pyerofs.system.streams import open_standard_streams
from pyerofs.units import parse_size

if TYPE_CHECKING:
    _Verbs = argparse._SubParsersAction[Any]

EPILOG = """\
exit status: 0 done; 1 failed, or problems found (check), or incomplete (extract); 2 wrong usage.
Data goes to stdout, messages to stderr.
"""


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of the whole command."""
    parser = _Parser(
        prog="pyerofs",
        description="Inspect EROFS images and extract files from them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"pyerofs {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", dest="verb", required=True)
    _add_image_verbs(verbs)
    _add_other_verbs(verbs)
    return parser


def _image_options() -> _Parser:
    """What all verbs share that take an image."""
    image = _Parser(add_help=False)
    image.add_argument(
        "image", metavar="IMAGE",
        help="a file, a block device, a URL, oci://REFERENCE or oci-layout:DIR[:TAG]",
    )  # fmt: skip
    image.add_argument(
        "--cache-size", type=_size, default=64 << 20, metavar="SIZE",
        help="memory for metadata and decoded data (default 64M)",
    )  # fmt: skip
    where = image.add_argument_group("where the image is")
    where.add_argument("--oci", metavar="REFERENCE", help="the same as oci://REFERENCE")
    for name, word in WORDS.items():
        if name.startswith("prefetch"):
            continue  # of use to mounts and exports only
        where.add_argument(
            f"--{name}", action=_SourceWord, dest="source", metavar=word.metavar,
            nargs=None if word.metavar else 0, help=word.help,
        )  # fmt: skip
    return image


def _add_image_verbs(verbs: _Verbs) -> None:
    image = _image_options()
    json = _Parser(add_help=False)
    json.add_argument("--json", action="store_true", help="print JSON")

    def verb(name: str, text: str, *parents: _Parser) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = verbs.add_parser(
            name, help=text, description=text, parents=[image, *parents], allow_abbrev=False
        )
        return added

    verb("info", "Show the superblock, features, devices and compression.", json)

    p = verb("ls", "List directories.", json)
    p.add_argument("paths", metavar="PATH", nargs="*", default=["/"])
    p.add_argument("-l", "--long", action="store_true", help="show modes, owners, sizes and times")
    p.add_argument("-R", "--recursive", action="store_true", help="list all directories below, too")

    p = verb("tree", "Draw a directory and everything below it.")
    p.add_argument("path", metavar="PATH", nargs="?", default="/")
    p.add_argument(
        "-L", "--level", type=_number, default=None, help="levels to draw (default: all)"
    )

    p = verb("stat", "Show all metadata of files: attributes, xattrs, extents.", json)
    p.add_argument("paths", metavar="PATH", nargs="+")
    p.add_argument("-L", "--follow", action="store_true", help="follow a link at the end of a path")
    p.add_argument("-x", "--extents", action="store_true", help="show the extent map")

    p = verb("cat", "Write files to stdout.")
    p.add_argument("paths", metavar="PATH", nargs="+")

    p = verb("extract", "Extract files with all their metadata.")
    p.add_argument("paths", metavar="PATH", nargs="*", default=[])
    p.add_argument(
        "-C", "--directory", default=".", metavar="DIR", help="extract into DIR (default: .)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    p.add_argument("--no-same-owner", action="store_true", help="don't restore owners")
    p.add_argument("--no-xattrs", action="store_true", help="don't restore xattrs")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    p = verb("tar", "Write the tree as a PAX tar stream, with xattrs, links and nanosecond times.")
    p.add_argument("path", metavar="PATH", nargs="?", default="/")
    p.add_argument("-o", "--output", metavar="FILE", help="write to FILE instead of stdout")
    p.add_argument("--no-xattrs", action="store_true", help="leave out xattrs")

    p = verb("check", "Read and verify everything; report every problem.", json)
    p.add_argument(
        "--metadata", action="store_true",
        help="read no file data: verify inodes, directories, xattrs, and where data should be",
    )  # fmt: skip
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    verb("dump", "Show what every byte of the image is used for.", json)


def _add_other_verbs(verbs: _Verbs) -> None:
    p = verbs.add_parser("cache", help="Manage the cache of data from servers and registries.")
    p.add_argument("action", choices=["ls", "rm", "prune", "verify"])
    p.add_argument("blobs", metavar="BLOB", nargs="*", help="a key (see ls), or its beginning")
    p.add_argument("--all", action="store_true", help="rm: all blobs that are not in use")
    p.add_argument("--cache-dir", metavar="DIR", help="the cache (default $XDG_CACHE_HOME/pyerofs)")
    p.add_argument(
        "--cache-limit", type=_size, metavar="SIZE", default=DEFAULT_CACHE_LIMIT,
        help="prune: remove blobs down to this size (default 10G)",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="ls: print JSON")

    p = verbs.add_parser(
        "mounts", help="Show what live mounts have fetched and cached; restart them."
    )
    p.add_argument("mountpoint", nargs="*", help="only these (default: all of this user)")
    p.add_argument(
        "--restart", action="store_true",
        help="have them go on with the program as it is installed now; no reader notices",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="print JSON")

    p = verbs.add_parser("completion", help="Print a completion script for a shell.")
    p.add_argument("shell", choices=["bash", "zsh", "fish"])


def _parse(words: list[str]) -> argparse.Namespace:
    """Parse the command line; options and paths of a verb may come in any order."""
    parser = build_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    words = _verb_first(parser, words)
    if not words or words[0].startswith("-"):
        return parser.parse_args(words)
    if words[0] not in verbs:
        parser.error(f"unknown command {words[0]!r}")
    verb, rest = words[0], _oci_first(words[1:])
    args: argparse.Namespace = verbs[verb].parse_intermixed_args(rest)
    args.verb = verb
    return args


def _verb_first(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """``--json ls IMAGE`` -> ``ls --json IMAGE``: common options may precede the verb."""
    valued = {f"--{name}": bool(word.metavar) for name, word in WORDS.items()}
    valued |= {"--json": False, "--cache-size": True, "--oci": True}
    at = 0
    while at < len(words) and words[at].startswith("-"):
        name, equals, _ = words[at].partition("=")
        if name in ("-h", "--help", "-V", "--version"):
            return words
        if name not in valued:
            parser.error(f"unknown option {name} (before the command go those that all have)")
        at += 2 if valued[name] and not equals else 1
    if at and at >= len(words):
        parser.error(f"{words[-1]}: a command is missing")
    return [*words[at : at + 1], *words[:at], *words[at + 1 :]]


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line briefly, without argparse's full usage text."""

    def error(self, message: str) -> NoReturn:
        print(f"usage: {self.prog} ... ({self.prog} --help shows how)", file=sys.stderr)
        complain(message)
        raise SystemExit(2)


def _oci_first(words: list[str]) -> list[str]:
    """``ls --oci REF PATH`` -> ``ls oci://REF PATH``."""
    for i, word in enumerate(words):
        if word == "--":
            break
        if word == "--oci" and i + 1 < len(words):
            return [OCI + words[i + 1], *words[:i], *words[i + 2 :]]
        if word.startswith("--oci="):
            return [OCI + word.removeprefix("--oci="), *words[:i], *words[i + 1 :]]
    return words


class _SourceWord(argparse.Action):
    """Passes each option to the SourceWords in ``namespace.source``, in order."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if namespace.source is None:
            namespace.source = SourceWords()
        try:
            namespace.source.set((option_string or "").removeprefix("--"), values or "")
        except ValueError as e:
            raise argparse.ArgumentError(self, str(e)) from None


def _number(text: str) -> int:
    value = int(text, 0)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def run() -> None:
    """The command's entry point."""
    open_standard_streams()
    sys.exit(main())


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(sys.argv[1:] if words is None else list(words))
    if sys.stdout is None:
        complain("there is no standard output")
        return 1
    for stream in (sys.stdout, sys.stderr):  # names that are not UTF-8 are written unchanged
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    module = importlib.import_module(f"pyerofs.cli.{_MODULES.get(args.verb, args.verb)}")
    try:
        status: int = getattr(module, args.verb)(args)
        sys.stdout.flush()
    except UsageError as e:
        complain(str(e))
        return 2
    except (CorruptImage, UnsupportedFeature) as e:
        complain(f"{args.image.partition('?')[0]}: {e}")
        return 1
    except ErofsError as e:
        complain(str(e))
        return 1
    except BrokenPipeError:  # the reader of stdout closed the pipe
        _drop_output()
        return 1
    except OSError as e:
        named = isinstance(e.filename, (str, bytes))  # filename may be a descriptor
        if not named:
            _drop_output()
        where = f"{os.fsdecode(e.filename)}: " if named else ""
        complain(f"{where}{e.strerror or e}")
        return 1 if e.errno != errno.EPIPE else 0
    except KeyboardInterrupt:
        return 130
    return status


def _drop_output() -> None:
    """Redirect stdout to /dev/null, so that the interpreter's final flush does not fail again."""
    with suppress(OSError):  # stdout may have no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_MODULES = {"ls": "listing", "tree": "listing", "stat": "listing", "cat": "listing"}
