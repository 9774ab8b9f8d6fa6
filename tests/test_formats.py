"Published files written from the layouts of the sheets: what is read back, and what is refused."
import io
import json
import lzma
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import replace

import brotli
import numpy as np
import pytest
import torch
import zstandard
from conftest import ROOT
from test_golden_model import ODD, batch, build, build_1394, pentanary

from pgolf.squeeze.entropy import published_cdf
from pgolf.squeeze.formats import FormatError, fitting, import_weights, read_published, read_stored
from pgolf.model.gpt import GPT, ModelConfig
from pgolf.squeeze.formats import load_published
from pgolf.systems.recipe import load_recipe
from pgolf.systems.recipes import RECIPES, at_scale
from pgolf.train.checkpoint import read_checkpoint

PRESS = dict(none=bytes, zlib=lambda d: zlib.compress(d, 9),
    zstd=zstandard.ZstdCompressor(level=22).compress, xz=lzma.compress,
             lzma=lambda d: lzma.compress(d, format=lzma.FORMAT_ALONE),
    brotli=lambda d: brotli.compress(b"BSHF\2"+d[::2]+d[1::2], quality=5)) # PR #1394's sheet, 7
# sheet of PR #598, section 3
CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "smear_gate", "bigram",
    "skip_gates", "ve_shared", "ve_layer_scales")
# sheets of PRs #610 and #576: the tables
BF16 = ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight")


def saved(obj):
    f = io.BytesIO()
    torch.save(obj, f)
    return f.getvalue()


# ---- writers, one per sheet: each gives the saved dictionary and the weights that its loader makes
# of it

def int8_rows(t, floor=1/127):
    """Challenge sheet, section 9, and the tables of PRs #610, #576, #601: codes from the float32
    step, which is stored as float16."""
    clip = torch.quantile(t.abs(), .9999984, dim=1)
    s = (clip/127).clamp_min(floor)
    q = (t.clamp(-clip[:, None], clip[:, None])/s[:, None]).round().clamp(-127, 127).to(torch.int8)
    return q, s.half()


def rows(t, lo, hi):
    "PR #601's rule: step from the row's maximum, rounded to float16 before the codes."
    s = (t.abs().amax(1)/hi).half().float().clamp_min(6.1e-5)
    return (t/s[:, None]).round().clamp(lo, hi).to(torch.int8), s.half()


def slowly(q, s):
    "Code times step, row by row."
    return torch.stack([row.float()*float(v) for row, v in zip(q, s)])


def write_baseline(state, keep):
    obj, want = dict(__quant_format__="int8_clean_per_row_v1", quantized={}, scales={}, dtypes={},
        passthrough={}, qmeta={}, passthrough_orig_dtypes={}), {}
    for n, t in state.items():
        if t.numel() <= keep:
            control = any(c in n for c in CONTROL)
            obj["passthrough"][n] = kept = t.float() if control else t.half()
            if not control: obj["passthrough_orig_dtypes"][n] = "float32"
            want[n] = kept.float()
        else:
            q, s = obj["quantized"][n], obj["scales"][n] = int8_rows(t)
            obj["dtypes"][n], obj["qmeta"][n] = "float32", dict(scheme="per_row", axis=0)
            want[n] = slowly(q, s)
    return obj, want


def write_598(state, keep):
    obj, want = dict(__quant_format__="mixed_clean_per_row_v1", quantized={}, scales={}, dtypes={},
        passthrough={}, qmeta={}, passthrough_orig_dtypes={}), {}
    for n, t in state.items():
        # the only parameter that stays bfloat16
        dtype = torch.bfloat16 if n == "tok_emb.weight" else torch.float32
        if t.numel() <= keep:
            control = any(c in n for c in CONTROL)
            obj["passthrough"][n] = kept = t.float() if control else t.half()
            if not control: obj["passthrough_orig_dtypes"][n] = str(dtype).removeprefix("torch.")
            want[n] = kept.to(dtype)
            continue
        if ".attn." in n or ".mlp." in n:
            q, s = rows(t, -32, 31)
            obj["qmeta"][n] = dict(scheme="per_row", axis=0, bits=6)
            want[n] = slowly(q, s).to(dtype)
        else:
            s = (t.abs().max()/127).half()
            q = (t/s.float()).round().clamp(-127, 127).to(torch.int8)
            obj["qmeta"][n] = dict(scheme="per_tensor", bits=8)
            want[n] = (q.float()*float(s)).to(dtype)
        obj["quantized"][n], obj["scales"][n], obj["dtypes"][n] = q, s, str(
            dtype).removeprefix("torch.")
    return obj, want


