"""The engine over pyfuse3 and trio: one process, whose event loop also fetches what is far away."""
