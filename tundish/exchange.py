"""What a file system can do: exchange two names in one step, and keep locks that all who use it see."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_HERE = -100  # AT_FDCWD: paths that are not absolute are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # an old kernel, a file system or a sandbox

_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs", "overlay"})


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders of one file system; at every moment, each name is one of them.

    False, and nothing is done, where the system or the file system has no such call. OSError as a rename has it.
    """
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:  # a C library older than 2018
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def is_local(path: Path) -> bool:
    """Whether only this machine's kernel has the file system of an existing path, as /proc/self/mountinfo tells.

    False where that is not certain.
    """
    try:
        device, lines = path.stat().st_dev, Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    # "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue" (proc_pid_mountinfo(5))
    mounts = [line.split(" - ") for line in lines if line.split(" ", 3)[2] == number]
    return bool(mounts) and all(mount[-1].split(" ")[0] in _LOCAL for mount in mounts)
