"""Credentials for registries and servers, and the files in which other tools keep them.

The files are those of docker and podman: ``auths`` (with namespaces), ``credHelpers``, ``credsStore``,
identity tokens.  They are read again whenever their credentials are refused.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
from dataclasses import dataclass, field
from typing import Any

import trio

log = logging.getLogger("pyerofs")

MAX_FILE = 4 << 20
HELPER_TIMEOUT = 20.0
HUB_KEY = "https://index.docker.io/v1/"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name with a password, or an identity token."""

    username: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    def basic(self) -> str:
        """The value of a Basic Authorization header."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode()


def config_files() -> list[str]:
    """The files that may hold credentials, the most specific first."""
    home = os.path.expanduser("~")
    found = []
    if path := os.environ.get("REGISTRY_AUTH_FILE"):
        found.append(path)
    if path := os.environ.get("DOCKER_CONFIG"):
        found.append(os.path.join(path, "config.json"))
    if path := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(os.path.join(path, "containers", "auth.json"))
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    found.append(os.path.join(config, "containers", "auth.json"))
    found.append(os.path.join(home, ".docker", "config.json"))
    return found


async def find_credentials(registry: str, repository: str) -> Credentials | None:
    """The stored credentials for a repository, or None.  Runs credential helpers.  Files and helpers
    that don't work are logged, and raise nothing."""
    for path in config_files():
        config = await trio.to_thread.run_sync(_load, path)
        if config is None:
            continue
        found = await _from_config(config, registry, repository)
        if found is not None:
            log.info("credentials for %s from %s", registry, path)
            return found
    return None


def _load(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as f:
            found = json.loads(f.read(MAX_FILE))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        log.warning("%s: can't be read (%s)", path, type(e).__name__)
        return None
    return found if isinstance(found, dict) else None


async def _from_config(
    config: dict[str, Any], registry: str, repository: str
) -> Credentials | None:
    helpers = _dict(config.get("credHelpers"))
    hosts = [registry, HUB_KEY] if registry == "docker.io" else [registry]
    for host in hosts:
        if isinstance(helper := helpers.get(host), str):
            return await _ask_helper(helper, host)
    auths = _dict(config.get("auths"))
    entry = _best_entry(auths, registry, repository)
    if entry is not None and (found := _from_entry(entry)) is not None:
        return found
    if isinstance(store := config.get("credsStore"), str) and store:
        for host in reversed(hosts):
            if (found := await _ask_helper(store, host)) is not None:
                return found
    return None


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _best_entry(auths: dict[str, Any], registry: str, repository: str) -> dict[str, Any] | None:
    """The entry with the longest matching name: ``host/org/repo``, then ``host/org``, then ``host``;
    old entries may be URLs."""
    by_name = {_plain(key): value for key, value in auths.items()}
    name = f"{registry}/{repository}"
    while True:
        if isinstance(entry := by_name.get(name.lower()), dict):
            return entry
        name, slash, _ = name.rpartition("/")
        if not slash:
            break
    if registry == "docker.io":
        for key in ("index.docker.io", "registry-1.docker.io"):
            if isinstance(entry := by_name.get(key), dict):
                return entry
    return None


def _plain(key: str) -> str:
    """``https://index.docker.io/v1/`` -> ``index.docker.io``; other names as they are."""
    if re.match(r"https?://", key):
        return key.split("/")[2].lower()
    return key.rstrip("/").lower()


def _from_entry(entry: dict[str, Any]) -> Credentials | None:
    token = entry.get("identitytoken") or ""
    username, password = entry.get("username") or "", entry.get("password") or ""
    if isinstance(auth := entry.get("auth"), str) and auth:
        try:
            pair = base64.b64decode(auth + "=" * (-len(auth) % 4)).decode()
        except ValueError:
            pair = ""
        username, _, password = pair.rstrip("\0").partition(":")
    if not all(isinstance(v, str) for v in (token, username, password)):
        return None
    return Credentials(username, password, token) if token or username else None


async def _ask_helper(name: str, host: str) -> Credentials | None:
    """Run ``docker-credential-NAME get``, with the host on stdin and JSON on stdout."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        log.warning("credential helper %r: not a name", name)
        return None
    command = f"docker-credential-{name}"
    try:
        with trio.fail_after(HELPER_TIMEOUT):
            done = await trio.run_process(
                [command, "get"],
                stdin=host.encode(),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
    except (OSError, trio.TooSlowError) as e:
        reason = e.strerror if isinstance(e, OSError) else "no answer"
        log.warning("%s: %s", command, reason)
        return None
    if done.returncode:
        return None  # the helper has no credentials for this host
    try:
        found = json.loads(done.stdout)
        username, secret = str(found["Username"]), str(found["Secret"])
    except (ValueError, KeyError, TypeError):
        log.warning("%s: makes no sense", command)
        return None
    if username == "<token>":
        return Credentials(token=secret)
    return Credentials(username, secret)
