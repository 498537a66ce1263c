"""Where an image's bytes come from.

A *source* is a read-only array of bytes with a known size; see ``base`` for the contract.  Sources
wrap one another (slice, concatenation) and know nothing of EROFS.
"""

from pyerofs.sources.base import AsyncSource, Buffer, Source
from pyerofs.sources.local.buffer import MemorySource
from pyerofs.sources.local.concat import ConcatSource
from pyerofs.sources.local.file import FileObjectSource, FileSource
from pyerofs.sources.local.slice import SliceSource

__all__ = [
    "AsyncSource",
    "Buffer",
    "ConcatSource",
    "FileObjectSource",
    "FileSource",
    "MemorySource",
    "SliceSource",
    "Source",
]
