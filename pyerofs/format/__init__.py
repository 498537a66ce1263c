"""The EROFS format: parse an image's bytes into inodes, names and file data.

Plain functions over a ``Memory``.  This package knows sources only by their contract
(``sources.base``); it uses no local file paths, no trio and no network."""
