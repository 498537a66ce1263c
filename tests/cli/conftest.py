"""Running the command: in this process where that will do, else as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from pyerofs.cli.main import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """What a command has said and done."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode("utf-8", "surrogateescape")

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


class RunProcess(Protocol):
    def __call__(self, *words: object, under: list[str] = ..., **options: Any) -> Done: ...


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Run ``pyerofs WORD …`` in this process."""

    def call(*words: object) -> Done:
        capfdbinary.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as e:  # argparse
            status = e.code if isinstance(e.code, int) else 1
        out, err = capfdbinary.readouterr()
        return Done(status, out, err.decode("utf-8", "surrogateescape"))

    return call


@pytest.fixture
def run_process() -> RunProcess:
    """Run ``python -m pyerofs WORD …`` in a process of its own; ``under``: words before that."""

    def call(*words: object, under: list[str] | None = None, **options: Any) -> Done:
        settings: dict[str, Any] = {"stdout": subprocess.PIPE, "cwd": ROOT} | options
        command = [*(under or []), sys.executable, "-m", "pyerofs", *map(str, words)]
        done = subprocess.run(command, stderr=subprocess.PIPE, check=False, **settings)
        return Done(
            done.returncode,
            done.stdout or b"",
            done.stderr.decode("utf-8", "surrogateescape"),
        )

    return call
