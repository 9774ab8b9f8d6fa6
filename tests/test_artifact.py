"The artifact container against damage, hostile files and a full disk."
import copy
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf import artifact
from pgolf.artifact import ArtifactError, family, ledger, load_artifact, pack, save_artifact, unpack
from pgolf.entropy import encode
from pgolf.quant import Quantized


def example():
    gen = torch.Generator().manual_seed(0)
    codes = [torch.randint(-31, 32, (24, 16), generator=gen).to(torch.int8) for _ in range(3)]
    tensors = {f"blocks.{i}.mlp.fc.weight": Quantized(c, torch.rand(24, 1, generator=gen).half()) for i, c in enumerate(codes)}
    return tensors | {"tok_emb.weight": Quantized(codes[0], torch.rand(1, 1).half()), "skip_weights": torch.randn(2, 16).half(),
                      "blocks.0.attn_scale": torch.randn(16), "bigram.scale": torch.tensor(.5), "table": torch.randn(5, 3).bfloat16(), "none": torch.zeros(0, 4)}


DATA = pack(example(), dict(system="test", seeds=[1, 2]))
RANS = pack(example(), dict(system="test", seeds=[1, 2]), codec="rans")
BOTH = pytest.mark.parametrize("data", [DATA, RANS], ids=["zstd", "rans"])


def same(a, b):
    if isinstance(a, Quantized): return isinstance(b, Quantized) and torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    return a.dtype == b.dtype and torch.equal(a, b)


@BOTH
def test_every_single_byte_flip_is_refused(data):
    rand = random.Random(1)
    for i in range(len(data)):
        with pytest.raises(ArtifactError): unpack(data[:i] + bytes([data[i] ^ rand.randrange(1, 256)]) + data[i+1:])


@BOTH
def test_every_truncation_and_extension_is_refused(data):
    for i in range(len(data)):
        with pytest.raises(ArtifactError): unpack(data[:i])
    with pytest.raises(ArtifactError, match="extended"): unpack(data + b"\0")


DTYPES = st.sampled_from(list(artifact.DTYPES.values()))


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=12), st.tuples(DTYPES, st.lists(st.integers(0, 5), max_size=4)), max_size=5), st.integers(0, 99))
def test_any_tensors_come_back(spec, seed):
    gen = torch.Generator().manual_seed(seed)
    tensors = {n: (100*torch.rand(s, generator=gen)).to(d) for n, (d, s) in spec.items()}
    data = pack(tensors, dict(seed=seed), level=1)
    back, meta = unpack(data)
    assert meta == dict(seed=seed) and set(back) == set(tensors) and all(same(t, back[n]) for n, t in tensors.items())
    assert sum(r.stored for r in ledger(data)) == len(data)


def test_special_floats_keep_their_bits():
    t = torch.tensor([float("nan"), float("inf"), -0., 1e-45])
    assert torch.equal(unpack(pack(dict(t=t)))[0]["t"].view(torch.int32), t.view(torch.int32))


def parts(data=DATA):
    "Header, stored payload and unpacked size of the example."
    head, body, size = artifact._open(data, 2**30)
    return json.loads(head), body, size


def reseal(header, body, size):
    "An artifact with another header whose checksum is right: what an attacker would write."
    return artifact._seal(header, body, size)


@BOTH
def test_reseal_of_the_same_is_the_same(data):
    assert reseal(*parts(data)) == data


BAD = dict(name=[7, None, "tok_emb.weight"], kind=["code", 3], dtype=["complex64", "object", 1], length=[-1, 0, 2**62, True], offset=[-1, 3, 2**62],
           shape=[[-1, -1], [2**70], [1.5], "24", [2]*9, [24, 17]], crc32=[0, "x"])


@pytest.mark.parametrize("field,value", [(f, v) for f, vs in BAD.items() for v in vs])
def test_a_hostile_record_is_refused(field, value):
    header, body, size = parts()
    header["frames"][0]["tensors"][1][field] = value
    with pytest.raises(ArtifactError): unpack(reseal(header, body, size))


@pytest.mark.parametrize("change", [
    lambda h: h.pop("meta"), lambda h: h.update(extra=1), lambda h: h.update(frames={}), lambda h: h.update(meta=[]),
    lambda h: h["frames"].pop(), lambda h: h["frames"].append(dict(stored=0, tensors=[])) or h["frames"][0].update(stored=1),
    lambda h: h["frames"][0].update(stored=-5), lambda h: h["frames"][0].update(stored=2**60), lambda h: h["frames"][0]["tensors"].pop(),
    lambda h: h["frames"].reverse(), lambda h: h["frames"].append(copy.deepcopy(h["frames"][0]))])
def test_a_hostile_header_is_refused(change):
    header, body, size = parts()
    change(header)
    with pytest.raises(ArtifactError): unpack(reseal(header, body, size))


def test_deep_json_is_refused(monkeypatch):
    _, body, size = parts()
    monkeypatch.setattr(artifact.json, "dumps", lambda *a, **k: "["*200_000)
    data = reseal({}, body, size)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="JSON"): unpack(data)


