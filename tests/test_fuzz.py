"""Twenty thousand damaged and forged artifacts, in a process of its own: each reads back exactly,
or raises the one error, within 1 GB and without hanging.

Most mutants carry a correct checksum, as an attacker's would, so that they reach the checks behind
it. `python tests/test_fuzz.py 5000 7` runs 5,000 of seed 7."""
import copy
import hashlib
import json
import math
import random
import resource
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from conftest import HANG, no_hang

from pgolf.squeeze import artifact
from pgolf.squeeze.artifact import ArtifactError, ledger, load_artifact, pack, peek, unpack
from pgolf.squeeze.entropy import encode
from pgolf.squeeze.quant import Quantized

pytestmark = pytest.mark.slow

RUNS, BYTES = 21_000, 10**9
FAST = zstandard.ZstdCompressor(level=1)


def example(codec):
    gen = torch.Generator().manual_seed(0)
    codes = lambda r, c: torch.randn(r, c, generator=gen).mul(2).round().clamp(-7, 7).to(torch.int8)
    tensors = {f"blocks.{i}.fc.weight": Quantized(codes(8, 12),
        torch.rand(8, 1, generator=gen).half()) for i in range(2)}
    tensors |= {"tok_emb.weight": (torch.randn(16, 12, generator=gen)).half(),
        "attn_scale": torch.randn(9, generator=gen), "mask": torch.rand(12, generator=gen) > .5,
                "one": Quantized(torch.ones(4, 8).to(torch.int8), torch.ones(1, 1).half()),
                "none": torch.zeros(0, 4)}
    return pack(tensors, dict(system="fuzz", seeds=[1, 2.5, None, True], text="x"*20), codec=codec)


# ---- opening and sealing, written apart from the package

def taken_apart(data):
    magic, version, _, head, size, _ = artifact._PREFIX.unpack_from(data)
    at = artifact._PREFIX.size+head
    return json.loads(zstandard.decompress(data[artifact._PREFIX.size:at])), data[at:-32], size


def signed(data): return data+hashlib.sha256(data).digest()


def sealed(header, body, size, lies={}):
    text = json.dumps(header).encode()
    head = FAST.compress(text)
    fields = dict(magic=artifact.MAGIC, version=2, text=len(text), head=len(head), size=size,
        body=len(body)) | lies
    return signed(artifact._PREFIX.pack(*fields.values())+head+body)


# ---- mutations: each takes a random generator and two artifacts

def bytes_changed(rand, a, b=b""):
    "One to three edits: a bit, a byte, a cut, an insertion, a repetition, a splice."
    a = bytearray(a)
    for _ in range(rand.choice([1, 1, 2, 3])):
        i, n = rand.randrange(len(a)+1), rand.choice([1, 1, 2, 4, 9, 64])
        way = rand.randrange(7)
        if way == 0 and i < len(a): a[i] ^= 1 << rand.randrange(8)
        elif way == 1 and i < len(a): a[i] = rand.choice([0, 1, 127, 128, 255, rand.randrange(256)])
        elif way == 2: del a[i:i+n]
        elif way == 3: a[i:i] = rand.randbytes(n)
        elif way == 4: a[i:i] = a[i:i+n]
        elif way == 5: a[i:i+n] = bytes([rand.choice([0, 255])])*n
        elif b: a[i:] = b[rand.randrange(len(b)):]
    return bytes(a)


def raw(rand, a, b):
    return bytes_changed(rand, a, b) if rand.random() < .8 else a[:rand.randrange(len(a))]

def resigned(rand, a, b): return signed(bytes_changed(rand, a[:-32], b[:-32]))

def prefix(rand, a, b):
    header, body, size = taken_apart(a)
    name = rand.choice(["version", "text", "head", "size", "body"])
    top = 2**32 if name in ("version", "text", "head") else 2**64
    value = rand.choice([0, 1, 3, top-1, top//2, 2**22, 2**28, rand.randrange(top),
        rand.randrange(5000)])
    return sealed(header, body, size, {name: value % top})


