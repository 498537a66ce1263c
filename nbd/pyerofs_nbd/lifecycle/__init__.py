"""The life cycle of devices: attaching, serving, reattaching, supervising, detaching."""