def test_codes_without_scale_are_refused():
    header, body, size = parts()
    for f in header["frames"]:
        for r in f["tensors"]:
            if r["kind"] == "scale": r["kind"] = "tensor"
    with pytest.raises(ArtifactError, match="codes and scale|parts"): unpack(reseal(header, body, size))


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = zstandard.compress(bytes(2**26))
    record = dict(name="x", kind="tensor", dtype="uint8", shape=[8], offset=0, length=8, crc32=0)
    with pytest.raises(ArtifactError, match="frame"): unpack(reseal(dict(meta={}, frames=[dict(stored=len(bomb), tensors=[record])]), bomb, 8))
    with pytest.raises(ArtifactError, match="limit"): unpack(reseal(dict(meta={}, frames=[]), bomb, 2**40))
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(8))
    with pytest.raises(ArtifactError, match="frame"): unpack(reseal(dict(meta={}, frames=[dict(stored=len(endless), tensors=[record])]), endless, 8))


def test_same_weights_same_file_in_another_process(tmp_path):
    save_artifact(tmp_path/"a", example_fixed())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom pgolf.artifact import *\nt, m = load_artifact({str(tmp_path/'a')!r})\nsave_artifact({str(tmp_path/'b')!r}, t, m)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path/"a").read_bytes() == (tmp_path/"b").read_bytes()


def example_fixed(): return unpack(DATA)[0]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix thing")
def test_a_full_disk_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path/"model.pgolf"
    save_artifact(path, dict(x=torch.zeros(3)))
    before = path.read_bytes()
    code = f"""
import resource, signal, torch
from pgolf.artifact import save_artifact
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)) # the system refuses to let a file grow beyond this
try: save_artifact({str(path)!r}, dict(x=torch.randn(10_000)))
except OSError as e: print("refused", e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "refused" in done.stdout and "while writing" in done.stdout and "model.pgolf" in done.stdout and "free some space" in done.stdout
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.pgolf"]


def test_errors_name_the_file(tmp_path):
    path = tmp_path/"broken.pgolf"
    path.write_bytes(DATA[:-1])
    with pytest.raises(ArtifactError, match="broken.pgolf.*truncated"): load_artifact(path)
    with pytest.raises(ArtifactError, match="absent.pgolf"): load_artifact(tmp_path/"absent.pgolf")
    with pytest.raises(ArtifactError, match="limit=10"): load_artifact(path, limit=10)


def test_ledger_is_measured_by_layer_kind():
    rows = ledger(DATA)
    header, _, _ = parts()
    stored = {family(f["tensors"][0]["name"])+f["tensors"][0]["kind"]: f["stored"] for f in header["frames"]}
    for key, n in stored.items(): assert sum(r.stored for r in rows if family(r.name)+r.kind == key) == n
    assert sum(r.stored for r in rows) == len(DATA) and rows[-1].name == "container"


# ---- codes stored by rANS

@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), max_size=4), alike=st.booleans(), top=st.integers(0, 127), seed=st.integers(0, 99), codec=st.sampled_from(artifact.CODECS))
def test_any_codes_come_back(shapes, alike, top, seed, codec):
    gen = torch.Generator().manual_seed(seed)
    if alike: shapes = shapes[:1]*len(shapes)
    tensors = {f"blocks.{i}.fc": Quantized(torch.randint(-top, top+1, s, generator=gen).to(torch.int8), torch.rand(s[0], 1, generator=gen).half()) for i, s in enumerate(shapes)}
    data = pack(tensors, level=1, codec=codec)
    back, _ = unpack(data)
    assert set(back) == set(tensors) and all(same(t, back[n]) for n, t in tensors.items())
    assert pack(back, level=1, codec=codec) == data and sum(r.stored for r in ledger(data)) == len(data)


def test_only_codes_are_stored_by_rans_and_best_is_the_smaller():
    header, _, _ = parts(RANS)
    for f in header["frames"]: assert ("codec" in f) == (f["tensors"][0]["kind"] == "codes")
    best, _, _ = parts(pack(example(), codec="best"))
    zstd, _, _ = parts(pack(example()))
    assert [f["stored"] for f in best["frames"]] == [min(a["stored"], b["stored"]) for a, b in zip(header["frames"], zstd["frames"])]


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="codec='zip'"): pack(example(), codec="zip")
    for value in ("zstd", "zip", 3, None, ["rans"]):
        header, body, size = parts(RANS)
        header["frames"][0]["codec"] = value
        with pytest.raises(ArtifactError, match="codec"): unpack(reseal(header, body, size))
    header, body, size = parts(RANS)
    del header["frames"][0]["codec"]
    with pytest.raises(ArtifactError, match="frame 0"): unpack(reseal(header, body, size))
    header, body, size = parts(DATA)
    header["frames"][0]["codec"] = "rans"
    with pytest.raises(ArtifactError, match="frame 0"): unpack(reseal(header, body, size))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_forged_stream_is_refused_or_caught_by_the_checksum_of_its_codes(data):
    "The file's checksum is right, the stream is not: what an attacker would write."
    header, body, size = parts(RANS)
    frames = [f for f in header["frames"] if "codec" in f]
    at = data.draw(st.integers(0, sum(f["stored"] for f in frames)-1))
    bad = body[:at]+bytes([body[at]^data.draw(st.integers(1, 255))])+body[at+1:]
    with pytest.raises(ArtifactError): unpack(reseal(header, bad, size))


def test_a_stream_of_another_size_or_type_is_refused():
    for symbols in (np.zeros(9, np.int8), np.zeros(8, np.uint8), np.zeros(0, np.int8), np.zeros((2**20,), np.int8)):
        stream = encode(symbols)
        record = dict(name="x", kind="tensor", dtype="int8", shape=[8], offset=0, length=8, crc32=0)
        with pytest.raises(ArtifactError, match="frame 0"): unpack(reseal(dict(meta={}, frames=[dict(stored=len(stream), tensors=[record], codec="rans")]), stream, 8))