def stream(rand, a, b):
    """The bytes of one stream change and the sizes are mended: only its decoder, or the tensor's
    checksum, can notice."""
    header, body, size = taken_apart(a)
    f = rand.choice(header["frames"])
    start = sum(n for g in header["frames"][:header["frames"].index(f)] for _, n in g["streams"])
    s = rand.randrange(len(f["streams"]))
    start += sum(n for _, n in f["streams"][:s])
    end = start+f["streams"][s][1]
    new = bytes_changed(rand, body[start:end], body)
    if rand.random() < .2:
        new = (encode(np.frombuffer(rand.randbytes(rand.randrange(99)), np.int8))
            if rand.random() < .5 else FAST.compress(rand.randbytes(rand.randrange(99))))
    f["streams"][s][1] = len(new)
    if rand.random() < .1: f["streams"][s][0] = rand.choice(["zstd", "rans"])
    return sealed(header, body[:start]+new+body[end:], size)


HOSTILE = [None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e308, 2**31, 2**40, 2**63, 2**64, 10**30,
    "", "x", "zstd", "rans", "best", "codes", "scale", "tensor", "uint8", "int8",
           "bool", "float16", "bfloat16", "float32", "int64", "complex64", "blocks.0.fc.weight",
           "tok_emb.weight", "9"*5000, "\ud800", "\0", "x"*1200, [], {}, [0],
           [2**39]*3, [1]*9, [[]],
           ["zstd", 0], {"streams": [], "tensors": []}]


def places(value, path=()):
    "All places in a JSON value."
    for key, v in (value.items() if isinstance(value, dict) else enumerate(value)
        if isinstance(value, list) else ()):
        yield value, key
        yield from places(v)


def header(rand, a, b):
    "One to three edits of the header's JSON, sizes of the prefix mended."
    header, body, size = taken_apart(a)
    for _ in range(rand.choice([1, 1, 1, 2, 3])):
        holder, key = rand.choice(list(places(header)))
        value, way = holder[key], rand.randrange(8)
        if way < 3: holder[key] = copy.deepcopy(rand.choice(HOSTILE))
        elif way == 3 and type(value) is int:
            holder[key] = value+rand.choice([-8, -1, 1, 8, value, 2**20])
        elif way == 4: del holder[key]
        elif way == 5 and isinstance(holder, list):
            holder.insert(rand.randrange(len(holder)+1), copy.deepcopy(value))
        elif way == 6 and isinstance(holder, list): rand.shuffle(holder)
        else:
            other, there = rand.choice(list(places(header)))
            holder[key] = copy.deepcopy(other[there]) # another part of the same header
        if not header: break
    return sealed(header, body, size)


def claim(rand, a, b):
    """A tensor that claims to be larger, consistently: record, later offsets and prefix agree; only
    its stream does not, or is a bomb."""
    header, body, size = taken_apart(a)
    f = rand.choice([f for f in header["frames"] if f["tensors"][-1]["length"]])
    r = f["tensors"][-1]
    more = rand.choice([2, 3, 1000, 2**15])
    shape = [r["shape"][0]*more, *r["shape"][1:]] if r["shape"] else [more]
    grown = math.prod(shape)*artifact.DTYPES[r["dtype"]].itemsize
    extra = grown-r["length"]
    later = r["offset"]
    for g in header["frames"]:
        for t in g["tensors"]: t["offset"] += extra*(t["offset"] > later)
    r.update(shape=shape, length=grown)
    return sealed(header, body, size+extra)


def cross(rand, a, b):
    "The header of one artifact before the payload of another."
    (header, _, size), (_, body, _) = taken_apart(a), taken_apart(b)
    return sealed(header, body, size)


def pieces(rand, a, b): # a stream of another artifact in place of one's own
    (header, body, size), (other, rest, _) = taken_apart(a), taken_apart(b)
    f, g = rand.choice(header["frames"]), rand.choice(other["frames"])
    start = sum(n for h in header["frames"][:header["frames"].index(f)] for _, n in h["streams"])
    there = sum(n for h in other["frames"][:other["frames"].index(g)] for _, n in h["streams"])
    old, new = sum(n for _, n in f["streams"]), sum(n for _, n in g["streams"])
    f["streams"] = g["streams"]
    return sealed(header, body[:start]+rest[there:there+new]+body[start+old:], size)


KINDS = dict(raw=raw, resigned=resigned, prefix=prefix, stream=stream, header=header, claim=claim,
    cross=cross, pieces=pieces)
SHARE = [3, 3, 1, 5, 7, 1, .2, .8]


# ---- what must hold

def flat(t): return (t.codes, t.scale) if isinstance(t, Quantized) else (t,)


