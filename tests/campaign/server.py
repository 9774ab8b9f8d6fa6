"""Commands as forks of a process that has everything loaded: a start costs milliseconds, so that a
kill is cheap. What is run is the command itself, from its arguments to its exit code; only how new
processes come about differs: ranks, runs of a batch and notebooks are forks, too."""
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))
import small  # noqa: E402, F401
import nbformat  # noqa: E402
import papermill  # noqa: E402
import psutil  # noqa: E402

from pgolf import cli  # noqa: E402
from pgolf.command import running, submitting  # noqa: E402
from pgolf.game import data as game_data  # noqa: E402
from pgolf.scale import batch  # noqa: E402
from pgolf.score import compare  # noqa: E402
from pgolf.systems import launch, ownership, page, pipeline  # noqa: E402

HANG = 3000  # seconds until what should have ended is killed; long, for a machine with other work
ORPHANS = 60  # seconds that they may go on, or wait for a rank that was never started
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
# what a command goes through: where a stage begins
STAGES = [(pipeline, "train_here"), (pipeline, "squeeze_here"), (pipeline, "grade"),
    (submitting, "squeeze_model"), (compare, "score"), (game_data, "_put_tokenizer"),
    (game_data, "_fill"), (pipeline, "write_checkpoint"), (pipeline, "save_artifact"),
    (page, "train"), (page, "squeeze"), (page, "score")]


class Death:
    "When a command is to die: after so many file operations, or a while after a stage has begun."
    def __init__(self, pipe, writes=0, stage=0, wait=0.):
        self.pipe, self.writes, self.stage, self.wait = pipe, writes, stage, wait
        self.folder, self.busy = os.getcwd(), False
    def hook(self, event, args):
        "An audit hook: dies before the operation is done."
        if event == "open":
            if not isinstance(args[0], (str, bytes)) or not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
            if not os.path.abspath(os.fsdecode(args[0])).startswith(self.folder): return
        elif event not in CHANGES: return
        self.writes -= 1
        if self.writes == 0: self.now()
    def begun(self):
        "A stage has begun; the one that counts starts a clock."
        self.stage -= 1
        if self.stage: return
        def later():
            time.sleep(self.wait)
            self.now()
        threading.Thread(target=later, daemon=True).start()
    def now(self):
        os.write(self.pipe, b"k")
        os.kill(os.getpid(), signal.SIGKILL)
    def arm(self):
        "Put it where it hears of what happens."
        if self.writes: sys.addaudithook(self.hook)
        for module, name in STAGES if self.stage else (): self._wrap(module, name)
    def _wrap(self, module, name):
        real = getattr(module, name)
        def call(*args, **kw):
            self.begun()
            return real(*args, **kw)
        setattr(module, name, call)


# ---- processes that a command starts

def words_of(command):
    "Arguments of pgolf in the command line of a child."
    return command[command.index("pgolf.cli")+1:]


def call(args):
    "The command in this process: its exit code."
    sys.argv = ["pgolf", *map(str, args)]
    try: cli.main()
    except SystemExit as e: return e.code or 0
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        ownership._release_all()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def session():
    "A session of one's own, which Linux schedules as a group: as nice as its process."
    os.setsid()
    with suppress(OSError):  # not there, or not at once
        if os.nice(0) > 0: Path("/proc/self/autogroup").write_text(str(os.nice(0)))


def forked(work):
    "The id of a child that does some work and ends with its result."
    pid = os.fork()
    if pid: return pid
    code = 71
    try: code = work()
    except BaseException: traceback.print_exc()
    finally: os._exit(code if isinstance(code, int) else 1)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(command, lines):
    "In the place of torchrun: forks that find each other; the first that fails ends the others."
    world = int(next(w for w in command if w.startswith("--nproc-per-node")).partition("=")[2])
    about = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world), TORCHELASTIC_RUN_ID="campaign")
    def work(rank):
        os.environ.update(about, RANK=str(rank), LOCAL_RANK=str(rank))
        return call(words_of(command))
    left = {forked(lambda r=r: work(r)) for r in range(world)}
    worst = 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        worst = worst or abs(code)
        for other in left if code else (): os.kill(other, signal.SIGKILL)
    return worst, False


class Child:
    "In the place of a process that a batch starts."
    def __init__(self, command, stdout=None, **_):
        def work():
            session()
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            return call(words_of(command))
        self.pid, self.code = forked(work), None
    def wait(self):
        if self.code is None: self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code
    def poll(self): return self.code
    def send_signal(self, what): os.kill(self.pid, what)


def notebook(source, done, parameters, **_):
    "In the place of papermill's kernel: cell after cell, the file written after each."
    nb, names = nbformat.read(source, 4), {}
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        text = "\n".join(s for s in cell.source.split("\n") if not s.startswith("%"))
        exec(compile(text, str(source), "exec"), names)
        if "parameters" in cell.metadata.get("tags", []): names.update(parameters)
        nbformat.write(nb, done)


def patch():
    "In a fork: let new processes be forks."
    launch._stream = ranks
    batch.subprocess = SimpleNamespace(Popen=Child, DEVNULL=None, PIPE=-1, run=None)
    papermill.execute_notebook = notebook


# ---- what the campaign starts, and kills

class Command:
    "A command at work in a folder, which may be told when to die."
    def __init__(self, args, folder, log, before=None, **death):
        self.read, write = os.pipe()
        def work():
            session()
            os.chdir(folder)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for fd in (1, 2): os.dup2(out, fd)
            patch()
            if death: Death(write, **death).arm()
            if before: before()
            return call(args)
        self.pid, self.log = forked(work), log
        os.close(write)
    def wait(self, seconds):
        "Wait for its end, or its death, or so many seconds; whether it ended by itself."
        ready = select.select([self.read], [], [], seconds)[0]
        if ready and os.read(self.read, 1) == b"k": return False
        return bool(ready)
    def kill(self, alone=False):
        "Kill it, and all that it has started unless they may go on, and wait until they are gone."
        os.kill(self.pid, signal.SIGKILL)
        code, until = self.end(), time.monotonic()+ORPHANS*alone
        while left := psutil.Process().children(recursive=True):
            for p in left if time.monotonic() >= until else ():
                try: p.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess: pass
            psutil.wait_procs(left, timeout=1)
        return code
    def end(self):
        "Its exit code, negative after a signal."
        os.close(self.read)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def loaded():
    "Load what commands load later, take one thread, and adopt orphans, before the first fork."
    import matplotlib.pyplot  # noqa: F401
    import encodings.utf_8_sig  # noqa: F401, another user may not read Python's own files
    import torch._dynamo  # noqa: F401
    import torch.distributed  # noqa: F401
    torch.set_num_threads(1)
    gc.freeze()  # what is there is not looked through, and so not copied, in every fork
    size = pipeline.code_bytes()  # of the package, which stays as it is
    pipeline.code_bytes = lambda: size
    for module in (running, submitting): module.script_bytes = lambda recipe: 20_000  # only told
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
