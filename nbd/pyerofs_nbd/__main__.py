"""``python -m pyerofs_nbd``"""

from pyerofs_nbd.cli import run

if __name__ == "__main__":
    run()
