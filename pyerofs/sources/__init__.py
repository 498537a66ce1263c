"""Where an image's bytes come from.

A *source* is a read-only array of bytes with a known size; see ``base`` for the contract.  Sources
wrap one another (slice, concatenation) and know nothing of EROFS.
"""

from pyerofs.sources.base import AsyncSource, Buffer, Source
from pyerofs.sources.concat import ConcatSource
from pyerofs.sources.file import FileObjectSource, FileSource
from pyerofs.sources.memory import MemorySource
from pyerofs.sources.slice import SliceSource

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
