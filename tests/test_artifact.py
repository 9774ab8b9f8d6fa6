"The artifact container against damage, hostile files and a full disk."
import copy
import hashlib
import io
import json
import random
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.squeeze import artifact, coders
from pgolf.squeeze.artifact import (ArtifactError, family, ledger, load_artifact, pack, peek,
                                    save_artifact, squeeze, unpack)
from pgolf.squeeze.entropy import encode, entropy
from pgolf.squeeze.quant import Quantized


def example():
    gen = torch.Generator().manual_seed(0)
    codes = [torch.randint(-31, 32, (24, 16), generator=gen).to(torch.int8) for _ in range(3)]
    tensors = {f"blocks.{i}.mlp.fc.weight": Quantized(c, torch.rand(24, 1, generator=gen).half())
        for i, c in enumerate(codes)}
    return tensors | {"tok_emb.weight": Quantized(codes[0],
        torch.rand(1, 1, generator=gen).half()),
        "skip_weights": torch.randn(2, 16, generator=gen).half(),
                      "blocks.0.attn_scale": torch.randn(16, generator=gen),
                      "bigram.scale": torch.tensor(.5),
                      "table": torch.randn(5, 3, generator=gen).bfloat16(),
                      "none": torch.zeros(0, 4)}


DATA = pack(example(), dict(system="test", seeds=[1, 2]))
RANS = pack(example(), dict(system="test", seeds=[1, 2]), codec="rans")
BOTH = pytest.mark.parametrize("data", [DATA, RANS], ids=["zstd", "rans"])


def same(a, b):
    if isinstance(a, Quantized):
        return isinstance(b, Quantized) and torch.equal(a.codes,
            b.codes) and torch.equal(a.scale, b.scale)
    return a.dtype == b.dtype and torch.equal(a, b)


@BOTH
def test_every_single_byte_flip_is_refused(data):
    rand = random.Random(1)
    for i in range(len(data)):
        with pytest.raises(ArtifactError):
            unpack(data[:i] + bytes([data[i] ^ rand.randrange(1, 256)]) + data[i+1:])


@BOTH
def test_every_truncation_and_extension_is_refused(data):
    for i in range(len(data)):
        with pytest.raises(ArtifactError): unpack(data[:i])
    with pytest.raises(ArtifactError, match="extended"): unpack(data + b"\0")


DTYPES = st.sampled_from(list(artifact.DTYPES.values()))


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=12),
    st.tuples(DTYPES, st.lists(st.integers(0, 5), max_size=4)), max_size=5), st.integers(0, 99))
def test_any_tensors_come_back(spec, seed):
    gen = torch.Generator().manual_seed(seed)
    tensors = {n: (100*torch.rand(s, generator=gen)).to(d) for n, (d, s) in spec.items()}
    data = pack(tensors, dict(seed=seed), level=1)
    back, meta = unpack(data)
    assert meta == dict(seed=seed) and set(back) == set(tensors) and all(same(t, back[n])
        for n, t in tensors.items())
    assert sum(r.stored for r in ledger(data)) == len(data)


def test_special_floats_keep_their_bits():
    t = torch.tensor([float("nan"), float("inf"), -0., 1e-45])
    assert torch.equal(unpack(pack(dict(t=t)))[0]["t"].view(torch.int32), t.view(torch.int32))


def parts(data=DATA):
    "Header, stored payload and unpacked size of the example."
    head, body, size = artifact._open(data, 2**30)
    return json.loads(head), bytes(body), size


def reseal(header, body, size):
    "An artifact with another header whose checksum is right: what an attacker would write."
    return b"".join(artifact._seal(header, [body], size))


@BOTH
def test_reseal_of_the_same_is_the_same(data):
    assert reseal(*parts(data)) == data


