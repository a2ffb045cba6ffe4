"""Root without its rights over files: a file's mode then counts as it does for everybody else.

Another user would not do in its place: what Python imports late lies in folders that may be closed to others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

NOBODY = 65534
ROOT = sys.platform != "win32" and os.geteuid() == 0
VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
FILE_RIGHTS = 0b1111  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER


def _set_effective(wanted: int | None) -> int:
    """The first 32 capabilities that this thread had in effect; those of `wanted` are from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    before = sets[0]
    if wanted is not None:
        sets[0] = wanted
        if libc.capset(header, sets):
            raise OSError(ctypes.get_errno(), "capset")
    return before


@contextlib.contextmanager
def without_root_rights() -> Iterator[None]:
    """In this thread and in those that it starts; nothing changes for anybody but root."""
    if sys.platform == "linux" and ROOT:
        before = _set_effective(None)
        _set_effective(before & ~FILE_RIGHTS)
        try:
            yield
        finally:
            _set_effective(before)
    elif sys.platform != "win32" and ROOT:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield
