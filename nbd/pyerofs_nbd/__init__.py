"""The home of the NBD exporter, `pyerofs-nbd`.  It has not moved in yet: see CHANGELOG.md.

It may import ``pyerofs.sources`` and never the parser: a device is just bytes.
"""