BAD = dict(name=[7, None, "tok_emb.weight"], kind=["code", 3], dtype=["complex64", "object", 1],
    length=[-1, 0, 2**62, True], offset=[-1, 3, 2**62],
           shape=[[-1, -1], [2**70], [1.5], "24", [2]*9, [24, 17]], crc32=[0, "x"])


@pytest.mark.parametrize("field,value", [(f, v) for f, vs in BAD.items() for v in vs])
def test_a_hostile_record_is_refused(field, value):
    header, body, size = parts()
    header["frames"][0]["tensors"][1][field] = value
    with pytest.raises(ArtifactError): unpack(reseal(header, body, size))


@pytest.mark.parametrize("change", [
    lambda h: h.pop("meta"), lambda h: h.update(extra=1), lambda h: h.update(frames={}),
    lambda h: h.update(meta=[]),
    lambda h: h["frames"].pop(),
    lambda h: h["frames"].append(dict(streams=[["zstd", 0]], tensors=[])),
    lambda h: h["frames"][0]["streams"][0].__setitem__(1, -5),
    lambda h: h["frames"][0]["streams"][0].__setitem__(1, 2**60),
    lambda h: h["frames"][0]["streams"][0].append(1),
    lambda h: h["frames"][0]["streams"].append(["zstd", 0]),
    lambda h: h["frames"][0].update(streams=[]),
    lambda h: h["frames"][0].update(streams={}), lambda h: h["frames"][0].update(streams=["zstd"]),
    lambda h: h["frames"][0]["tensors"].pop(),
    lambda h: h["frames"][0].update(tensors=[]), lambda h: h["frames"].reverse(),
    lambda h: h["frames"].append(copy.deepcopy(h["frames"][0]))])
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
    with pytest.raises(ArtifactError, match="codes and scale|parts"):
        unpack(reseal(header, body, size))


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = zstandard.compress(bytes(2**26))
    record = dict(name="x", kind="tensor", dtype="uint8", shape=[8], offset=0, length=8, crc32=0)
    with pytest.raises(ArtifactError, match="frame"):
        unpack(
            reseal(dict(meta={}, frames=[dict(streams=[["zstd", len(bomb)]], tensors=[record])]),
                bomb, 8))
    with pytest.raises(ArtifactError, match="limit"):
        unpack(reseal(dict(meta={}, frames=[]), bomb, 2**40))
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(8))
    with pytest.raises(ArtifactError, match="frame"):
        unpack(
            reseal(dict(meta={},
                frames=[dict(streams=[["zstd", len(endless)]], tensors=[record])]), endless, 8))


