"""EROFS itself: from bytes to inodes, names and data.

Plain functions over a ``Memory``.  Of sources this package knows the contract only (``sources.base``);
it knows no path of this machine, no trio and no network."""
