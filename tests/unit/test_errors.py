"""The exception tree: what callers may rely on."""

from __future__ import annotations

import copy
import errno
import inspect
import os
import pickle
from collections.abc import Callable

import pytest

import pyerofs
from pyerofs import errors
from pyerofs.errors import CorruptImage, ErofsError, _PathError

CLASSES = [
    e
    for e in vars(errors).values()
    if inspect.isclass(e) and issubclass(e, ErofsError) and e is not _PathError
]
PATH_ERRORS = [e for e in CLASSES if issubclass(e, _PathError)]


def make(error: type[ErofsError]) -> ErofsError:
    return error("what/where")


@pytest.mark.parametrize("error", CLASSES)
def test_all_are_public(error: type[ErofsError]) -> None:
    assert getattr(pyerofs, error.__name__) is error
    assert error.__name__ in pyerofs.__all__
    assert error.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("error", CLASSES)
def test_all_say_which_errno_stands_for_them(error: type[ErofsError]) -> None:
    assert error.errno in errno.errorcode
    assert make(error).errno == error.errno
    with pytest.raises(ErofsError) as found:
        raise make(error)
    assert found.value.errno == error.errno


@pytest.mark.parametrize(
    ("error", "builtin", "code"),
    [
        (pyerofs.NotFound, FileNotFoundError, errno.ENOENT),
        (pyerofs.NotADirectory, NotADirectoryError, errno.ENOTDIR),
        (pyerofs.IsADirectory, IsADirectoryError, errno.EISDIR),
        (pyerofs.NotASymlink, OSError, errno.EINVAL),
        (pyerofs.NotAFile, OSError, errno.EINVAL),
        (pyerofs.TooManySymlinks, OSError, errno.ELOOP),
        (pyerofs.NoSuchXattr, OSError, errno.ENODATA),
    ],
)
def test_those_about_a_path_are_the_builtins_too(
    error: type[ErofsError], builtin: type[OSError], code: int
) -> None:
    found = make(error)
    assert isinstance(found, builtin)
    assert found.errno == code
    assert found.args[0] == code
    assert os.strerror(code)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (pyerofs.CorruptImage, errno.EUCLEAN),
        (pyerofs.UnsupportedFeature, errno.EOPNOTSUPP),
        (pyerofs.SourceError, errno.EIO),
        (pyerofs.TruncatedRead, errno.EIO),
    ],
)
def test_the_others_are_not(error: type[ErofsError], code: int) -> None:
    assert not issubclass(error, OSError)
    assert error.errno == code


def test_a_truncated_read_is_an_error_of_the_source() -> None:
    assert issubclass(pyerofs.TruncatedRead, pyerofs.SourceError)


@pytest.mark.parametrize("error", PATH_ERRORS)
@pytest.mark.parametrize("path", ["a/b", b"a/b", "f\udcff", b"f\xff", "new\nline"])
def test_they_know_the_path_and_show_it_in_one_line(
    error: Callable[[str | bytes], ErofsError], path: str | bytes
) -> None:
    found = error(path)
    assert found.path == path  # type: ignore[attr-defined]
    assert len(str(found).splitlines()) == 1
    str(found).encode()  # printable on any terminal


@pytest.mark.parametrize("error", CLASSES)
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_are_the_same(error: type[ErofsError], way: object) -> None:
    """Process pools pickle exceptions."""
    found = make(error)
    same = way(found)  # type: ignore[operator]
    assert type(same) is error
    assert str(same) == str(found)
    assert same.args == found.args
    assert vars(same) == vars(found)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ({}, "corrupt image: bad"),
        ({"nid": 5}, "corrupt image: bad (nid 5)"),
        ({"offset": 4096}, "corrupt image: bad (offset 0x1000)"),
        ({"nid": 0, "offset": 0}, "corrupt image: bad (nid 0, offset 0x0)"),
    ],
)
def test_corrupt_image_says_where(where: dict[str, int], text: str) -> None:
    found = CorruptImage("bad", **where)
    assert str(found) == text
    assert (found.what, found.nid, found.offset) == ("bad", where.get("nid"), where.get("offset"))
    same = pickle.loads(pickle.dumps(found))
    assert str(same) == text
    assert (same.what, same.nid, same.offset) == (found.what, found.nid, found.offset)