def test_same_weights_same_file_in_another_process(tmp_path):
    save_artifact(tmp_path/"a", example_fixed())
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom pgolf.squeeze.artifact import"
        f" *\nt, m = load_artifact({str(tmp_path/'a')!r})\nsave_artifact({str(tmp_path/'b')!r},"
        " t, m)"
    )
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
from pgolf.squeeze.artifact import save_artifact
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)) # no file may grow beyond this
try: save_artifact({str(path)!r}, dict(x=torch.randn(10_000)))
except OSError as e: print("refused", e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("refused" in done.stdout and "while writing" in done.stdout
        and "model.pgolf" in done.stdout and "free some space" in done.stdout)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.pgolf"]


def test_errors_name_the_file(tmp_path):
    path = tmp_path/"broken.pgolf"
    path.write_bytes(DATA[:-1])
    with pytest.raises(ArtifactError, match="broken.pgolf.*truncated"): load_artifact(path)
    with pytest.raises(ArtifactError, match="absent.pgolf"): load_artifact(tmp_path/"absent.pgolf")
    with pytest.raises(ArtifactError, match="limit=10"): load_artifact(path, limit=10)


def test_ledger_is_exact_by_layer_kind():
    rows = ledger(DATA)
    header, _, _ = parts()
    stored = {family(f["tensors"][0]["name"])
        +f["tensors"][0]["kind"]: sum(n for _, n in f["streams"]) for f in header["frames"]}
    for key, n in stored.items():
        assert sum(r.stored for r in rows if family(r.name)+r.kind == key) == n
    assert sum(r.stored for r in rows) == len(DATA) and rows[-1].name == "container"


class Pipe(io.RawIOBase):
    "A source that cannot seek, gives a few bytes at a time and counts them."
    def __init__(self, data): self.data, self.at = data, 0
    def readable(self): return True
    def seek(self, *a): raise AssertionError("seek")
    tell = seek
    def read(self, n=-1):
        assert 0 <= n <= 2**20, "reads what it needs, in pieces"
        self.at += len(piece := self.data[self.at:self.at+min(n, 777)])
        return piece


@BOTH
def test_reading_needs_no_seek_and_stops_at_the_end(data):
    pipe = Pipe(data+data+b"rest")
    for _ in range(2):
        back, meta = load_artifact(pipe)
        assert meta["system"] == "test" and all(same(t, back[n]) for n, t in example().items())
    assert pipe.data[pipe.at:] == b"rest"
    with pytest.raises(ArtifactError, match="truncated"): load_artifact(Pipe(data[:-1]))


@BOTH
def test_peek_reads_the_header_alone(data, tmp_path):
    pipe = Pipe(data)
    meta, rows = peek(pipe)
    head = artifact._PREFIX.unpack_from(data)[3]
    assert pipe.at == artifact._PREFIX.size+head and meta == dict(system="test",
        seeds=[1, 2]) and rows == ledger(data)
    assert sum(r.raw for r in rows[:-1]) == artifact._PREFIX.unpack_from(data)[4]
    (tmp_path/"a").write_bytes(data)
    assert artifact.read_ledger(tmp_path/"a") == rows
    quiet = artifact._PREFIX.size+head
    for i in range(quiet):
        bad = data[:i]+bytes([data[i]^64])+data[i+1:]
        try: assert ledger(bad) == rows, "a bit of the compressed header that says nothing"
        except ArtifactError: quiet -= 1
    assert quiet < 9
    for bad in (data[:-1], data+b"x"):
        with pytest.raises(ArtifactError): ledger(bad)
        (tmp_path/"a").write_bytes(bad)
        with pytest.raises(ArtifactError, match="truncated or extended"): peek(tmp_path/"a")
        with pytest.raises(ArtifactError): load_artifact(tmp_path/"a")


def test_a_newer_version_and_an_older_one():
    for version, what in ((3, "newer pgolf; update"), (2**32-1, "newer pgolf"), (0, "version 0")):
        with pytest.raises(ArtifactError, match=what):
            unpack(DATA[:8]+version.to_bytes(4, "little")+DATA[12:])
    header, body, size = parts(
        pack({"x.weight": torch.arange(12).to(torch.int8), "y": torch.ones(3)}))
    for f in header["frames"]: f["stored"] = f.pop("streams")[0][1] # as version 1 wrote it
    old = reseal(header, body, size)
    old = old[:8]+(1).to_bytes(4, "little")+old[12:-32]
    assert unpack(old+hashlib.sha256(old).digest())[0]["x.weight"].tolist() == list(range(12))
    header["frames"][0]["codec"] = "rans"
    with pytest.raises(ArtifactError, match="format version 1"): unpack(reseal(header, body, size))


def test_sizes_that_lie_cost_no_memory(tmp_path):
    import tracemalloc
    path = tmp_path/"a"
    for at, n in ((24, 8), (28, 8), (12, 4), (16, 4)):
        for value in (2**28-9000, 2**31):
            path.write_bytes(DATA[:at]+value.to_bytes(n, "little")+DATA[at+n:])
            for read in (load_artifact, peek, lambda p: unpack(p.read_bytes())):
                tracemalloc.start()
                try:
                    with pytest.raises(ArtifactError): read(path)
                    assert tracemalloc.get_traced_memory()[1] < 5e6
                finally: tracemalloc.stop()


def test_hostile_values_deep_inside():
    header, body, size = parts()
    longest = next(r for f in header["frames"] for r in f["tensors"] if r["name"] == "none")
    for shape in ([0, 2**39, 2**39], [0]*9, [0, 2**70]):
        longest["shape"] = shape
        with pytest.raises(ArtifactError, match="bad shape"): unpack(reseal(header, body, size))
    longest["shape"] = [0, 4]
    for name in ("1"*5000, "x"*1000):
        longest["name"] = name
        with pytest.raises(ArtifactError, match="name of"): unpack(reseal(header, body, size))
    longest["name"] = "\ud800.1"
    assert unpack(reseal(header, body, size))[0]["\ud800.1"].shape == (0, 4)
    with pytest.raises(ValueError, match="characters"): pack({"x"*1000: torch.zeros(1)})
    data = pack(dict(b=torch.tensor([True, False])))
    header, body, size = parts(data)
    raw = bytes([1, 7]); header["frames"][0]["tensors"][0]["crc32"] = zlib.crc32(raw)
    stream = zstandard.compress(raw); header["frames"][0]["streams"] = [["zstd", len(stream)]]
    with pytest.raises(ArtifactError, match="bool"): unpack(reseal(header, stream, size))


def test_a_header_that_would_fill_memory_is_refused(monkeypatch):
    _, body, size = parts()
    monkeypatch.setattr(artifact, "HEADER_LIMIT", 2**30)
    data = reseal(dict(meta=dict(x=[[] for _ in range(3*2**19)]), frames=[]), body, size)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="header of"): unpack(data)


