"""A plan as jobs of a real Slurm: one node on this machine, started for these tests where Debian's
packages slurm-wlm and munge are installed, and ended with them."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time

import pytest
from conftest import HANG, ROOT, last_words, run_pgolf, start_pgolf
from test_batch import ENDS, FAKE, LAST, notebook
from test_end_to_end import losses, wait_until

from pgolf.files import read_json
from pgolf.scale.runs import make_plan
from pgolf.scale.slurm import Request, with_cards
from pgolf.systems.report import Report

PLACES = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
CONF = """
ClusterName=pgolf
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={at}/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
KillWait=600
MessageTimeout=100
BatchStartTimeout=600
SlurmdTimeout=600
UnkillableStepTimeout=700
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=here NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=all Nodes=here Default=YES MaxTime=INFINITE State=UP
"""
TRAINS = FAKE + """
job.eval_tokens = 512  # what is graded is not the question here
print("there was a checkpoint:", job.state.exists(), flush=True)
report = pipeline.run(job)
"""


def slurm_says(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def queue():
    "Job -> state."
    return dict(line.split() for line in slurm_says("squeue", "--me", "-h", "-o",
        "%A %T").splitlines())


def free_ports(n):
    "Ports of the loopback that nobody has now."
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets: s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return ports


def begin_daemons(at):
    "Start munge and both daemons as children; what they say goes into a file each."
    controller, daemon = free_ports(2)
    (at/"munge.key").write_bytes(secrets.token_bytes(64))
    (at/"munge.key").chmod(0o400)
    for name in ("state", "spool"): (at/name).mkdir()
    about = dict(host=socket.gethostname().split(".")[0], user=getpass.getuser(), at=at)
    (at/"slurm.conf").write_text(CONF.format(controller=controller, daemon=daemon, **about))
    munge = ["munged", "--foreground", "--force", f"--key-file={at}/munge.key",
        f"--socket={at}/munge.socket", f"--pid-file={at}/munged.pid",
        f"--log-file={at}/munged.log", f"--seed-file={at}/munged.seed"]
    children = []
    for words in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "here"]):
        with (at/f"{words[0]}.said").open("w") as f:
            children.append(subprocess.Popen(words, stdout=f, stderr=f))
        while words[0] == "munged" and not (at/"munge.socket").exists():
            assert children[0].poll() is None, (at/"munged.said").read_text()
            time.sleep(.02)
    return children


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    "A cluster of this machine."
    if missing := [n for n in NEEDED if not shutil.which(n, path=PLACES)]:
        pytest.skip(f"no Slurm: {', '.join(missing)} not installed")
    at = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PATH", PLACES)
        m.setenv("SLURM_CONF", str(at/"slurm.conf"))
        children = begin_daemons(at)
        try:
            def idle():
                done = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
                return done.stdout.strip() == "idle"
            wait_for(idle, children, at)
            yield at
            for job in queue(): slurm_says("scancel", job)
            wait_for(lambda: not queue(), children, at)
        finally:
            for child in reversed(children):
                child.terminate()
                child.wait(HANG)


def wait_for(ready, children, at):
    "Poll; a daemon that ends first is an error, and says why."
    end = time.monotonic() + HANG
    while not ready():
        if time.monotonic() > end or any(c.poll() is not None for c in children):
            pytest.fail("\n".join(p.read_text()[-2000:] for p in at.glob("*.[ls]*[gd]")))
        time.sleep(.05)


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    "A run notebook that trains nothing, and one that trains and squeezes and scores."
    folder = tmp_path_factory.mktemp("notebooks")
    notebook(folder, "pr610.ipynb", FAKE, ENDS, LAST)
    notebook(folder, "pr576.ipynb", TRAINS)
    return folder


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def words(notebooks, novels, out, *more):
    return ("batch", *more, "--scale", "tiny", "--corpus", novels.path, "--device", "cpu",
        "--notebooks", notebooks, "--out", out, "--on", "slurm", "--time", 10)


def job_of(out): return read_json(out/"slurm"/"job.json")["job"]


def goes_on(job, child):
    """A job that has been put back into the queue begins in some seconds: Slurm would wait two
    minutes, and has to clear its first turn away, whose end it knows to the second."""
    wait_until(lambda: queue().get(job) == "PENDING", child)
    slurm_says("scontrol", "update", f"JobId={job}", "StartTime=now+5seconds")


# ---- without a cluster

def test_dry_run_prints_scripts_and_writes_nothing(main, novels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, _ = main("batch", "pr610", "pr576", "--scale", "full", "--seeds", 1, 2, "--on",
        "slurm", "--gpus", 8, "--time", 30, "--partition", "h100", "--sbatch", "account=abc",
        "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == []
    scripts = said.split("# ---- ")[1:]
    assert [s.splitlines()[0] for s in scripts] == [
        f"runs/full/{r}-{s}" for r in ("pr610", "pr576") for s in (1, 2)]
    for s in scripts:
        for option in ("gpus-per-node=8", "nodes=1", "ntasks-per-node=1", "time=30", "requeue",
            "partition=h100", "account=abc"):
            assert f"#SBATCH --{option}\n" in s
        assert '"nproc": 8' in s and "submitit.core._submit" in s
    assert last_words(said) == "the same command without --dry-run hands them over"


@pytest.mark.parametrize("args, words", [
    (["--gpus", 8], ["--gpus", "--on slurm"]),
    (["--on", "cloud"], ["--on cloud", "here or slurm"]),
    (["--on", "slurm", "--gpus", -1], ["--gpus -1"]),
    (["--on", "slurm", "--nodes", 0], ["--nodes 0"]),
    (["--on", "slurm", "--nodes", 3], ["3 machine(s)", "num_spans="]),
    (["--on", "slurm", "--gpus", 2, "--nproc", 4], ["nproc=4", "--gpus 2"]),
    (["--on", "slurm", "--sbatch", "account"], ["write field=value"]),
])
def test_what_no_cluster_could_run_is_refused(main, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = main("batch", "pr610", *args)
    assert code == 1 and all(w in err for w in words), err
    assert not list(tmp_path.iterdir())


def test_cards_become_processes_unless_the_plan_says_otherwise():
    plan = make_plan(["pr610", dict(recipe="pr576", nproc=2)], scale="full")
    assert [r.nproc for r in with_cards(plan, Request(gpus=4, nodes=2))] == [4, 2]
    assert with_cards(plan, Request()) == plan


# ---- in the queue

@pytest.mark.slow
def test_two_jobs_at_once_are_cut_off_and_go_on(slurm, notebooks, novels, here, tmp_path):
    "One is put back by the cluster, the other is warned of the end of its minutes."
    out, seeds = tmp_path/"runs", (1, 2)
    longer = ("-o", "iterations=100")
    child = start_pgolf(*words(notebooks, novels, out, "pr576", "--seeds", *seeds, *longer))
    folders = [out/"tiny"/f"pr576-iterations=100-{s}" for s in seeds]
    logs = [f/"metrics.jsonl" for f in folders]
    wait_until(lambda: all(p.exists() and '"loss"' in p.read_text() for p in logs), child)
    jobs = [job_of(f) for f in folders]
    assert [queue()[j] for j in jobs] == ["RUNNING"]*2
    slurm_says("scontrol", "requeue", jobs[0])
    slurm_says("scancel", "--signal=USR2", jobs[1])
    for j in jobs: goes_on(j, child)
    alone = [tmp_path/f"alone-{s}" for s in seeds]
    undisturbed = [start_pgolf("run", "pr576", "--scale", "tiny", "--corpus", novels.path,
        "--device", "cpu", "--seed", s, "--eval-tokens", 512, "--out", to, *longer)
        for to, s in zip(alone, seeds)]
    said, err = child.communicate(timeout=HANG)
    assert child.returncode == 0, err
    assert "over seeds" in said and "pr576-iterations=100" in said
    for f, to, other in zip(folders, alone, undisturbed):
        assert Report.load(f/"report.json").complete
        log = (f/"run.log").read_text()
        assert log.index("checkpoint: False") < log.index("checkpoint: True")
        assert read_json(f/"slurm"/"ended.json") == dict(job=job_of(f), code=0)
        assert job_of(f) in jobs
        _, err = other.communicate(timeout=HANG)
        assert other.returncode == 0, err
        assert losses(f).tolist() == losses(to).tolist(), "as if nobody had disturbed it"


@pytest.mark.slow
def test_a_failed_job_is_named_with_the_end_of_its_log(slurm, notebooks, novels, here, tmp_path):
    out = tmp_path/"runs"
    args = words(notebooks, novels, out, "pr610", "--seeds", 1, 3)
    code, said, err = run_pgolf(*args)
    assert code == 1 and "Traceback (most recent call last)" not in err, err
    last = err.splitlines()[-1]
    assert last.startswith("pgolf: error: 1 of 2 run(s) finished; failed: ")
    assert "ValueError: the third seed fails" in last and str(out/"tiny"/"pr610-3") in last
    assert "3.0000" in said, "the other one is on the board"
    code, _, err = run_pgolf(*args)
    assert code == 0 and "1 finished before" in err, err


@pytest.mark.slow
def test_jobs_stay_when_the_batch_is_left(slurm, notebooks, novels, here, tmp_path):
    out = tmp_path/"runs"
    args, run = words(notebooks, novels, out, "pr610", "--seeds", 9), out/"tiny"/"pr610-9"
    child = start_pgolf(*args)
    wait_until((run/"again").exists, child)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=HANG)
    job = job_of(run)
    assert child.returncode == 130 and f"still in the queue: {job}; `scancel {job}`" in err, err
    assert queue() == {job: "RUNNING"}
    child = start_pgolf(*args)
    while "as jobs of Slurm" not in (line := child.stderr.readline()): assert line
    assert queue() == {job: "RUNNING"}, "the same job is watched, and no other one handed over"
    slurm_says("scancel", job)
    _, err = child.communicate(timeout=HANG)
    assert child.returncode == 130 and job_of(run) == job, err
    assert "interrupted" in (run/"run.log").read_text().splitlines()[-1]
    code, _, err = run_pgolf(*args)
    assert code == 0 and Report.load(run/"report.json").complete and job_of(run) != job, err


@pytest.mark.slow
def test_slurm_refuses_in_its_own_words(slurm, notebooks, novels, here, tmp_path):
    out = tmp_path/"runs"
    code, _, err = run_pgolf(*words(notebooks, novels, out, "pr610", "--partition", "nowhere"))
    assert code == 1 and "invalid partition" in err.splitlines()[-1].lower(), err
    assert queue() == {}
    assert not (out/"tiny"/"pr610-1337"/"slurm"/"job.json").exists()
