"""The kernel's nbd devices: its driver, what sysfs shows, recovery files, mount(2)."""
