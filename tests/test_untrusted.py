"""`import`, `doctor`, `score`, `audit` execute nothing of their input; `bench --peer` asks first.

An audit hook of Python hears of everything that is started, executed or opened."""
import json
import os
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/"tests"/"campaign"))
import guard  # noqa: E402
import mutate  # noqa: E402
import small  # noqa: E402
import test_doctor  # noqa: E402
from test_formats import own_model, saved  # noqa: E402

# whatever executes it leaves a file behind
CANARY = "open('executed', 'w').close()\n"


@pytest.fixture(scope="module", autouse=True)
def hook(): guard.install(more=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A finished run and its data."
    path = tmp_path_factory.mktemp("base")
    small.finished(path/"run", small.dataset(path/"data"))
    return path


@pytest.fixture
def home(base, tmp_path, monkeypatch):
    "A copy of both, with modules that nobody should import, to work in."
    shutil.copytree(base, tmp_path/"home")
    near = tmp_path/"home"/"data"/"datasets"/"data"
    about = json.loads((base/"run"/"data.json").read_text()) | dict(path=str(near))
    (tmp_path/"home"/"run"/"data.json").write_text(json.dumps(about))
    for name in ("sitecustomize.py", "brotli.py", "conftest.py", "flash_attn_interface.py"):
        (tmp_path/"home"/name).write_text(CANARY)
    monkeypatch.chdir(tmp_path/"home")
    return tmp_path/"home"


@pytest.fixture
def quietly(main, home):
    "A command under watch: its outcome; whatever else it did is an error."
    def call(*args):
        with guard.watching(home, 300) as seen: outcome = main(*args)
        assert not seen and not list(home.rglob("executed")), (seen, outcome)
        assert "Traceback" not in outcome[2]
        return outcome
    return call


def refused(outcome): assert outcome[0] == 1 and outcome[2].count("pgolf: error: ") == 1, outcome


@pytest.mark.parametrize("evil", range(len(mutate.EVILS)))
def test_import_runs_no_pickle(evil, home, quietly):
    plain = saved({k: v for k, v in own_model("pr610").state_dict().items() if "smear" in k})
    members = [(n, mutate.EVILS[evil] if n.endswith("data.pkl") else d)
        for n, d in mutate.members_of(plain)]
    (home/"model.bin").write_bytes(mutate.archive(members))
    refused(quietly("import", home/"model.bin"))
    (home/"model.bin").write_bytes(mutate.EVILS[evil])
    refused(quietly("import", home/"model.bin"))


def submission(home, script=CANARY):
    "A folder full of programs, links and pipes."
    folder = test_doctor.write(home/"folder", script=script, **{n: CANARY for n in ("setup.py",
        "sitecustomize.py", "helper.py", "torch.py", "eval.sh")})
    (home.parent/"outside.log").write_text(test_doctor.LOG.replace("1.2243", "0.9999"))
    (folder/"linked.log").symlink_to(home.parent/"outside.log")
    (folder/"up").symlink_to(home.parent)
    os.mkfifo(folder/"pipe.log")
    return folder


@pytest.mark.parametrize("script", [CANARY, "import helper\n"+CANARY, f"exec({CANARY!r})",
    f"exec(compile({CANARY!r}, 'x', 'exec'))", "exec(open('linked.log').read())",
    "exec(open('../../outside.log').read())", "import runpy\nrunpy.run_path('helper.py')",
    f"__import__('os').system('touch executed')\neval({CANARY!r})"], ids=range(8))
def test_doctor_runs_no_script_and_follows_no_link(script, home, quietly):
    folder = submission(home, script)
    code, said, _ = quietly("doctor", folder)
    assert code in (0, 1) and "0.9999" not in said
    quietly("doctor", home, "--all")


def test_doctor_reads_no_endless_log(home, quietly):
    folder = submission(home)
    with open(folder/"train2.log", "wb") as f: f.truncate(2**40)
    code, _, err = quietly("doctor", folder)
    assert code == 1 and "train2.log has 1,099,511,627,776 bytes" in err


def test_score_and_audit_run_nothing_of_a_run(home, quietly):
    assert quietly("score", "run", "--tokens", 64, "--quiet", "--save", "s.npz", "--corpus",
        home/"data")[0] == 0
    assert quietly("audit", "run", "--places", 1, "--corpus", home/"data")[0] in (0, 1)


@pytest.mark.parametrize("name", ["model.pgolf", "recipe.json", "report.json", "data.json",
    "scores.npz"])
@pytest.mark.parametrize("content", [mutate.EVIL, CANARY.encode(), b'{"__reduce__": ["os", "x"]}'],
    ids=["pickle", "program", "json"])
def test_a_hostile_run_is_refused(name, content, home, quietly):
    (home/"run"/name).write_bytes(content)
    refused(quietly("audit", "run", "--places", 1))
    if name != "scores.npz" and name != "report.json":
        refused(quietly("score", "run", "--tokens", 64, "--quiet"))


def test_scores_hold_no_pickle(home, quietly):
    arrays = dict.fromkeys(("nll", "bytes", "target", "position", "kind"), np.zeros(3))
    evil = np.array([type("Evil", (), dict(__reduce__=lambda s: (eval, (CANARY,))))()],
        dtype=object)
    np.savez(home/"s.npz", **arrays, about=evil)
    refused(quietly("score", home/"s.npz"))


# ---- the one command that executes what it is given

def test_a_peer_is_executed_only_by_who_says_yes(home, quietly, main):
    (home/"train_gpt.py").write_text(CANARY)
    args = ("bench", "--quick", "--scale", "tiny", "--only", "peer", "--peer", "train_gpt.py")
    outcome = quietly(*args)
    refused(outcome)
    assert "executes train_gpt.py with your rights" in outcome[2] and "--yes" in outcome[2]
    refused(main(*args, "--yes")) # it holds no model
    assert (home/"executed").exists()


@pytest.mark.parametrize("answer, ran", [("y\n", True), ("n\n", False), ("\n", False)])
def test_at_a_terminal_it_asks(answer, ran, home, main, monkeypatch):
    import io
    (home/"train_gpt.py").write_text(CANARY)
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    code, _, err = main("bench", "--quick", "--scale", "tiny", "--only", "peer", "--peer",
        "train_gpt.py")
    assert code == 1 and "read what it does first" in err and (home/"executed").exists() == ran
    assert ran or "nothing was executed" in err


# ---- lists of files

@pytest.mark.parametrize("field, name", [("model_path", "../../outside.model"),
    ("model_path", "/etc/passwd"), ("vocab_path", "..\\..\\x"), ("name", "../data")])
def test_a_manifest_leads_nowhere(field, name, home, quietly):
    path = home/"data"/"manifest.json"
    about = json.loads(path.read_text())
    about["tokenizers" if "path" in field else "datasets"][0][field] = name
    path.write_text(json.dumps(about))
    outcome = quietly("score", "run", "--tokens", 64, "--quiet", "--corpus", home/"data")
    refused(outcome)
    assert "manifest.json" in outcome[2] and "inside of the folder" in outcome[2]
    mirror = home/"mirror"/"datasets"
    shutil.copytree(home/"data", mirror)
    outcome = quietly("data", "fineweb", "--repo", home/"mirror", "--path", home/"made")
    refused(outcome)
    assert "inside of the folder" in outcome[2] and not (home.parent/"outside.model").exists()
