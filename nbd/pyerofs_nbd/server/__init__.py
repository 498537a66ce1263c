"""The NBD protocol, and the server that speaks it to clients."""