# ---- codes stored by rANS

@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), max_size=4),
    alike=st.booleans(), top=st.integers(0, 127), seed=st.integers(0, 99),
    codec=st.sampled_from(coders.CODECS))
def test_any_codes_come_back(shapes, alike, top, seed, codec):
    gen = torch.Generator().manual_seed(seed)
    if alike: shapes = shapes[:1]*len(shapes)
    tensors = {f"blocks.{i}.fc": Quantized(torch.randint(-top, top+1, s, generator=gen)
        .to(torch.int8), torch.rand(s[0], 1, generator=gen).half()) for i, s in enumerate(shapes)}
    data = pack(tensors, level=1, codec=codec)
    back, _ = unpack(data)
    assert set(back) == set(tensors) and all(same(t, back[n]) for n, t in tensors.items())
    assert pack(back, level=1, codec=codec) == data and sum(r.stored
        for r in ledger(data)) == len(data)


def test_what_each_codec_may_use_and_best_is_the_smallest():
    size = lambda f: sum(n for _, n in f["streams"])
    rans, zstd, best = (parts(pack(example(), codec=c))[0]["frames"]
        for c in ("rans", "zstd", "best"))
    assert all(c == "zstd" for f in zstd for c, _ in f["streams"])
    assert all(c == "rans" for f in rans for c, _ in f["streams"]
        if f["tensors"][0]["kind"] == "codes")
    assert [size(f) for f in best] == [min(size(a), size(b)) for a, b in zip(rans, zstd)]


