"""A system clock of its own for a server: a library, loaded before the C library's, that steps it by whole seconds.

libfaketime does the same for programs that allocate memory as it expects; Redis with jemalloc does not.
"""

import mmap
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long long *offset = MAP_FAILED;

__attribute__((constructor)) static void find_offset(void) {
  const char *path = getenv("IDEMPOTENT_TEST_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file >= 0) {
    offset = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    close(file);
  }
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int failed = (int)syscall(SYS_clock_gettime, clock, now);
  if (!failed && offset != MAP_FAILED && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
    now->tv_sec += *offset;
  return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec precise;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *now) {
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  if (now) *now = precise.tv_sec;
  return precise.tv_sec;
}
"""


class SteppedClock:
    """A clock that `environment` gives to the processes of a server, and `step` moves.

    Skips the test where no C compiler is at hand, or the system has no LD_PRELOAD.
    """

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if sys.platform != "linux" or compiler is None:
            pytest.skip("stepping a server's clock takes Linux and a C compiler (cc) at hand")
        folder.chmod(0o755)
        source, library, offset = folder / "clock.c", folder / "clock.so", folder / "offset"
        source.write_text(_SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        offset.write_bytes(bytes(8))
        offset.chmod(0o644)
        with offset.open("r+b") as file:
            self._offset = mmap.mmap(file.fileno(), 8)
        self.environment: dict[str, Any] = {"LD_PRELOAD": str(library), "IDEMPOTENT_TEST_CLOCK": str(offset)}

    def step(self, seconds: int) -> None:
        """Set the clock so many seconds before (negative) or after the true time."""
        self._offset[:] = struct.pack("q", seconds)
