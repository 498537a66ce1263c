"""Several processes that serve one mount: forking them, receiving in turn, shared memory."""
