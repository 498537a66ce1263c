"""The command ``pyerofs``: one module for each of its verbs, imported when it is used."""
