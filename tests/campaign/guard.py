"""Watch a reader: its time, its memory, what it executes, and which files it touches."""
import os
import re
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS, BYTES = 2., 10**9  # of processor time and of memory, for one file
HANG = 60                   # seconds of processor time without a sign of life, or 20 times as many
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.forkpty", "pty.spawn", "socket.connect", "socket.bind", "os.startfile"}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
    "os.truncate", "os.chmod", "os.chown", "os.setxattr", "shutil.rmtree", "shutil.move"}
OWN = tuple(str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, ROOT/"pgolf",
    ROOT/"tests", "/proc", "/sys", "/dev/null", "/dev/urandom", "/usr/share", "/usr/lib", "/lib",
    "/etc/localtime"))
NO_MEMORY = re.compile(r"MemoryError|bad_alloc|allocate memory|Unable to allocate", re.I)


class TooLong(BaseException):
    "The time is up; no `except Exception` keeps it."


class Watch:
    "What was seen while it was on."
    def __init__(self): self.folder, self.seen, self.real = "", [], {}
    def hook(self, event, args):
        "An audit hook of Python, which cannot be removed again."
        if not self.folder: return
        if event in STARTS: self.seen.append(f"{event} {str(args)[:80]}")
        elif event == "exec": self._code(args[0])
        elif event == "open": self._path("open", args[0])
        elif event in CHANGES:
            self.real.clear()
            for a in args: self._path(event, a)
    def _code(self, code):
        name = getattr(code, "co_filename", "")
        if not name.startswith((*OWN, "<frozen", "<string>", "<attrs")):
            self.seen.append(f"executes {name[:80]}")
    def _path(self, event, path):
        if not isinstance(path, (str, bytes, os.PathLike)): return
        full = self._real(os.fsdecode(path))
        if full != self.folder and not full.startswith((self.folder+"/", *OWN)):
            self.seen.append(f"{event} {full[:80]}")
    def _real(self, path):
        "Where a path leads, which is kept until something is moved or linked."
        if not os.path.isabs(path) or path not in self.real:
            if len(self.real) > 1000: self.real.clear()
            self.real[path] = os.path.realpath(path)
        return self.real[path]


WATCH = Watch()


def install(more=BYTES):
    "Hook and limits, for the rest of this process."
    sys.addaudithook(WATCH.hook)
    if more and sys.platform == "linux":
        now = 1024*int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (now+more, now+more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def watching(folder, seconds=SECONDS):
    "Let a reader work in a folder; gives the list of what it should not have done."
    def stop(*_): raise TooLong(f"{seconds} s of processor time")
    before = signal.signal(signal.SIGPROF, stop)
    WATCH.seen = []
    WATCH.folder = os.path.realpath(folder)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try: yield WATCH.seen
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        WATCH.folder = ""


def peak_bytes():
    "Peak memory of this process."
    text = Path("/proc/self/status").read_text()
    return 1024*int(text.partition("VmHWM:")[2].split()[0])


def judge(read, exact, errors, path, data, folder=None, seconds=SECONDS):
    """Read one file: "read", "refused", or what is wrong."""
    try:
        with watching(folder or path.parent, seconds) as seen: value, error = read(path), None
    except TooLong as e: return f"hangs: {e}"
    except BaseException as e: value, error = None, e
    if seen: return f"does more than read: {seen[0]}"
    if error is not None: return _refusal(error, errors, path)
    try: return "read" if exact(data, value) else "reads what is not in the file"
    except Exception as e: return f"is read where the oracle fails: {type(e).__name__}"


def _refusal(error, errors, path):
    "Whether an error is the one clear error."
    kind, said = type(error).__name__, str(error)
    if NO_MEMORY.search(f"{kind}: {said}"): return f"wants more than {BYTES:,} bytes"
    if not isinstance(error, errors): return f"{kind} instead of an error in words"
    if path.name not in said and str(path.parent) not in said:
        return f"{kind} that does not name the file"
    return "refused" if len(said) < 1500 else f"{kind} of {len(said)} characters"
