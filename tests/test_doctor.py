"Folders as the field makes them: published logs, fields of any shape, scripts that unpack themselves; nothing in them is executed."
import base64
import json
import lzma
import shutil

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from pgolf import doctor, readlogs, unwrap

FACTS = dict(author="A", github_id="a", name="n", blurb="b", date="2026-03-18T14:56:29Z", val_loss=2.07, val_bpb=1.2243, bytes_total=15863489, bytes_code=26)
LOG = """seed:1337
step:13780/20000 train_loss:2.0606 train_time:600038ms step_avg:43.54ms
Serialized model int8+zlib: 15863463 bytes
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip_exact val_loss:2.07000000 val_bpb:1.22430000
"""


@pytest.fixture
def make(tmp_path):
    "A folder of few lines: `make(log=..., script=...)`."
    def build(facts=FACTS, log=LOG, script="import torch\nprint(torch)\n", **files):
        folder = tmp_path/"folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        texts = {"submission.json": facts if isinstance(facts, str) else json.dumps(facts), "train.log": log, "train_gpt.py": script, "README.md": "x", "requirements.txt": "torch\n"}
        for name, text in (texts | files).items(): (folder/name).write_text(text)
        return folder
    return build


def status(folder): return {c.check: c.status for c in doctor.doctor(folder)}


def test_a_folder_in_the_form_of_march_is_contradicted_nowhere(make, main):
    code, said, err = main("doctor", make())
    assert code == 0 and "FAIL" not in said, said + err
    found = status(make())
    assert "fail" not in found.values()
    for check in ("date", "claimed bytes", "val_bpb", "val_loss", "training time", "bytes"): assert found[check] == "ok", check
    assert found["evaluation time"] == found["hardware"] == "unknown"


@pytest.mark.parametrize("facts", [dict(seeds=3), dict(seed_results=[dict(seed=1, val_bpb=1.1)]), dict(seed_results={"1337": 1.08}), dict(compliance=["score_first"]), dict(compliance="yes"),
    dict(seeds=[[1]]), dict(seed_results="x"), dict(val_bpb="1.2"), dict(bytes_total=None), dict(date=7), dict(hardware=["H100"]), dict(track=[1]), dict(author={}), dict(val_bpb_std=10**400)])
def test_fields_in_other_shapes_are_findings(make, main, facts):
    code, said, err = main("doctor", make(FACTS | facts))
    assert "Traceback" not in said + err and code in (0, 1) and said
    assert doctor.verdict(doctor.doctor(make(FACTS | facts))) in ("warn", "fail")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["1337", "seed", "val_bpb", "steps"]), x, max_size=3), max_leaves=8)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*FACTS, "seeds", "seed_results", "compliance", "seed_scores", "val_bpb_std"]), JSON) | JSON)
def test_claims_of_any_json_can_be_read(value):
    assert isinstance(readlogs.read_claims(readlogs.parse_json(json.dumps(value))), readlogs.Claims)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(LOG.splitlines()) | st.text(max_size=30)).map("\n".join))
def test_logs_of_any_text_can_be_read(text): assert isinstance(readlogs.read_any(text), readlogs.Log)


def packed(source):
    "A script in the form of the records of April."
    filters = [dict(id=lzma.FILTER_LZMA2)]
    data = base64.b85encode(lzma.compress(source.encode(), format=lzma.FORMAT_RAW, filters=filters)).decode()
    return f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{data}"),format=L.FORMAT_RAW,filters=[{{"id":L.FILTER_LZMA2}}]))\n'


def test_a_script_that_unpacks_itself_is_looked_into(make, main):
    folder = make(script=packed("import torch,brotli,flash_attn_interface\nprint(1)\n"), **{"requirements.txt": "numpy\n"})
    found = {c.check: c for c in doctor.doctor(folder)}
    assert "brotli" in found["imports"].detail and "flash_attn_interface" in found["imports"].detail
    assert found["requirements"].status == "fail" and "brotli" in found["requirements"].detail
    assert main("doctor", folder)[0] == 1


def test_nothing_of_a_folder_is_executed(make, tmp_path):
    mark = tmp_path/"mark"
    evil = f"open({str(mark)!r}, 'w').write('x')\n"
    for script in (evil, packed(evil), f"exec(open({str(mark)!r}, 'w').write('x') or '1')", packed(packed(evil))): doctor.doctor(make(script=script))
    assert not mark.exists()


def test_what_cannot_be_seen_is_said(make):
    found = status(make(script="import os\nexec(os.environ['X'])"))
    assert found["script"] == "fail" and found["imports"] == "unknown"


@pytest.mark.parametrize("width", [30, 60, 120])
def test_output_fits_the_terminal(make, width):
    text = doctor.report_text(doctor.doctor(make(FACTS | dict(val_bpb=1.1, hardware="8xA100"))), width)
    assert max(map(len, text.splitlines())) <= width


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


def test_layers_and_limits(tmp_path):
    assert unwrap.unwrap(packed(packed("import torch\n"))).text == "import torch\n"
    deep = "x = 1\n"
    for _ in range(unwrap.DEPTH+2): deep = packed(deep)
    assert unwrap.unwrap(deep).unseen
