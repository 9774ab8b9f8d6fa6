"""Mutations by structure: each takes a random generator and two files of a kind, and gives a third
whose frame is sound (sizes, checksums, compression), so that it reaches what is behind it."""
import copy
import gzip
import io
import json
import lzma
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import brotli
import zstandard

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
from test_fuzz import HOSTILE, bytes_changed, places  # noqa: E402

from pgolf.squeeze.streams import byte_shuffle, byte_unshuffle  # noqa: E402

FIRST = zstandard.ZstdCompressor(level=1)
WORDS = ["", "x", "..", "../../x", "/", "/etc/passwd", "a/b", "\0", "\ud800", "%s", "9"*400, "nan",
    "inf", "-1", "1e999", "True", "None", "null", "[[[[", "\u202e", "é", "\n", "0x10", "10"*30]
NUMBERS = [-1, 0, 1, 2, 255, 2**16, 2**31-1, 2**31, 2**32-1, 2**40, 2**63, -2**63, 10**30, 1e308,
    -0., float("nan"), float("inf"), 1e-320]


# ---- bytes, text and JSON

def raw(rand, a, b):
    "Damage of any kind, or a cut."
    return bytes_changed(rand, a, b) if rand.random() < .8 else a[:rand.randrange(len(a)+1)]


def value_changed(rand, value, others=()):
    "One to three edits of a fresh JSON value: hostile values, losses, repetitions, exchanges."
    holder = dict(top=value)
    for _ in range(rand.choice([1, 1, 1, 2, 3])):
        spots = list(places(holder))
        place, key = rand.choice(spots[1:] or spots)
        way = rand.randrange(8)
        if way < 3: place[key] = copy.deepcopy(rand.choice([*HOSTILE, *WORDS, *NUMBERS, *others]))
        elif way == 3 and isinstance(place[key], (int, float)):
            place[key] = place[key]+rand.choice([-8, -1, 1, 8, 2**20, .5])
        elif way == 4 and len(spots) > 1: del place[key]
        elif way == 5 and isinstance(place, list): place.insert(0, copy.deepcopy(place[key]))
        elif way == 6 and isinstance(place, list): rand.shuffle(place)
        else:
            other, there = rand.choice(spots)
            place[key] = copy.deepcopy(other[there])
    return holder.get("top")


def as_json(rand, a, b):
    "The JSON value of a file, changed."
    return json.dumps(value_changed(rand, json.loads(a))).encode()


def as_lines(rand, a, b):
    "Lines lost, doubled, exchanged, or with a hostile word in them."
    lines = a.decode(errors="replace").split("\n")
    for _ in range(rand.choice([1, 1, 2, 4])):
        i, way = rand.randrange(len(lines)), rand.randrange(5)
        if way == 0 and len(lines) > 1: del lines[i]
        elif way == 1: lines.insert(i, lines[i]*rand.choice([1, 1, 2, 50]))
        elif way == 2: lines[i], lines[0] = lines[0], lines[i]
        else:
            words = lines[i].split(" ")
            words[rand.randrange(len(words))] = str(rand.choice([*WORDS, *NUMBERS]))
            lines[i] = " ".join(words)
    return "\n".join(lines).encode(errors="surrogatepass")


# ---- shards