def test_wide_numbers_are_stored_by_planes():
    gen = torch.Generator().manual_seed(0)
    t = dict(emb=torch.randn(300, 64, generator=gen).half())
    frame, = parts(pack(t, codec="best"))[0]["frames"]
    assert [n for _, n in frame["streams"]] == sorted((n for _, n in frame["streams"]),
        reverse=True) and frame["streams"][1][0] == "rans" and len(frame["streams"]) == 2
    assert len(pack(t, codec="best")) < .97*len(
        zstandard.compress(artifact._to_bytes(t["emb"]), 22))


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="codec='zip'"): pack(example(), codec="zip")
    for value in ("zip", 3, None, ["rans"], {}):
        header, body, size = parts(RANS)
        header["frames"][0]["streams"][0][0] = value
        with pytest.raises(ArtifactError, match="stream"): unpack(reseal(header, body, size))
    for data, codec in ((RANS, "zstd"), (DATA, "rans")):
        header, body, size = parts(data)
        header["frames"][0]["streams"][0][0] = codec
        with pytest.raises(ArtifactError, match="frame 0"): unpack(reseal(header, body, size))


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_forged_stream_is_refused_or_says_the_same(data):
    "The file's checksum is right, the stream is not; zstd has bits that no decoder reads."
    header, body, size = parts(RANS)
    at = data.draw(st.integers(0, len(body)-1))
    bad = body[:at]+bytes([body[at]^data.draw(st.integers(1, 255))])+body[at+1:]
    try: found = unpack(reseal(header, bad, size))
    except ArtifactError: return
    assert pack(*found, level=1) == pack(*unpack(RANS), level=1)


def test_a_stream_of_another_size_or_type_is_refused():
    for symbols in (np.zeros(9, np.int8), np.zeros(8, np.uint8), np.zeros(0, np.int8),
        np.zeros((2**20,), np.int8)):
        stream = encode(symbols)
        record = dict(name="x", kind="tensor", dtype="int8", shape=[8], offset=0, length=8, crc32=0)
        with pytest.raises(ArtifactError, match="frame 0|checksum"):
            unpack(
                reseal(dict(meta={},
                    frames=[dict(streams=[["rans", len(stream)]], tensors=[record])]), stream, 8))


# ---- the systems

@pytest.mark.parametrize("name", ["pr610",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("pr1123", "pr576", "pr598", "pr601"))])
def test_the_whole_file_of_each_system_is_smaller_than_its_payload_under_any_general_compressor(
    name):
    """A small model of each, some steps trained, rounded by its rules; header and checksums are
    part of our size and not of theirs."""
    import lzma

    from pgolf.model.gpt import GPT
    from pgolf.squeeze.gptq import quantize_state
    from pgolf.train.muon import make_optimizers
    from pgolf.systems.recipes import at_scale, get_recipe
    r = at_scale(get_recipe(name), "mini")
    model, gen = GPT(r.model, r.train.seed), torch.Generator().manual_seed(0)
    optims = make_optimizers(model, r.optim)
    for _ in range(4):
        # half of the tokens never occur
        ids = torch.multinomial(1/torch.arange(1., r.model.vocab_size//2), 8*33, True,
            generator=gen).reshape(8, 33)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        for o in optims: o.step(); o.zero_grad()
    tensors = quantize_state(model.state_dict(), r.quant)
    payload = b"".join(artifact._to_bytes(t) for *_, t in artifact._parts(tensors))
    xz = lambda **kw: len(lzma.compress(payload, lzma.FORMAT_RAW,
        filters=[dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, **kw)]))
    general = {"zstd 19": len(squeeze(payload, 19)), "zstd 22": len(squeeze(payload, 22)),
        "zstd 22, long": len(squeeze(payload, 22, True)), "xz": xz(), "xz, bytes": xz(lc=0, pb=0)}
    try:general["brotli"] = len(__import__("brotli").compress(payload, quality=11, lgwin=24))
    except ImportError: pass
    data = pack(tensors, dict(recipe=name), codec="best")
    assert len(data) < min(general.values()), (len(data), general)
    for f in {family(n) for n, t in tensors.items() if isinstance(t, Quantized)}:
        codes = np.stack([t.codes.numpy() for n, t in tensors.items() if family(n) == f
            and isinstance(t, Quantized)])
        tables = 2*(int(codes.max())-int(codes.min())+1)+40
        assert len(encode(codes)) < 1.005*entropy(
            codes)*codes.size/8+tables, f"{f}: within half a percent of order 0, and the table"
    back, _ = unpack(data)
    assert all(same(t, back[n]) for n, t in tensors.items())