def write_pair(state, keep, hi=31, keys=("w", "m"), bf16=BF16, fp16=(), word=None):
    w, m, want = {}, {}, {}
    for n, t in state.items():
        dtype = torch.bfloat16 if n in bf16 or n.endswith("attn_gate.weight") else torch.float32
        if t.numel() <= keep or n in fp16:
            w[n], m[n], want[n] = (t.half(), "passthrough" if n not in fp16
                else "passthrough_fp16", t.half().to(dtype))
            continue
        block = ".attn." in n or ".mlp." in n
        q, s = rows(t, -hi, hi) if block else int8_rows(t)
        kind = "int6" if block else "int8"
        w[n+".q"], w[n+".scale"], m[n], want[n] = q, s, word(
            kind) if word else {"type": kind}, slowly(q, s).to(dtype)
    return dict(zip(keys, (w, m))), want


def slow_encode(symbols, cdf):
    "PR #1123's sheet, section 8.3."
    x, out = 2**23, bytearray()
    for s in reversed(symbols):
        f = cdf[s+1]-cdf[s]
        while x >= f << 15:
            out.append(x & 255)
            x >>= 8
        x = x//f*65536 + x % f + cdf[s]
    return bytes(reversed(out+x.to_bytes(4, "little")))


def write_1123(state, keep):
    obj = dict(__format__="hybrid_rans_v1", rans_data={}, rans_counts={}, rans_alphas={},
        rans_shapes={}, rans_scales={}, passthrough={})
    alphabet = dict(c_q=64, c_k=64, c_v=32, proj=32, up=5, down=16)
    want = {}
    for n, t in state.items():
        A = (alphabet.get(n.split(".")[-2]) if n.startswith("blocks.") and t.dim() == 2
            and n.endswith(".weight") else None)
        if A is None:
            obj["passthrough"][n], want[n] = t.half(), t.half().float()
            continue
        if A == 5:
            m = t.abs().mean(1, keepdim=True)
            q = t.sign()*((t.abs() > .7*m).float()+(t.abs() > 1.4*m).float())
            scale, z = ((t*q).sum(1)/(q*q).sum(1).clamp_min(1e-8)).half(), (q+2).long()
            want[n] = (z-2).float()*scale.float()[:, None]
        else:
            top = t.abs().amax(1).clamp_min(1e-5)
            z = (A//2*t/top[:, None]).round().clamp(-A//2, A//2-1).long()+A//2
            scale = top.half()
            want[n] = (z-A//2).float()*scale.float()[:, None]/(A//2)
        symbols = z.flatten().tolist()
        counts = np.maximum(1, np.bincount(symbols, minlength=A))
        obj["rans_data"][n] = torch.frombuffer(
            bytearray(slow_encode(symbols, published_cdf(counts))), dtype=torch.uint8)
        obj["rans_counts"][n], obj["rans_alphas"][n], obj["rans_shapes"][n], obj["rans_scales"][
            n] = torch.from_numpy(counts).int(), A, list(t.shape), scale
    return obj, want


KEEP = 2048
WRITERS = {
    "baseline": ("pr610", write_baseline, "zlib"), "pr610": ("pr610", write_pair, "zstd"),
    "pr576": ("pr576", lambda s, k: write_pair(s, k, 15, word=str), "zstd"),
    "pr598": ("pr598", write_598, "zstd"), "pr1123": ("pr1123", write_1123, "none"),
    "pr601": ("pr601",
        lambda s, k: write_pair(s, k,
            fp16=("tok_emb.weight", "blocks.3.attn.c_k.weight", "blocks.4.attn.c_k.weight")),
            "zstd"),
    "pr601 in the sheet's words": ("pr601",
        lambda s, k: write_pair(s, k, 15, keys=("tensors", "meta"),
            word=lambda kind: {"type": kind, "bits": 6}), "zlib"),
    "pr1394": ("pr1394", lambda s, k: write_pair(s, k, word=str), "brotli")}
LONG = dict(activation="leaky_relu2", skip_gate=True, layer_order=(0, 1, 2, 1, 2, 3, 4))
NAMES = dict(pr598=((".mlp.fc.", ".mlp.up_proj."), (".mlp.proj.", ".mlp.down_proj."),
    ("bigram.", "bigram_emb."), ("smear.", "smear_gate.")),
    pr1123=((".mlp.fc.", ".mlp.up."), (".mlp.proj.", ".mlp.down.")))


def own_model(system):
    "A small model of a system, no golden file needed: every parameter away from its start."
    small = dict(vocab_size=96, num_layers=5, model_dim=64, num_heads=4, num_kv_heads=2,
        rope_dims=8, bigram_vocab_size=64, bigram_dim=16, smear=True, ln_scale=True, skip_init=1.)
    extra = dict(ve_dim=16, ve_layers=(3, 4)) if system != "pr601" else {}
    more = dict(value_residual=True, mlp_mult=4) if system == "pr1123" else {}
    odd = ODD.get(system, LONG) | more
    model, gen = GPT(ModelConfig(**small | extra | odd)), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2*torch.randn(p.shape, generator=gen))
    return model


def renamed(system, state):
    for a, b in NAMES.get(system, ()): state = {n.replace(a, b): t for n, t in state.items()}
    return state


def loss(model, x, y):
    with torch.no_grad(): return model.eval().loss(x, y).item()


def check(got, want):
    assert got.keys() == want.keys()
    for n in want: assert got[n].dtype == want[n].dtype and torch.equal(got[n], want[n]), n


@pytest.mark.parametrize("name", WRITERS)
def test_weights_are_the_sheets_arithmetic_to_the_bit(name):
    system, write, press = WRITERS[name]
    model = own_model(system)
    state = renamed(system, model.state_dict())
    obj, want = write(state, KEEP)
    got, about = read_published(PRESS[press](saved(obj)))
    check(got, want)
    assert (about["compressor"] == press and about["tensors"] == len(want)
        and about["parameters"] == sum(p.numel() for p in model.parameters()) > about["coded"] > 0)
    again, ids = load_published(GPT(model.cfg), got), torch.randint(96, (2, 25),
        generator=torch.Generator().manual_seed(0))
    assert loss(again, ids[:, :-1],
        ids[:, 1:]) == pytest.approx(loss(load_published(GPT(model.cfg), want), ids[:, :-1],
            ids[:, 1:]), rel=1e-7)


@pytest.mark.parametrize("press", PRESS)
@pytest.mark.parametrize("name", ["baseline", "pr610", "pr1123"])
def test_any_compressor_gives_the_same(name, press):
    system, write, _ = WRITERS[name]
    obj, want = write({n: t for n, t in renamed(system, own_model(system).state_dict()).items()
        if "blocks" not in n or "blocks.1" in n}, KEEP)
    check(read_published(PRESS[press](saved(obj)))[0], want)


@pytest.mark.parametrize("name", WRITERS)
def test_golden_models_through_every_layout(golden, name):
    system, write, press = WRITERS[name]
    z = golden(system)
    state = {k.removeprefix("param/"): torch.from_numpy(z[k]) for k in z.files
        if k.startswith("param/")}
    obj, want = write(state, KEEP)
    check(read_published(PRESS[press](saved(obj)))[0], want)


def test_the_golden_long_order_from_its_own_file(golden, tmp_path):
    "PR #1394's small model as its script stores it, kept whole: the golden loss."
    z = golden("pr1394")
    model = build_1394(z)
    kept = {n: t.float() for n, t in model.state_dict().items()}
    (tmp_path/"model.ptz").write_bytes(PRESS["brotli"](saved(dict(w=kept,
        m=dict.fromkeys(kept, "passthrough")))))
    state, about = read_published(tmp_path/"model.ptz")
    assert (about["format"], about["compressor"]) == ("w, m", "brotli")
    assert fitting(state, dict(it=model.cfg, other=replace(model.cfg, mlp_mult=3))) == ["it"]
    again = load_published(GPT(model.cfg), state)
    assert loss(again, *batch(z)) == pytest.approx(float(z["loss"]), rel=1e-5)


@pytest.mark.parametrize("system", ODD)
def test_a_plain_golden_state_gives_the_golden_loss(golden, tmp_path, system):
    z = golden(system)
    (tmp_path/"model.ptz").write_bytes(
        zlib.compress(
            saved({k.removeprefix("param/"): torch.from_numpy(z[k]) for k in z.files
                if k.startswith("param/")})))
    state, about = read_published(tmp_path/"model.ptz")
    cfg = build(z, system).cfg
    assert (about["format"], about["coded"]) == ("state dict", 0) and fitting(state,
        dict(it=cfg)) == ["it"]
    import_weights(state, about, cfg, tmp_path/"run")
    model = GPT(cfg)
    model.load_state_dict(
        {n.removeprefix("averaged/"): t
            for n, t in read_checkpoint(tmp_path/"run"/"weights.safetensors")[0].items()
            if n.startswith("averaged/")})
    with torch.no_grad():
        if system == "pr1123":
            for b in model.blocks: b.mlp.fc.weight.copy_(pentanary(b.mlp.fc.weight))
    assert loss(model, *batch(z)) == pytest.approx(float(z["loss"]), rel=1e-5)


# ---- hostile and damaged files

class Evil:
    def __init__(self, call, *args): self.call = call, args
    def __reduce__(self): return self.call


@pytest.mark.parametrize("press", PRESS)
def test_a_hostile_pickle_runs_nothing(tmp_path, press):
    import os
    mark = tmp_path/"mark"
    calls = (Evil(os.system, f"touch {mark}"), Evil(open, str(mark), "w"),
        Evil(exec, f"open({str(mark)!r}, 'w')"), Evil(subprocess.Popen, ["touch", str(mark)]))
    for evil in calls:
        for obj in (dict(w={}, m=evil), {"a": evil, "b": torch.ones(2)}, evil):
            for data in (saved(obj), pickle.dumps(obj)):
                (tmp_path/"evil.ptz").write_bytes(PRESS[press](data))
                with pytest.raises(
                    FormatError,
                    match=(
                        "evil.ptz: .*(nothing in it was executed|holds no torch-saved|neither a"
                        " torch-saved)"
                    ),
                ):
                    read_published(tmp_path/"evil.ptz")
    time.sleep(.05)
    assert not mark.exists()


def rezip(data, **changed):
    "The same zip with other members, stored with right checksums."
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as a, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as b:
        for n in a.namelist():
            b.writestr(n, changed.get(n.rsplit("/", 1)[-1].replace(".", "_"), a.read(n)))
    return out.getvalue()


def test_a_hostile_pickle_inside_a_sound_zip_runs_nothing(tmp_path):
    mark = tmp_path/"mark"
    data = rezip(saved({"a": torch.ones(3)}),
        data_pkl=pickle.dumps({"a": Evil(open, str(mark), "w")}, protocol=2))
    with pytest.raises(FormatError, match="nothing in it was executed"): read_published(data)
    assert not mark.exists()


def test_a_storage_that_claims_more_than_the_file_holds_is_refused():
    data = saved({"a": torch.zeros(1000, dtype=torch.int16)})
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        inside = z.read(next(n for n in z.namelist() if n.endswith("data.pkl")))
    grown = inside.replace(b"M\xe8\x03", b"M\x60\xea") # 1,000 becomes 60,000
    assert grown != inside
    with pytest.raises(FormatError): read_published(rezip(data, data_pkl=grown))
    with pytest.raises(FormatError, match="not a plain tensor"):
        read_published(saved({"a": torch.zeros(1).expand(2**33)}))


@pytest.mark.parametrize("press", PRESS)
@pytest.mark.parametrize("name", ["baseline", "pr610", "pr1123"])
def test_truncated_and_changed_files_are_named(tmp_path, name, press):
    system, write, _ = WRITERS[name]
    data = PRESS[press](
        saved(write({n: t for n, t in renamed(system, own_model(system).state_dict()).items()
            if "blocks" not in n or "blocks.1.attn" in n}, KEEP)[0]))
    path, rand = tmp_path/"model.ptz", random.Random(0)
    for cut in (0, 1, 3, 4, 30, len(data)//2, len(data)-30, len(data)-1):
        path.write_bytes(data[:cut])
        # the last byte of this old format says nothing
        if press == "lzma" and cut == len(data)-1: continue
        with pytest.raises(FormatError, match="model.ptz: "): read_published(path)
    whole, refused = read_published(data)[0], 0
    for _ in range(60):
        i = rand.randrange(len(data))
        changed = data[:i]+bytes([data[i] ^ 1 << rand.randrange(8)])+data[i+1:]
        try: got = read_published(changed)[0]
        except FormatError: refused += 1
        else: check(got, whole) # padding: nothing has changed
    assert refused


def test_fuzzed_dictionaries_raise_the_one_error():
    "Entries of every layout replaced by other plain values, under right checksums."
    junk = [None, 0, -1, 2**70, 1.5, "x", [], {}, [1, 2], {"a": torch.ones(2)}, torch.ones(2),
        torch.ones(0), torch.tensor(3, dtype=torch.int8), torch.full((4, 4), torch.nan),
            torch.ones(2).to_sparse(), torch.ones(3, dtype=torch.complex64), "float33",
            [2**40, 2**40], [0, 4], torch.empty(5, device="meta")]
    rand, read = random.Random(0), 0
    for system, write, _ in WRITERS.values():
        small = {n: t for n, t in renamed(system, own_model(system).state_dict()).items()
            if "blocks" not in n or "blocks.1.attn" in n}
        for _ in range(30):
            obj, _ = write(small, KEEP)
            top = rand.choice(list(obj))
            if isinstance(obj[top], dict) and obj[top] and rand.random() < .8:
                key = rand.choice(list(obj[top]))
                if rand.random() < .2: del obj[top][key]
                else: obj[top][key] = rand.choice(junk)
            elif rand.random() < .3: del obj[top]
            else: obj[top] = rand.choice(junk)
            try: read_published(saved(obj), 2**24)
            except FormatError as e: assert str(e).startswith("these bytes: ") and len(str(e)) < 700
            else: read += 1
    assert read < 70, "a kept tensor may be anything, but most changes must show"


@pytest.mark.slow
def test_bombs_are_bounded_in_memory_and_time():
    "In a process of its own, since the peak of memory is the process's."
    code = """if 1:
        import io, lzma, torch, zipfile, zlib, zstandard
        from pgolf.squeeze.formats import FormatError, read_published
        def deflated():
            with zipfile.ZipFile(f := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as z:
                z.writestr('archive/data.pkl', bytes(5*10**7))
            return f.getvalue()
        c = zstandard.ZstdCompressor(level=1).compressobj() # its frame does not say how long it is
        blind = c.compress(bytes(3*10**8))+c.flush()
        bombs = dict(zlib=zlib.compress(bytes(2*10**8), 9), blind=blind, zip=deflated(),
            zstd=zstandard.compress(bytes(3*10**8)), xz=lzma.compress(bytes(10**8), preset=0))
        f = io.BytesIO()
        torch.save({'__format__': 'hybrid_rans_v1', 'rans_shapes': {'a': [2**14, 2**14]},
            'rans_data': {'a': torch.zeros(4, dtype=torch.uint8)},
            'rans_counts': {'a': torch.ones(16).int()}, 'rans_alphas': {'a': 16},
            'rans_scales': {'a': torch.ones(2**14).half()}, 'passthrough': {}}, f)
        f2, one = io.BytesIO(), torch.zeros(10**5)
        torch.save({f'a{i}': one for i in range(10**4)}, f2)
        bombs |= dict(rans=f.getvalue(), shared=f2.getvalue())
        for b in bombs: bombs[b] = bytes(bombs[b])
        from conftest import no_hang
        from test_fuzz import peak_bytes
        before = peak_bytes()
        for name, b in bombs.items():
            try:
                with no_hang(250): read_published(b, 2**24)
                print(name, 'was read')
            except FormatError as e: assert 'limit=16777216' in str(e), (name, e)
        print((peak_bytes()-before)//2**20)"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT/'tests'}"),
        capture_output=True, text=True)
    assert not out.returncode, out.stderr
    assert int(out.stdout) < 200, "megabytes above what the bombs themselves took"


# ---- recipes and the command

def write_tiny(path, name="pr598", **changes):
    "A tiny model of a recipe with its system's names, plainly saved under zlib."
    cfg = at_scale(RECIPES[name], "tiny").but(**changes).model
    path.write_bytes(
        zlib.compress(saved(renamed(name.removesuffix("-as-run"), GPT(cfg, 3).state_dict()))))
    return cfg


def test_full_size_files_are_recognised_by_names_and_shapes():
    with torch.device("meta"):
        states = {n: GPT(RECIPES[n].model).state_dict()
            for n in ("pr610", "pr576", "pr598", "pr1123", "pr601")}
    configs = {n: r.model for n, r in RECIPES.items()}
    for n, state in states.items(): assert fitting(renamed(n, state), configs) == [n, f"{n}-as-run"]
    assert fitting({"tok_emb.weight": torch.ones(2, 2)}, configs) == []


def test_import_says_what_fits(main, tmp_path):
    write_tiny(tmp_path/"model.ptz")
    code, out, _ = main("import", tmp_path/"model.ptz")
    assert code == 0 and "state dict, zlib" in out
    assert ("--recipe pr598 --scale tiny" in out and "--recipe pr598-as-run --scale tiny" in out
        and "pr610" not in out)
    code, _, err = main("import", tmp_path/"model.ptz", "--out", tmp_path/"run")
    assert code == 1 and "--recipe" in err and not (tmp_path/"run").exists()


def test_import_names_what_does_not_fit(main, tmp_path):
    write_tiny(tmp_path/"model.ptz")
    code, _, err = main("import", tmp_path/"model.ptz", "--recipe", "pr610", "--scale", "tiny",
        "--out", tmp_path/"run")
    assert (code == 1 and "model.ptz" in err and "unexpected skip_gates" in err
        and "it fits --recipe pr598 --scale tiny" in err and not (tmp_path/"run").exists())
    write_tiny(tmp_path/"odd.ptz", num_layers=4, ve_layers=(2, 3))
    code, _, err = main("import", tmp_path/"odd.ptz")
    assert code == 1 and "odd.ptz" in err and "fits no recipe" in err and "-o field=value" in err
    code, _, err = main("import", tmp_path/"none.ptz")
    assert code == 1 and "none.ptz: cannot be read (No such file or directory)" in err


@pytest.mark.slow
def test_an_imported_model_is_scored_like_a_trained_one(main, tmp_path, novels):
    cfg = write_tiny(tmp_path/"model.ptz", "pr610-as-run")
    where = ("--recipe", "pr610-as-run", "--scale", "tiny", "--out", tmp_path/"run")
    code, out, err = main("import", tmp_path/"model.ptz", *where)
    assert code == 0, err
    assert f"{sum(p.numel() for p in GPT(cfg).parameters()):,} parameters" in out
    assert load_recipe(tmp_path/"run"/"recipe.json") == at_scale(RECIPES["pr610-as-run"], "tiny")
    tensors, meta = read_checkpoint(tmp_path/"run"/"weights.safetensors")
    for n, t in GPT(cfg, 3).state_dict().items():
        assert torch.equal(tensors[f"averaged/{n}"], t) and torch.equal(tensors[f"raw/{n}"], t)
    assert meta["format"] == "state dict" and meta["file"] == "model.ptz"
    assert main("import", tmp_path/"model.ptz", *where)[0] == 1, "weights are not written over"
    code, out, err = main("run", "pr610-as-run", "--scale", "tiny", "--out", tmp_path/"run",
        "--corpus", novels.path, "--eval-tokens", 256, "--quiet", "-o", "use_ttt=False")
    assert code == 0, err
    report = json.loads((tmp_path/"run"/"report.json").read_text())
    assert (report["training"]["stopped_by"] == "imported"
        and report["rows"][0]["val_bpb"] == report["rows"][1]["val_bpb"] > 3)
    assert torch.equal(
        read_checkpoint(tmp_path/"run"/"weights.safetensors")[0]["raw/tok_emb.weight"],
        tensors["raw/tok_emb.weight"])


def test_codes_survive_in_pgolfs_container():
    "What `read_stored` gives can be packed as it is."
    from pgolf.squeeze.artifact import pack, unpack
    from pgolf.squeeze.quant import Quantized
    for name in ("pr610", "pr598", "pr1123"):
        system, write, press = WRITERS[name]
        stored = read_stored(
            PRESS[press](saved(write(renamed(system, own_model(system).state_dict()), KEEP)[0])))
        half = {n: Quantized(t.codes, t.scale.half()) if isinstance(t, Quantized) else t
            for n, t in stored.tensors.items()}
        for n, t in unpack(pack(half, codec="best"))[0].items():
            want = stored.tensors[n]
            assert torch.equal(t.dequantize(), want.dequantize()) if isinstance(want,
                Quantized) else torch.equal(t, want)
