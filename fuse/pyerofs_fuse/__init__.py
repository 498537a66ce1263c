"""Mount EROFS images through FUSE, without root: the command ``pyerofs-fuse``."""