def as_shard(rand, a, b):
    "Numbers of the header, ids, and a length that fits or does not."
    head, body = bytearray(a[:1024]), bytearray(a[1024:])
    way = rand.randrange(4)
    if way == 0:
        struct.pack_into("<i", head, 4*rand.randrange(5), rand.choice([-2**31, -1, 0, 1, 2, 520,
            2**31-1, 20240520]))
    elif way == 1:
        for _ in range(rand.choice([1, 3])):
            struct.pack_into("<H", body, 2*rand.randrange(len(body)//2), rand.choice([0, 1, 299,
                300, 1023, 1024, 65535]))
    elif way == 2: body = bytearray(bytes_changed(rand, bytes(body), b[1024:]))
    else: body = body[:rand.randrange(len(body))//2*2]
    if way > 1: struct.pack_into("<i", head, 8, len(body)//2+rand.choice([0, 0, 0, 1]))
    return bytes(head+body)


# ---- protocol buffers, as SentencePiece writes its models

def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at+1, shift+7
        if byte < 128: return value, at


def _as_varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def fields_of(data):
    "Fields of a message: (number, wire type, value)."
    at, out = 0, []
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0: value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at:at+size], at+size
        out.append((tag >> 3, kind, value))
    return out


def message(fields):
    "The bytes of fields."
    def one(number, kind, value):
        tag = _as_varint(number << 3 | kind)
        if kind == 0: return tag+_as_varint(value % 2**64)
        return tag+(_as_varint(len(value)) if kind == 2 else b"")+value
    return b"".join(one(*f) for f in fields)


def as_message(rand, a, b, depth=0):
    "Fields lost, doubled, exchanged, changed; the sizes around them mended."
    fields = fields_of(a)
    for _ in range(rand.choice([1, 1, 2, 5])):
        i, way = rand.randrange(len(fields)), rand.randrange(6)
        number, kind, value = fields[i]
        if way == 0 and len(fields) > 1: del fields[i]
        elif way == 1: fields[i:i] = [fields[i]]*rand.choice([1, 1, 2, 300])
        elif way == 2: fields[i], fields[0] = fields[0], fields[i]
        elif kind == 0:
            value = rand.choice([0, 1, 2, value+1, 300, 2**31-1, 2**31, 2**32-1, 2**63])
            fields[i] = number, kind, value
        else: fields[i] = number, kind, _inner(rand, kind, value, depth)
    return message(fields)


def _inner(rand, kind, value, depth):
    "The value of a field: a message itself, or bytes."
    if kind == 2 and depth < 3 and rand.random() < .8:
        try: return as_message(rand, value, b"", depth+1)
        except (IndexError, KeyError, ValueError): pass
    if kind == 2: return bytes_changed(rand, value)
    return struct.pack("<f", rand.choice([0., -1e30, float("nan"), float("inf")]))*(3-kind//2)


# ---- zip archives: numpy's and torch's files

def members_of(data):
    "Names and contents."
    with zipfile.ZipFile(io.BytesIO(data)) as z: return [(i.filename, z.read(i)) for i in
        z.infolist()]


def archive(members, packed=False):
    "A sound zip."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as z:
        for name, data in members: z.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def as_npy(rand, a):
    "An array's header: its type, order and shape; or its bytes."
    size = int.from_bytes(a[8:10], "little")
    head, body = a[10:10+size].decode("latin1"), a[10+size:]
    old, new = rand.choice([("<f4", "|O"), ("<f4", "<U4"), ("<i4", "<M8[s]"), ("<i4", "<f2"),
        ("False", "True"), ("(", "(-"), (",)", ",2**40)"), (",)", ", 9999999999)"), ("(", "(0,"),
        ("'shape'", "'shap'"), ("{", "__import__('os').system('touch x') or {")])
    if rand.random() < .3: body = bytes_changed(rand, body) if body else b"x"
    else: head = head.replace(old, new, 1).rstrip()
    head = head.ljust(size-1)+"\n"
    return a[:8]+len(head).to_bytes(2, "little")+head.encode("latin1")+body


def as_npz(rand, a, b):
    "Members lost, doubled, renamed, changed."
    members = members_of(a)
    i, way = rand.randrange(len(members)), rand.randrange(7)
    name, data = members[i]
    if way == 0: del members[i]
    elif way == 1: members.append((rand.choice(["../x.npy", "/x.npy", name, "x"]), data))
    elif way == 2: members[i] = name, members[0][1]
    elif way == 3: members[i] = name, PICKLED
    else: members[i] = name, as_npy(rand, data)
    return archive(members, rand.random() < .5)


def as_about(rand, a, b):
    "The JSON text that a file of scores carries as an array."
    import numpy as np
    members, out = dict(members_of(a)), io.BytesIO()
    about = json.loads(str(np.lib.format.read_array(io.BytesIO(members["about.npy"]))))
    np.lib.format.write_array(out, np.array(json.dumps(value_changed(rand, about))))
    return archive((members | {"about.npy": out.getvalue()}).items())


# A pickle that would leave a file behind: "cos\nsystem\n(S'touch executed'\ntR."
EVIL = b"cos\nsystem\n(S'touch executed'\ntR."
EVILS = [EVIL, b"\x80\x02"+EVIL, b"cbuiltins\neval\n(S'open(\"executed\",\"w\")'\ntR.",
    b"ctorch.hub\nload\n(S'x/y'\ntR.", b"cbuiltins\ngetattr\n(cos\nS'system'\ntR.",
    b"c__builtin__\nexec\n(S'1/0'\ntR.", b"(S'touch executed'\nios\nsystem\n.",
    b"cnumpy\nload\n(S'executed'\ntR.", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R."]
HEAD = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
PICKLED = b"\x93NUMPY\x01\x00v\x00"+HEAD.ljust(117)+b"\n"+EVIL


def as_saved(rand, a, b):
    "A torch-saved dictionary: its pickle, its storages, its other members."
    members = members_of(a)
    i = next(i for i, (n, _) in enumerate(members) if n.endswith("data.pkl"))
    if rand.random() < .35: i = rand.randrange(len(members))
    name, data = members[i]
    way = rand.randrange(6)
    if way == 0: members[i] = name, rand.choice(EVILS)
    elif way == 1 and data: members[i] = name, data[:rand.randrange(len(data))]+rand.choice(EVILS)
    elif way == 2: del members[i]
    elif way == 3: members[i] = name, pickle_changed(rand, data)
    else: members[i] = name, bytes_changed(rand, data)
    return archive(members)


def pickle_changed(rand, data):
    "A pickle with one of its numbers, names or opcodes changed, told apart by pickletools."
    import pickletools
    try: spots = [(op, at) for op, _, at in pickletools.genops(data)]
    except Exception: return bytes_changed(rand, data)
    i = rand.randrange(len(spots))
    (op, at), end = spots[i], spots[i+1][1] if i+1 < len(spots) else len(data)
    if op.name in ("BININT", "BININT1", "BININT2", "LONG1"):
        new = b"J"+struct.pack("<i", rand.choice([-1, 0, 1, 7, 2**20, 2**31-1, -2**31]))
    elif op.name == "BINUNICODE":
        word = rand.choice([b"cpu", b"cuda:0", b"meta", b"0", b"../0", b"w", b"quantized", b"x"*99])
        new = b"X"+struct.pack("<I", len(word))+word
    elif op.name == "GLOBAL":
        new = b"c"+rand.choice([b"os\nsystem\n", b"torch\nload\n", b"builtins\neval\n",
            b"torch\nDoubleStorage\n", b"torch._utils\n_rebuild_sparse_tensor\n", b"a\nb\n"])
    else: new = rand.choice([b"", data[at:end]*2, b"N", b"}", b"]", b"0", b"\x88"])
    return data[:at]+new+data[end:]


# ---- safetensors

def as_safetensors(rand, a, b):
    "The header's JSON with its size mended, or the tensors' bytes."
    size = int.from_bytes(a[:8], "little")
    header, body = json.loads(a[8:8+size]), a[8+size:]
    way = rand.random()
    if way < .2: return len(a[8:8+size]).to_bytes(8, "little")+a[8:8+size]+bytes_changed(rand, body)
    if way < .3: return rand.choice([0, 1, size+8, 2**40, 2**64-1]).to_bytes(8, "little")+a[8:]
    if way < .6 and "__metadata__" in header:
        meta = json.loads(header["__metadata__"]["pgolf"])
        header["__metadata__"]["pgolf"] = json.dumps(value_changed(rand, meta))
    else: header = value_changed(rand, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little")+text+body


# ---- compressed files

PRESSES = dict(zlib=(lambda data: zlib.compress(data, 1), zlib.decompress),
    gzip=(gzip.compress, gzip.decompress),
    zstd=(FIRST.compress, zstandard.decompress),
    xz=(lambda data: lzma.compress(data, preset=0), lzma.decompress),
    brotli=(lambda data: brotli.compress(byte_shuffle(data), quality=1),
        lambda data: byte_unshuffle(brotli.decompress(data))))


def under(press, inner):
    "A mutation of what is under a compressor."
    pack, unpack = PRESSES[press]
    def change(rand, a, b):
        new = inner(rand, unpack(a), unpack(b))
        return pack(new) if rand.random() < .9 else bytes_changed(rand, pack(new))
    return change


# ---- Python sources, as submissions bring them

LAYERS = ["exec({})", "exec(compile({}, 'x', 'exec'))", "import zlib\nexec(zlib.decompress({}))",
    "import lzma,base64 as b\nexec(lzma.decompress(b.b85decode({})))", "if 1:\n exec({})",
    "x={}\nexec(x)", "exec(open({}).read())", "exec(''.join({}))", "exec({}.replace('a','b'*999))",
    "import runpy\nrunpy.run_path({})", "eval({})", "__import__('os').system({})"]


def as_source(rand, a, b):
    "Wrapped, nested, cut, or with a hostile constant."
    text, way = a.decode(errors="replace"), rand.randrange(7)
    if way == 0: text = rand.choice(LAYERS).format(repr(text))
    elif way == 1: text = rand.choice(LAYERS).format(repr(zlib.compress(text.encode())))
    elif way == 2: text = rand.choice(LAYERS).format(repr(rand.choice(WORDS)))
    elif way == 3: text = text+"\nx="+rand.choice("([{-~")*rand.choice([3, 90, 150, 400, 9999])
    elif way == 4:
        text = rand.choice(LAYERS).format(f"({'+'.join(['1']*rand.choice([2, 500]))})")
    else: return as_lines(rand, a, b)
    return text.encode(errors="replace")
