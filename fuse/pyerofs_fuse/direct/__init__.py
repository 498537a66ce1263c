"""The engine that speaks the kernel's protocol itself, with blocking reads of /dev/fuse."""
