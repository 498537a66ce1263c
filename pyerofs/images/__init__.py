"""What stands between sources and the format: how the devices of an image belong together."""
