"""Folders as the field makes them: published logs, fields of any shape, scripts that unpack
themselves; nothing in them is executed."""

import ast
import base64
import json
import lzma
import os
import shutil
import zlib

import brotli
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pgolf.submit import doctor
from pgolf.submit import logs as readlogs
from pgolf.submit import survey
from pgolf.submit import unwrap

FACTS = dict(author="A", github_id="a", name="n", blurb="b", date="2026-03-18T14:56:29Z",
    val_loss=2.07, val_bpb=1.2243, bytes_total=15863489, bytes_code=26)
LOG = """seed:1337
step:13780/20000 train_loss:2.0606 train_time:600038ms step_avg:43.54ms
Serialized model int8+zlib: 15863463 bytes
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip_exact val_loss:2.07000000 val_bpb:1.22430000
"""
INNER = "import torch,brotli,flash_attn_interface\nprint(1)\n"


def write(folder, facts=FACTS, log=LOG, script="import torch\nprint(torch)\n", **files):
    "A folder of few lines; a file that is None is left out."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    facts = facts if isinstance(facts, str) else json.dumps(facts)
    texts = {"submission.json": facts, "train.log": log, "train_gpt.py": script,
        "README.md": "x", "requirements.txt": "torch\n"}
    for name, text in (texts | files).items():
        if text is not None: (folder/name).write_text(text)
    return folder


@pytest.fixture
def make(tmp_path): return lambda **kw: write(tmp_path/"track_10min_16mb"/"folder", **kw)


def status(folder): return {c.check: c.status for c in doctor.doctor(folder)}
def told(folder): return {c.check for c in doctor.doctor(folder) if c.status in ("warn", "fail")}


def test_a_folder_in_the_form_of_march_is_contradicted_nowhere(tmp_path, main):
    folder = write(tmp_path/"folder")
    code, said, err = main("doctor", folder)
    assert code == 0 and "FAIL" not in said, said + err
    found = status(folder)
    assert "fail" not in found.values()
    for check in ("date", "claimed bytes", "val_bpb", "val_loss", "training time", "bytes"):
        assert found[check] == "ok", check
    assert found["evaluation time"] == found["hardware"] == found["track"] == "unknown"


# ---- claims of any shape

ODD = [dict(seeds=3), dict(seed_results=[dict(seed=1, val_bpb=1.1)]), dict(compliance="yes"),
    dict(seed_results={"1337": 1.08}), dict(compliance=["score_first"]), dict(seeds=[[1]]),
    dict(seed_results="x"), dict(val_bpb="1.2"), dict(bytes_total=None), dict(date=7),
    dict(hardware=["H100"]), dict(track=[1]), dict(author={}), dict(val_bpb_std=10**400)]


@pytest.mark.parametrize("facts", ODD, ids=str)
def test_fields_in_other_shapes_are_findings(make, main, facts):
    code, said, err = main("doctor", make(facts=FACTS | facts))
    assert "Traceback" not in said + err and code in (0, 1) and said
    assert doctor.verdict(doctor.doctor(make(facts=FACTS | facts))) in ("warn", "fail")


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NAMES = st.sampled_from(["1337", "seed", "val_bpb", "val_loss", "steps", "artifact_bytes", "x"])
JSON = st.recursive(LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=3),
    max_leaves=8)
FIELDS = [*FACTS, "seeds", "seed", "seed_results", "seed_scores", "compliance", "track", "hardware",
    "val_bpb_std", "mean_bpb", "artifact_bytes_mean", "run_name", "gpu"]
SHARED_FOLDER = [HealthCheck.function_scoped_fixture] # it is written anew for each example


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON)
def test_claims_of_any_json_can_be_read(value):
    claims = readlogs.read_claims(readlogs.parse_json(json.dumps(value)))
    assert isinstance(claims, readlogs.Claims)


@settings(max_examples=100, deadline=None, suppress_health_check=SHARED_FOLDER)
@given(value=st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON, complete=st.booleans())
def test_any_json_ends_in_a_verdict_that_can_be_printed(make, value, complete):
    "The command prints what `report_text` gives, in UTF-8, on a terminal."
    facts = FACTS | value if complete and isinstance(value, dict) else value
    found = doctor.doctor(make(facts=json.dumps(facts)))
    text = doctor.report_text(found, 80)
    assert doctor.verdict(found) in doctor.STATUS and text.encode()
    assert all(c == "\n" or c.isprintable() for c in text)


@pytest.mark.parametrize("text", ["", "{", "[", "nul", "\x00", "[[["*9999, '{"a": 1e999}',
    '{"val_bpb": 1'+"0"*5000+"}", '{"date": "\\ud800\\u001b[2J"}', '"\\ud800"', "\ufeff{}"],
    ids=range(11))
