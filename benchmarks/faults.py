"""Makes every write of a run fail in turn: a full disk, a broken one. Is anything lost?

    python benchmarks/faults.py [--error ENOSPC] [--stages sft reward ppo] [--every 1] [--jobs 2]

A small C library in front of libc (needs `cc`) counts the system calls with which a run changes
its directory: write, fsync, rename, mkdir and opening for writing, the tensor files' included. One
run per call: that call fails, and where the disk is full all that follow. The run must end in one
line that names the disk's error, every checkpoint that was there must load, and the run that is
resumed on a sound disk must end as the undisturbed one did, to the bit. Exit code 1 where one does
not.
"""

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096];
static long count, at = -1;
static int number, sticky;

void fault_arm(const char *where, long when, int error, int stay) {
    strncpy(root, where, sizeof root - 1);
    count = 0; at = when; number = error; sticky = stay;
}
void fault_disarm(void) { at = -1; root[0] = 0; }
long fault_count(void) { return count; }

static int met(const char *path) {
    size_t length = strlen(root);
    if (!length || !path || strncmp(path, root, length)) return 0;
    if (path[length] && path[length] != '/') return 0;
    long now = __sync_add_and_fetch(&count, 1);
    if (at > 0 && (now == at || (sticky && now > at))) { errno = number; return 1; }
    return 0;
}
static int met_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return met(path);
}
#define NEXT(name) static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *b, size_t n) {
    NEXT(write);
    return met_fd(fd) ? -1 : next(fd, b, n);
}
ssize_t writev(int fd, const struct iovec *v, int n) {
    NEXT(writev);
    return met_fd(fd) ? -1 : next(fd, v, n);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
    NEXT(pwrite64);
    return met_fd(fd) ? -1 : next(fd, b, n, o);
}
int fsync(int fd) { NEXT(fsync); return met_fd(fd) ? -1 : next(fd); }
int ftruncate64(int fd, off64_t n) { NEXT(ftruncate64); return met_fd(fd) ? -1 : next(fd, n); }
int rename(const char *a, const char *b) { NEXT(rename); return met(b) ? -1 : next(a, b); }
int mkdir(const char *p, mode_t m) { NEXT(mkdir); return met(p) ? -1 : next(p, m); }
int open64(const char *p, int flags, ...) {
    NEXT(open64);
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list);
    if ((flags & O_CREAT) && met(p)) return -1;
    return next(p, flags, mode);
}
int open(const char *p, int flags, ...) {
    NEXT(open);
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list);
    if ((flags & O_CREAT) && met(p)) return -1;
    return next(p, flags, mode);
}
"""


def preload() -> None:
    """Start this program again with the library in front of libc."""
    if "ppomax-faults" in os.environ.get("LD_PRELOAD", ""):
        return
    folder = Path(tempfile.mkdtemp(prefix="ppomax-faults-"))
    (folder / "faults.c").write_text(SOURCE)
    library = folder / "faults.so"
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        str(library),
        str(folder / "faults.c"),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    preload()

sys.path.insert(0, str(Path(__file__).resolve().parent))

# ruff: noqa: E402 - what they import must meet the library
from crash import STAGES, forked, outcome, train, write_data

from ppomax import checkpoint, rundir
from ppomax.errors import PpomaxError

FAULTED = 17
"""Exit code of a run that ended in an error of ours."""


def library() -> Any:
    """The functions of the library in front of libc."""
    return ctypes.CDLL(None)


def counted(stage: str, root: Path) -> None:
    """In a child: run undisturbed, and leave the number of calls."""
    shim = library()
    shim.fault_arm(str(root / stage).encode(), -1, 0, 0)
    train(stage, root / stage, root, resume=False)
    (root / f"{stage}-calls.json").write_text(json.dumps(shim.fault_count()))


def faulted(stage: str, out: Path, root: Path, call: int, error: int) -> None:
    """In a child: the call fails; what was said is left beside the run."""
    shim = library()
    shim.fault_arm(str(out).encode(), call, error, int(error == errno.ENOSPC))
    try:
        train(stage, out, root, resume=False)
    except PpomaxError as found:
        shim.fault_disarm()
        out.with_suffix(".said").write_text(str(found))
        os._exit(FAULTED)


def unloadable(out: Path) -> str:
    """What is wrong with the checkpoints that the events speak of, if anything is."""
    told = [row["number"] for row in rundir.read_jsonl(out / rundir.EVENTS) if "number" in row]
    last = checkpoint.latest(out / "checkpoints")
    if told and (last is None or int(last.path.name[5:11]) < told[-1]):
        return f"checkpoint {told[-1]} was written and is lost"
    return ""


def judge(stage: str, call: int, error: int, out: Path, root: Path, expected: Any) -> str:
    """Fail, look, resume, compare; what was wrong."""
    log, said = out.with_suffix(".txt"), out.with_suffix(".said")
    said.unlink(missing_ok=True)
    code = forked(lambda: faulted(stage, out, root, call, error), log).wait()
    if code not in (0, FAULTED):
        return f"ended with {code}: {log.read_text()[-1500:]}"
    if code == FAULTED:
        text = said.read_text()
        if "\n" in text or os.strerror(error) not in text:
            return f"said {text!r}"
    lost = unloadable(out)
    if lost:
        return lost
    code = forked(lambda: train(stage, out, root, resume=True), log).wait()
    if code:
        return f"resuming ended with {code}: {log.read_text()[-1500:]}"
    found = outcome(out)
    return ", ".join(key for key in {**expected, **found} if expected.get(key) != found.get(key))


def judge_all(
    points: list[tuple[str, int]], error: int, root: Path, jobs: int
) -> dict[tuple[str, int], tuple[str, str]]:
    """What was wrong and what was said, by stage and call, in `jobs` processes."""
    expected = {stage: outcome(root / stage) for stage in {stage for stage, _ in points}}

    def work(job: int) -> None:
        with (root / f"verdicts-{job}.jsonl").open("w") as file:
            for stage, call in points[job::jobs]:
                out = root / f"run-{job}"
                wrong = judge(stage, call, error, out, root, expected[stage])
                said = out.with_suffix(".said")
                text = said.read_text() if said.exists() else ""
                file.write(json.dumps([stage, call, wrong, text.replace(str(out), "RUN")]) + "\n")
                file.flush()
                shutil.rmtree(out, ignore_errors=True)

    children = [forked(lambda job=job: work(job), root / f"job-{job}.txt") for job in range(jobs)]
    found = {}
    for job, child in enumerate(children):
        if child.wait():
            raise SystemExit(child.log.read_text())
        for line in (root / f"verdicts-{job}.jsonl").read_text().splitlines():
            stage, call, wrong, text = json.loads(line)
            found[stage, call] = (wrong, text)
    return found


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--error", default="ENOSPC", choices=["ENOSPC", "EIO", "EROFS", "EACCES"])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--every", type=int, default=1, help="only every so manieth call")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="which calls, with --every")
    chosen = parser.parse_args()
    error, began = getattr(errno, chosen.error), time.monotonic()
    first = random.Random(chosen.seed).randrange(chosen.every)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root)
        points = []
        for stage in STAGES[: 1 + max(STAGES.index(name) for name in chosen.stages)]:
            child = forked(lambda stage=stage: counted(stage, root), root / "log.txt")
            if child.wait():
                raise SystemExit(child.log.read_text())
            calls = json.loads((root / f"{stage}-calls.json").read_text())
            if stage in chosen.stages:
                points += [(stage, call) for call in range(1 + first, calls + 1, chosen.every)]
        found = judge_all(points, error, root, chosen.jobs)
    for point, (wrong, _) in found.items():
        if wrong:
            print(f"FAILED {point}: {wrong}")
    for text, times in Counter(text for _, text in found.values()).most_common(8):
        print(f"{times} times: {text or 'went on'}")
    failed = sum(bool(wrong) for wrong, _ in found.values())
    tried = ", ".join(f"{stage} {sum(s == stage for s, _ in found)}" for stage in chosen.stages)
    print(
        f"{chosen.error} at {len(found)} calls ({tried}), {failed} failures; "
        f"{(time.monotonic() - began) / 60:.1f} minutes"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
