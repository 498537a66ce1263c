"""A virtual machine that has the host's files as its root (a copy: what it writes is gone with it)
and runs one command.  Emulated, so that it works everywhere; a boot takes some seconds."""

from __future__ import annotations

import os
import selectors
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.vm.kernels import Kernel, Unavailable

QEMU = "qemu-system-x86_64"
BUSYBOX = Path("/bin/busybox")
MEMORY = "1536"  # MiB; what the guest writes is part of it

# mount(8), insmod(8) and so on are busybox's; /job is what to run, with the host's root as its own
INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /host /over /new
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for m in $($b cat /order); do $b insmod /modules/$m || echo "can't insert $m"; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=262144 host /host || $b poweroff -f
$b mount -t tmpfs over /over
$b mkdir /over/upper /over/work
$b mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work over /new
$b mount -t proc proc /new/proc
$b mount -t sysfs sys /new/sys
$b mount -t devtmpfs dev /new/dev
$b mount -t tmpfs -o mode=755 run /new/run
$b mount -t tmpfs -o mode=1777 tmp /new/dev/shm
$b ip link set lo up
release=$($b uname -r)
$b mkdir -p /new/lib/modules/$release
$b cp /later/* /new/lib/modules/$release/
for m in /later/*; do echo "$($b basename $m):" >> /new/lib/modules/$release/modules.dep; done
for t in modprobe rmmod lsmod; do $b ln -sf /bin/busybox /new/usr/sbin/$t; done
$b cp /bin/busybox /new/bin/busybox 2>/dev/null
$b cp /job /new/run/job
$b stty -F /dev/ttyS1 raw
$b chroot /new /bin/sh /run/job
$b poweroff -f
"""


def check() -> None:
    """Raises Unavailable where this machine lacks what it takes."""
    for tool in (QEMU, "cpio"):
        if shutil.which(tool) is None:
            raise Unavailable(f"there is no {tool}")
    if not BUSYBOX.exists():
        raise Unavailable("there is no busybox (package busybox-static)")
    if os.geteuid() != 0:
        raise Unavailable("needs root, whose files are the guest's")


def run(
    kernel: Kernel,
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    scratch: Path,
    *,
    patience: float,
) -> Iterator[str]:
    """Boot, run a command, and yield the lines it writes to /dev/ttyS1.

    The machine is killed when nothing comes for ``patience`` seconds, or when the iterator is
    closed.  The console's output is in ``scratch/console``."""
    initramfs = _initramfs(kernel, command, environment, scratch)
    words: list[str | Path] = [
        QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", MEMORY,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-serial", f"file:{scratch / 'console'}", "-serial", "stdio",
        "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        "-kernel", kernel.image, "-initrd", initramfs,
        "-append", "console=ttyS0 panic=-1 loglevel=5 random.trust_cpu=on mitigations=off",
    ]  # fmt: skip
    with (
        (scratch / "qemu").open("w") as messages,
        subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages
        ) as process,
    ):
        try:
            yield from _lines(process, patience)
        finally:
            process.kill()


def _lines(process: subprocess.Popen[bytes], patience: float) -> Iterator[str]:
    assert process.stdout is not None
    fd = process.stdout.fileno()
    rest = b""
    end = time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            data = os.read(fd, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                end = time.monotonic() + patience
                yield line.decode("utf-8", "replace").rstrip("\r")


def _initramfs(
    kernel: Kernel, command: Sequence[str | Path], environment: Mapping[str, str], scratch: Path
) -> Path:
    tree = scratch / "initramfs"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("bin", "modules", "later"):
        (tree / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / "bin" / "busybox")
    for module in kernel.at_boot:
        shutil.copy(module, tree / "modules")
    shutil.copy(kernel.later, tree / "later")
    (tree / "order").write_text("\n".join(m.name for m in kernel.at_boot))
    words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    words += [shlex.quote(str(word)) for word in command]
    (tree / "job").write_text(f"cd {shlex.quote(os.getcwd())} && exec env -i {' '.join(words)}\n")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    archive = scratch / "initramfs.cpio"
    names = "\0".join(str(p.relative_to(tree)) for p in sorted(tree.rglob("*")))
    with archive.open("wb") as f:
        subprocess.run(
            ["cpio", "--quiet", "-0", "-o", "-H", "newc"],
            input=names.encode(), stdout=f, cwd=tree, check=True,
        )  # fmt: skip
    return archive
