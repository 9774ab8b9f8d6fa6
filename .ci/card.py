"""The first minutes on a card: each question in a process of its own, each answer on disk at once.

  python .ci/card.py A --out FOLDER [--wheels .card/wheels] [--debdocs DIR] [--script FILE]
  python .ci/card.py B --out FOLDER ...
  python .ci/card.py all --size tiny --out FOLDER     both calls, small, on a CPU
  python .ci/card.py table --out FOLDER               what has been answered so far
  python .ci/card.py collect .card                    at home: wheels, and data at hand

It needs nothing but Python: what the card's image lacks is installed from the wheels into WORK.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CALLS = {  # step -> seconds at most; together 330 and 350
    "A": dict(versions=20, attention=25, recipes=25, squeeze=25, scoring=25, compiled=130,
        script=80),
    "B": dict(run=220, others=130),
}
CALLS["all"] = CALLS["A"] | CALLS["B"]
SIZES = {
    "full": {},
    "tiny": dict(device="cpu", scale="tiny", compile=False, steps=12, few=6, targets=2048),
}
# What an image with torch, transformers and typer lacks of papermill, of kernels, and of ours;
# debugpy, which ipykernel names, it does without.
LACKING = """asttokens attrs brotli comm entrypoints executing fastjsonschema ipykernel ipython
ipython-pygments-lexers jedi jsonschema jsonschema-specifications jupyter-client jupyter-core
matplotlib-inline nbclient nbformat nest-asyncio2 papermill parso pexpect platformdirs
prompt-toolkit ptyprocess pure-eval pyzmq referencing rpds-py stack-data tenacity tornado traitlets
tzdata wcwidth zstandard""".split()
WHERE = """--no-deps --only-binary=:all: --python-version 3.12 --implementation cp
--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_26_x86_64
--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64
--platform manylinux2010_x86_64 --platform manylinux_2_5_x86_64
--platform manylinux1_x86_64""".split()
MOST = 30_000_000  # bytes of wheels
SHARDS = [f"debdocs_{n}.bin.zst" for n in ("train_000000", "train_000001", "val_000000")]
TOKENIZER = "fineweb_1024_bpe.model"


# ---- at home

def installed():
    "Name -> version of the packages of this environment."
    from importlib.metadata import distributions
    return {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}


def collect(folder):
    "Wheels of the versions that are installed here, and data, into FOLDER."
    here = installed()
    wheels = folder/"wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for p in wheels.glob("*.whl"): p.unlink()  # two versions of one package would stop the install
    wanted = [f"{n}=={here[n]}" for n in LACKING if n in here]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "-d"]
    subprocess.run([*pip, str(wheels), *WHERE, *wanted], check=True)
    size = sum(p.stat().st_size for p in wheels.glob("*.whl"))
    if size > MOST: sys.exit(f"{wheels}: {size:,} bytes of wheels, more than {MOST:,}")
    print(f"{len(wanted)} wheels, {size:,} bytes, in {wheels}")
    data = ROOT.parent/"shared"/"data"
    files = [*(data/"debdocs"/n for n in SHARDS), data/TOKENIZER]
    if not all(f.exists() for f in files): return print("no debdocs at hand: runs take the novels")
    (folder/"debdocs").mkdir(exist_ok=True)
    for f in files: shutil.copy(f, folder/"debdocs")
    print(f"{len(files)} files of debdocs in {folder/'debdocs'}")


# ---- on the card

def append(path, step, question, answer, seconds):
    "One answer, as pgolf.speed.card writes them."
    line = dict(step=step, question=question, answer=answer, seconds=round(seconds, 2), values={})
    with path.open("a") as f: f.write(json.dumps(line) + "\n")


def environment(work):
    "Of the steps: this checkout, what was installed from wheels, one cache of compiled kernels."
    paths = [str(ROOT), str(work/"site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | dict(PYTHONPATH=os.pathsep.join(paths), PYTHONUNBUFFERED="1",
        TORCHINDUCTOR_CACHE_DIR=str(work/"inductor"))


def install(wheels, work, answers):
    "Put the wheels where the steps find them, once."
    began, files = time.monotonic(), sorted(wheels.glob("*.whl"))
    if not files or (work/"site").exists(): return
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile",
        "--target", str(work/"site")]
    done = subprocess.run([*pip, *map(str, files)], capture_output=True, text=True)
    said = f"{len(files)} packages" if done.returncode == 0 else done.stderr.strip()[-300:]
    append(answers, "install", "What was installed?", said, time.monotonic()-began)


def unpack(folder, work):
    "The shards as a dataset that pgolf opens; its folder."
    at = work/"data"
    if (at/"manifest.json").exists(): return at
    code = "import sys; from pgolf.game.fineweb import unpack_shards as f; f(*sys.argv[1:4], {})"
    shards = len(list(folder.glob("debdocs_train_*.bin.zst")))
    subprocess.run([sys.executable, "-c", code.format(shards), str(folder), str(at),
        str(folder/TOKENIZER)], check=True, cwd=ROOT, env=environment(work))
    return at


def step(name, seconds, settings, answers, log):
    "Run one step, and end it with all its children when its time is over."
    code = "import sys; from pgolf.speed.card import run_step; run_step(*sys.argv[1:])"
    began = time.monotonic()
    log.write(f"---- {name}\n".encode())
    log.flush()
    child = subprocess.Popen([sys.executable, "-c", code, name, str(settings)], stdout=log,
        stderr=log, cwd=ROOT, env=environment(settings.parent), start_new_session=True)
    try: code = child.wait(seconds)
    except subprocess.TimeoutExpired: code = None
    finally:
        try: os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        child.wait()
    took = time.monotonic()-began
    if code is None: append(answers, name, "(the step)", f"cut off after {seconds:.0f} s", took)
    if code: append(answers, name, "(the step)", f"FAILED: {last_line(log.name)}", took)


def last_line(path):
    said = [s for s in Path(path).read_text(errors="replace").splitlines() if s.strip()]
    return said[-1][:200]


def table(answers):
    "Question, answer, seconds, as wide as they are."
    rows = [("step", "question", "answer", "seconds")]
    for line in answers.read_text().splitlines() if answers.exists() else ():
        try: a = json.loads(line)
        except ValueError: continue
        rows.append((a["step"], a["question"], a["answer"], f"{a['seconds']:.1f}"))
    wide = [max(len(r[i]) for r in rows) for i in range(3)]
    return "\n".join(" | ".join([*(c.ljust(w) for c, w in zip(r, wide)), r[3].rjust(7)])
        for r in rows)


def call(given):
    "The steps of a call, each within its own limit and all within theirs."
    out, work = given.out.resolve(), (given.work or Path(tempfile.gettempdir())/"card").resolve()
    for p in (out, work): p.mkdir(parents=True, exist_ok=True)
    answers, settings = out/"card-answers.jsonl", work/"settings.json"
    steps = {n: s*given.slower for n, s in CALLS[given.call].items()
        if n in (given.only or CALLS["all"])}
    end = time.monotonic() + (given.limit or sum(steps.values()))
    install(given.wheels, work, answers)
    asked = dict(out=str(out), work=str(work), script=str(given.script or "")) | SIZES[given.size]
    if given.size == "full" and (given.debdocs/TOKENIZER).exists():
        asked["corpus"] = str(unpack(given.debdocs, work))
    settings.write_text(json.dumps(asked))
    with (out/"card.log").open("ab") as log:
        for name, seconds in steps.items():
            left = end-time.monotonic()
            if left < 1: append(answers, name, "(the step)", "left out: no time", 0.)
            else: step(name, min(seconds, left), settings, answers, log)
    print(table(answers), flush=True)


def options():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=[*CALLS, "table", "collect"])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT/".card", help="of collect")
    parser.add_argument("--out", type=Path, default=ROOT/".card"/"out", help="what is kept")
    parser.add_argument("--work", type=Path, help="everything else; default: of the system")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--wheels", type=Path, default=ROOT/".card"/"wheels")
    parser.add_argument("--debdocs", type=Path, default=ROOT/".card"/"debdocs")
    parser.add_argument("--script", type=Path, help="a published train_gpt.py of #610's family")
    parser.add_argument("--only", nargs="*", choices=CALLS["all"], help="steps")
    parser.add_argument("--slower", type=float, default=1., help="times the seconds of each step")
    parser.add_argument("--limit", type=float, help="seconds of the whole call")
    return parser


def main(args):
    given = options().parse_args(args)
    if given.call == "collect": collect(given.folder)
    elif given.call == "table": print(table(given.out/"card-answers.jsonl"))
    else: call(given)


if __name__ == "__main__": main(sys.argv[1:])