def exact(data, tensors, meta):
    "Whether what was read is what header and checksums of this file say, to the bit."
    header, _, _ = taken_apart(data)
    said = Counter((r["name"], r["dtype"], tuple(r["shape"]), r["crc32"]) for f in header["frames"]
        for r in f["tensors"])
    read = Counter((n, str(t.dtype)[6:], tuple(t.shape), zlib.crc32(artifact._to_bytes(t)))
        for n, q in tensors.items() for t in flat(q))
    return said == read and header["meta"] == meta


def check(data):
    """Read one mutant: whether it was read; anything but an exact result or an `ArtifactError`
    raises."""
    try: tensors, meta = unpack(data)
    except ArtifactError: return False
    assert exact(data, tensors, meta), "read, but not what the file says"
    assert sum(r.stored for r in ledger(data)) == len(data)
    return True


def listed(data):
    "The header alone, which is all that the ledger trusts."
    try: ledger(data)
    except ArtifactError: pass


def peak_bytes():
    "Peak memory of this program. On Linux ru_maxrss would also count the process that started it."
    status = Path("/proc/self/status")
    if status.exists(): return 1024*int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1
        if sys.platform == "darwin" else 1024)


def fuzz(runs, seed):
    "Counts per kind, and the peak of this process's memory."
    rand, done = random.Random(seed), {}
    models = [example(codec) for codec in ("zstd", "rans", "best")]
    streams = [f["streams"] for m in models for f in taken_apart(m)[0]["frames"]]
    assert all(check(m) for m in models) and {c for s in streams for c, _ in s} == {"zstd",
        "rans"} and {len(s) for s in streams} >= {1, 2}
    for kind in rand.choices(list(KINDS), SHARE, k=runs):
        data = KINDS[kind](rand, rand.choice(models), rand.choice(models))
        try:
            with no_hang(60): read = check(data)
        except Exception as e:
            raise AssertionError(f"{kind}: {type(e).__name__}: {e}; file {data.hex()}") from e
        listed(data)
        n, reads = done.get(kind, (0, 0))
        done[kind] = n+1, reads+read
    return dict(done=done, peak=peak_bytes(), sizes=[len(m) for m in models])


@pytest.mark.skipif(sys.platform == "win32", reason="the peak of memory is measured the Unix way")
def test_mutants_read_back_exactly_or_raise_the_one_error():
    child = subprocess.run([sys.executable, __file__, str(RUNS), "0"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=4*HANG)
    assert child.returncode == 0, child.stderr[-3000:]
    result = json.loads(child.stdout)
    counts = {kind: n for kind, (n, _) in result["done"].items()}
    assert sum(counts.values()) == RUNS >= 20_000 and set(counts) == set(KINDS)
    assert result["peak"] < BYTES, result


def bomb(codec, n):
    "A sound artifact of few bytes that unpacks to `n`."
    codes = np.zeros(n, np.uint8)
    codes[n//2] = 1
    s = encode(codes, 1) if codec == "rans" else FAST.compress(codes.tobytes())
    record = dict(name="x", kind="tensor", dtype="uint8", shape=[n], offset=0, length=n,
        crc32=zlib.crc32(codes.tobytes()))
    return sealed(dict(meta={}, frames=[dict(streams=[[codec, len(s)]], tensors=[record])]), s, n)


@pytest.mark.parametrize("codec", ["zstd", "rans"])
def test_a_small_file_may_unpack_to_its_limit_and_no_further(codec):
    "What it then takes is in proportion to the limit: three times its bytes at most."
    import tracemalloc
    data, n = bomb(codec, 2**22), 2**22
    assert len(data) < 6000
    with pytest.raises(ArtifactError, match=f"limit={n-1}"): unpack(data, limit=n-1)
    with no_hang(60): assert unpack(data)[0]["x"].sum() == 1
    tracemalloc.start()
    try:
        unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 3*n+2**22
    finally: tracemalloc.stop()


def test_files_too(tmp_path):
    "Through files and the header alone, the same error, with the name."
    rand, model = random.Random(1), example("best")
    path = tmp_path/"mutant.pgolf"
    for kind in list(KINDS)*20:
        path.write_bytes(KINDS[kind](rand, model, model))
        for read in (load_artifact, peek):
            try: read(path)
            except ArtifactError as e: assert str(e).startswith(str(path)) and len(str(e)) < 1000


if __name__ == "__main__": print(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]))))
