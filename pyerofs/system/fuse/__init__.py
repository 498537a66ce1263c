"""FUSE, the kernel's protocol for file systems in user space: its messages, and how to mount."""
