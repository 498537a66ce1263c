"""`pyerofs-nbd`: any source as a network block device, served, attached, mounted, recovered.

It may import ``pyerofs.sources`` and never the parser: a device is just bytes.
"""