def test_what_is_no_json_and_what_hardly_is(make, main, text):
    code, said, err = main("doctor", make(facts=text))
    assert code == 1 and "fail: " in said and "Traceback" not in said + err


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(LOG.splitlines()) | st.text(max_size=30)).map("\n".join))
def test_logs_of_any_text_can_be_read(text):
    assert isinstance(readlogs.read_any(text), readlogs.Log)


# ---- scripts that unpack themselves

RAW = [dict(id=lzma.FILTER_LZMA2)]
CODECS = dict(lzma=lzma.compress, zlib=zlib.compress, brotli=brotli.compress)
BASES = dict(b85=base64.b85encode, b64=base64.b64encode)


def packed(source):
    "A script in the form of the records of April."
    data = base64.b85encode(lzma.compress(source.encode(), lzma.FORMAT_RAW, filters=RAW)).decode()
    return ("import lzma as L,base64 as B\n"
        f'exec(L.decompress(B.b85decode("{data}"),format=L.FORMAT_RAW,filters={RAW}))\n')


def packed_by(codec, base, source):
    "A script in any of the usual forms."
    data = BASES[base](CODECS[codec](source.encode())).decode()
    return f"import {codec},base64\nexec({codec}.decompress(base64.{base}decode({data!r})))\n"


def test_a_script_that_unpacks_itself_is_looked_into(make, main):
    folder = make(script=packed(INNER), **{"requirements.txt": "numpy\n"})
    found = {c.check: c for c in doctor.doctor(folder)}
    assert "brotli" in found["imports"].detail and "flash_attn_interface" in found["imports"].detail
    assert found["requirements"].status == "fail" and "brotli" in found["requirements"].detail
    assert main("doctor", folder)[0] == 1


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_is_unpacked_and_nothing_is_executed(make, tmp_path, codec, base):
    mark = tmp_path/"mark"
    source = f"import scipy\nopen({str(mark)!r}, 'w').write('x')\n"
    found = {c.check: c for c in doctor.doctor(make(script=packed_by(codec, base, source)))}
    assert found["script"].status == "ok" and "scipy" in found["imports"].detail
    assert "scipy" in found["requirements"].detail and not mark.exists()


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_payload_is_said(make, codec):
    script = packed_by(codec, "b64", INNER*50)
    data = script.split("'")[1]
    for bad in (data[:len(data)//8*4], data[:8]+data[8:16].swapcase()+data[16:]):
        found = status(make(script=script.replace(data, bad)))
        assert found["script"] == "fail" and found["imports"] == "unknown"


def test_what_brotli_packed_cannot_be_seen_without_it(make, monkeypatch):
    monkeypatch.setattr(unwrap, "brotli", None)
    found = {c.check: c for c in doctor.doctor(make(script=packed_by("brotli", "b85", INNER)))}
    assert found["script"].status == "fail" and "not installed" in found["script"].detail
    assert found["imports"].status == "unknown" and "cannot be seen" in found["imports"].detail


def test_nothing_of_a_folder_is_executed(make, tmp_path):
    mark = tmp_path/"mark"
    evil = f"open({str(mark)!r}, 'w').write('x')\n"
    direct = f"exec(open({str(mark)!r}, 'w').write('x') or '1')"
    for script in (evil, direct, packed(evil), packed(packed(evil)), packed(direct)):
        doctor.doctor(make(script=script, **{"helper.py": evil}))
    assert not mark.exists()


def test_what_cannot_be_seen_is_said(make):
    found = status(make(script="import os\nexec(os.environ['X'])"))
    assert found["script"] == "fail" and found["imports"] == "unknown"


DEEP = ["x = "+"-"*400+"1", "x = "+"("*5000+")"*5000, "x = "+"+".join(["1"]*900),
    "x = a"+".b"*900, "if a: pass\n"+"elif a: pass\n"*300, "exec("+"+".join(["'1'"]*140)+")"]


@pytest.mark.parametrize("script", DEEP, ids=range(len(DEEP)))
def test_a_script_of_any_depth_ends_in_a_verdict(make, script):
    for text in (script, packed(script)):
        assert doctor.verdict(doctor.doctor(make(script=text, **{"helper.py": script})))


def test_layers_and_limits():
    assert unwrap.unwrap(packed(packed("import torch\n"))).text == "import torch\n"
    deep = "x = 1\n"
    for _ in range(unwrap.DEPTH+2): deep = packed(deep)
    assert unwrap.unwrap(deep).unseen
    many = unwrap.unwrap("exec('x = 1')\n"*1000)
    assert len(many.layers) <= unwrap.PARTS+1


# ---- what a validator proposed in public looks at (PR 683), written anew from its description

def simple_checks(folder):
    "Its complaints: location, files, log, fields and their kinds, syntax, total size."
    names = {p.name for p in folder.iterdir()}
    scripts = [n for n in names if n.startswith("train_gpt") and n.endswith(".py")]
    wrong = set() if folder.parent.name.startswith("track_") else {"location"}
    wrong |= {n for n in ("README.md", "submission.json") if n not in names}
    if not scripts: wrong.add("script")
    if not any("train" in n and n.endswith((".log", ".txt")) for n in names): wrong.add("log")
    try: facts = json.loads((folder/"submission.json").read_text())
    except (OSError, ValueError): facts = None
    if not isinstance(facts, dict): return wrong | {"json"}
    score = facts.get("val_bpb", facts.get("mean_val_bpb"))
    if isinstance(score, bool) or not isinstance(score, (int, float)): wrong.add("val_bpb")
    if not isinstance(facts.get("name", facts.get("run_name")), str): wrong.add("name")
    if not isinstance(facts.get("date"), str): wrong.add("date")
    for n in scripts:
        try: ast.parse((folder/n).read_text())
        except SyntaxError: wrong.add("syntax")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return wrong | ({"size"} if size > 16_000_000 else set())


OURS = {"location": "track", "README.md": "files", "submission.json": "files", "json": "files",
    "script": "files", "log": "logs", "val_bpb": "fields", "name": "fields", "date": "fields",
    "syntax": "script", "size": "folder size"} # what it finds -> ours


def without(*fields): return dict(facts={k: v for k, v in FACTS.items() if k not in fields})
def claiming(**kw): return dict(facts=FACTS | kw)


SIMPLE = [({"README.md": None}, "README.md"), ({"submission.json": None}, "submission.json"),
    ({"train_gpt.py": None}, "script"), ({"train.log": None}, "log"), (dict(facts="{"), "json"),
    (dict(facts="[1]"), "json"), (without("val_bpb"), "val_bpb"), (without("name"), "name"),
    (without("date"), "date"), (claiming(val_bpb="1.1"), "val_bpb"),
    (claiming(date=20260318), "date"),
    (claiming(name=None), "name"), (dict(script="def f(:\n"), "syntax"),
    ({"model.npz": "x"*16_000_001}, "size")]


@pytest.mark.parametrize("change,finding", SIMPLE,
    ids=[f"{f}-{i}" for i, (_, f) in enumerate(SIMPLE)])
def test_what_the_simple_validator_finds_is_found(make, change, finding):
    assert not simple_checks(make())
    good = told(make())
    folder = make(**change)
    assert finding in simple_checks(folder)
    ours = told(folder) - good
    assert ours & {OURS[finding], "fields"}, ours # no object: all fields are missing
    if finding != "json": assert OURS[finding] in ours


def test_a_folder_in_another_place_is_found(tmp_path):
    folder = write(tmp_path/"elsewhere"/"folder")
    assert simple_checks(folder) == {"location"} and status(folder)["track"] == "unknown"


def public_folders():
    root = ROOT.parent/"parameter-golf"/"records" # checked out beside this repository, or not
    if not root.is_dir(): pytest.skip("the challenge's repository is not there")
    return survey.submissions(root)


def test_what_it_finds_in_public_folders_is_found():
    for folder in public_folders():
        found = status(folder)
        for complaint in simple_checks(folder):
            names = {OURS[complaint], "names", "Python"} # near names are forgiven, and told
            assert any(found.get(n, "ok") != "ok" for n in names), (folder.name, complaint)


# ---- the command

@pytest.mark.parametrize("width", [20, 30, 60, 120])
def test_output_fits_the_terminal(make, main, monkeypatch, width):
    folder = make(facts=FACTS | dict(val_bpb=1.1, hardware="8xA100", date="x"*200))
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((width, 24)))
    said = main("doctor", folder)[1]
    assert max(map(len, said.splitlines())) <= width and len(said.splitlines()) > 10


def test_command_reads_all_folders(make, main, tmp_path):
    root = tmp_path/"records"
    for name in ("one", "two"): shutil.copytree(make(), root/"track_10min_16mb"/name)
    code, said, err = main("doctor", "--all", root, "--json", tmp_path/"out.json")
    assert code == 0 and said.count("one") == 1, err
    rows = json.loads((tmp_path/"out.json").read_text())["folders"]
    assert [r["folder"] for r in rows] == ["one", "two"] and rows[0]["claimed_bpb"] == 1.2243
    assert main("doctor", "--all", tmp_path/"none")[0] == 1
    assert main("doctor", root/"track_10min_16mb"/"one", "--json", tmp_path/"no"/"out.json")[0] == 1


def test_the_table_of_public_folders_holds_names_and_numbers_alone():
    table = json.loads((ROOT/"nbs"/"results"/"doctor-public.json").read_text())
    assert len(table["folders"]) == 60 and len(table["commit"]) == 40
    for row in table["folders"]:
        assert row["verdict"] in doctor.STATUS and sum(row["counts"].values()) >= 5
        texts = {k for k, v in row.items() if isinstance(v, str)}
        assert texts == {"folder", "track", "verdict"}
