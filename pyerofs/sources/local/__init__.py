"""Sources on this machine: files, file objects, bytes; parts and sequences of other sources."""
