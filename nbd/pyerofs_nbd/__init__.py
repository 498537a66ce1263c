"""`pyerofs-nbd`: any source as a network block device, served, attached, mounted, recovered.

It never imports the parser: a device is just bytes.
"""
