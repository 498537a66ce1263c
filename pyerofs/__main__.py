"""``python -m pyerofs``: the command ``pyerofs``."""

from pyerofs.cli.main import run

if __name__ == "__main__":
    run()
