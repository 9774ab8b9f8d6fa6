"Situations of public reports, made anew: runs, data and commands as people meet them."
import bz2
import gzip
import hashlib
import json
import lzma
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import zstandard
from conftest import ROOT
from test_faults import refused

from pgolf.command.options import resolve
from pgolf.scale.notebook import execute
from pgolf.score import compare as scoring
from pgolf.squeeze.artifact import peek
from pgolf.game.bpb import byte_tables
from pgolf.game.data import build_dataset, check_charge, data_notes, open_dataset
from pgolf.game.shards import write_shard
from pgolf.game.documents import read_documents
from pgolf.systems.ownership import claim, release
from pgolf.speed.peer import load_peer
from pgolf.systems.pipeline import run, start
from pgolf.systems.recipe import check_value
from pgolf.systems.recipes import RECIPES, at_scale, get_recipe
from pgolf.game.tokenizer import encode_document, train_tokenizer

WORDS = ("the a river house walks under light stone green seven often carries water morning "
         "paper small engine north bright").split()


def prose(seed, lines, words=WORDS):
    "Lines of forty words."
    pick = random.Random(seed).choice
    return "\n".join(" ".join(pick(words) for _ in range(40)).capitalize() + "."
        for _ in range(lines))


def made(path, seed, tail=""):
    "A small dataset; with another tail its tokenizer has as many pieces and other ones."
    other = [w + tail for w in WORDS]
    return build_dataset([prose(seed, 150, other)], [prose(seed+1, 12, other)],
        path, vocab_size=300)


def small(data, out, *more):
    "A run of one step."
    about = ("--scale", "tiny", "--steps", 1, "--eval-tokens", 200, "--quiet")
    return ("run", "pr610", *about, "--corpus", data.path, "-o", "vocab_size=300",
        "--out", out, *more)


def contents(folder):
    "Every file below a folder, by its checksum."
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory): return made(tmp_path_factory.mktemp("data")/"mine", 1)


@pytest.fixture(scope="module")
def twin(tmp_path_factory): return made(tmp_path_factory.mktemp("data")/"other", 1, tail="q")


@pytest.fixture(scope="module")
def kept(data, tmp_path_factory):
    "A finished run; nobody changes it."
    recipe = resolve("pr610", "tiny", dict(vocab_size=300), steps=1)
    out = tmp_path_factory.mktemp("runs")/"kept"
    run(start(recipe, data, out, "cpu", 200, progress=False))
    return out


@pytest.fixture
def done(kept, tmp_path): return shutil.copytree(kept, tmp_path/"done")


# ---- 01: nothing finished is removed by a command that was not told to

def test_a_finished_run_is_shown_and_not_run_again(main, done, data):
    before = contents(done)
    code, out, err = main(*small(data, done))
    assert code == 0 and "nothing was run" in err and "adapted" in out and "files in" in out
    assert contents(done) == before and not (done/"lock").exists()


OTHER_RUNS = {
    "setting": (("-o", "matrix_lr=0.09"), "matrix_lr: 0.025 there, 0.09 here"),
    "seed": (("--seed", 7), "seed: 1337 there, 7 here"),
    "length": (("--steps", 2), "iterations: 1 there, 2 here"),
    "scale": (("--scale", "pocket"), "scale: tiny there, pocket here"),
    "part of the text": (("--eval-tokens", 100), "targets scored: 200 there, 100 here"),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_another_run_leaves_a_finished_one_alone(name, main, done, data):
    more, says = OTHER_RUNS[name]
    before = contents(done)
    refused(main(*small(data, done, *more)), str(done), "finished run", says,
        "--out", "--overwrite")
    assert contents(done) == before


def test_another_system_leaves_a_finished_one_alone(main, done, data):
    before, args = contents(done), list(small(data, done))
    args[1] = "pr576"
    refused(main(*args), "recipe: pr610 there, pr576 here", "--overwrite")
    assert contents(done) == before


def test_other_data_leave_a_finished_run_alone(main, done, twin):
    before = contents(done)
    refused(main(*small(twin, done)), "fingerprint", "mine", "other", "--overwrite")
    assert contents(done) == before


def test_overwrite_sets_the_old_run_aside(main, done, data):
    before = contents(done)
    assert main(*small(data, done, "--overwrite", "--seed", 7))[0] == 0
    assert contents(done.with_name("done.old-1")) == before
    assert json.loads((done/"report.json").read_text())["seed"] == 7


def test_a_finished_run_without_its_artifact_is_not_begun_anew(main, done, data):
    (done/"model.pgolf").unlink()
    refused(main(*small(data, done)), "model.pgolf is not the file", "--overwrite")
    assert (done/"weights.safetensors").exists()


OWNER = (
    "import sys,time; from pgolf.systems.ownership import claim; claim(sys.argv[1]); print(1,"
    " flush=True)"
)


def test_one_process_owns_a_folder(main, data, tmp_path):
    out = tmp_path/"run"
    out.mkdir()
    command = [sys.executable, "-c", OWNER + "; time.sleep(600)", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as owner:
        try:
            owner.stdout.readline()
            refused(main(*small(data, out)), "in use by process", str(owner.pid), "--out")
        finally: owner.kill()
    assert [p.name for p in out.iterdir()] == ["lock"], "as a killed owner leaves it"
    assert main(*small(data, out))[0] == 0


def test_a_refused_start_gives_the_folder_back(main, done, data):
    refused(main(*small(data, done, "--seed", 5)), "finished run")
    claim(done)
    release(done)
    assert not (done/"lock").exists()


@pytest.mark.slow
def test_results_of_other_commands_are_kept(coarse, main, done, tmp_path):
    squeeze = ("squeeze", done, "--samples", 1, "--min-numel", 20_000)
    assert main(*squeeze)[0] == 0
    first = (done/"squeezed.pgolf").read_bytes()
    refused(main(*squeeze), "squeezed.pgolf exists", "--out", "--overwrite")
    assert main(*squeeze, "--overwrite", "--corpus", "none")[0] == 0
    assert (done/"squeezed.pgolf.old-1").read_bytes() == first
    for name in ("bench.json", "bench.svg"):
        (tmp_path/name).write_text("mine")
        option = "--json" if name.endswith("json") else "--figure"
        refused(main("bench", "--only", "loader", option, tmp_path/name), "exists", option)
        assert (tmp_path/name).read_text() == "mine"


def test_import_leaves_an_unfinished_run_alone(main, done, tmp_path):
    from pgolf.model.gpt import GPT
    torch.save(GPT(at_scale(get_recipe("pr610"), "tiny").model).state_dict(), tmp_path/"theirs.pt")
    for name in ("weights.safetensors", "model.pgolf"): (done/name).unlink()
    (done/"checkpoint.safetensors").write_text("hours of work")
    before = contents(done)
    args = ("import", tmp_path/"theirs.pt", "--recipe", "pr610", "--scale", "tiny")
    refused(main(*args, "--out", done), "exists", "--out")
    assert contents(done) == before


NOTEBOOK = """
from pgolf.systems.ownership import open_corpus
from pgolf.systems import pipeline
from pgolf.command.options import resolve
r = resolve("pr610", "tiny", dict(vocab_size=300), seed, steps=1)
job = pipeline.start(r, open_corpus(corpus), out, "cpu", 200, lines=True)
curve = pipeline.train_weights(job)
codes,errors = pipeline.write_artifact(job)
scores = pipeline.score_all(job, codes)
print(f"{scores['sliding'].val_bpb:.6f}")
"""


@pytest.mark.slow
def test_a_run_notebook_over_its_finished_run(data, tmp_path):
    "The result is reused; a notebook that fails over it does not replace the executed one."
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    head = new_code_cell("seed = 1337\ncorpus = ''\nout = ''", metadata=dict(tags=["parameters"]))
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nb = new_notebook(cells=[head, new_code_cell(NOTEBOOK)], metadata=kernel)
    nbformat.write(nb, tmp_path/"60_mine.ipynb")
    out = tmp_path/"run"
    def go(seed):
        about = dict(seed=seed, corpus=str(data.path), out=str(out))
        copy = execute(tmp_path/"60_mine.ipynb", out, about)
        return nbformat.read(copy, 4).cells[-1].outputs[-1].text.splitlines()[-1]
    first, stamp = go(1337), (out/"model.pgolf").stat().st_mtime_ns
    assert go(1337) == first and (out/"model.pgolf").stat().st_mtime_ns == stamp
    before = (out/"60_mine.ipynb").read_bytes()
    with pytest.raises(RuntimeError, match="seed: 1337 there, 5 here.*partial"): go(5)
    assert (out/"60_mine.ipynb").read_bytes() == before


# ---- 03: data and model are matched by fingerprint; a run's own data is the default

def test_no_command_takes_data_of_another_tokenizer(main, done, twin, tmp_path):
    before = contents(done)
    for source in (done, done/"model.pgolf", shutil.copy(done/"model.pgolf", tmp_path/"a.pgolf")):
        for command in (("score",), ("squeeze", "--samples", 1), ("audit",)):
            said = refused(main(command[0], source, "--corpus", twin.path, *command[1:]),
                "--corpus")
            assert "another tokenizer" in said or "was not run on the data" in said
    weights = ("squeeze", done/"weights.safetensors", "--corpus", twin.path)
    refused(main(*weights), "another tokenizer")
    assert contents(done) == before and {p.name for p in tmp_path.iterdir()} == {"done", "a.pgolf"}


@pytest.mark.slow
def test_a_run_is_scored_on_its_own_data(coarse, main, done, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sliding = next(r for r in json.loads((done/"report.json").read_text())["rows"]
                   if r["stage"] == "sliding")
    for source in (done, done/"model.pgolf"):
        code, out, err = main("score", source, "--tokens", 200, "--quiet")
        assert code == 0 and f"val_bpb {sliding['val_bpb']:.4f}" in out and not err
    assert main("squeeze", done, "--samples", 1, "--min-numel", 20_000)[0] == main("audit", done,
        "--places", 1)[0] == 0
    assert peek(done/"squeezed.pgolf")[0]["tokenizer_id"] == peek(
        done/"model.pgolf")[0]["tokenizer_id"]
    assert not (tmp_path/"data").exists(), "the embedded novels were unpacked"


def test_where_nobody_kept_the_data_none_is_guessed(main, done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (done/"data.json").unlink()
    for command in ("score", "squeeze", "audit"):
        refused(main(command, done), "was made on mine", "--corpus")


def test_data_that_moved_or_changed_are_named(main, data, tmp_path):
    own = open_dataset(shutil.copytree(data.path, tmp_path/"mine"))
    assert main(*small(own, tmp_path/"run"))[0] == 0
    own.path.rename(tmp_path/"moved")
    refused(main("score", tmp_path/"run"), "not there any more", "--corpus")
    made(tmp_path/"mine", 5)
    refused(main("score", tmp_path/"run"), "other data than", "--corpus")


# ---- 07: every command takes a run's folder or an artifact alike

@pytest.mark.slow
def test_folder_and_artifact_alike(coarse, main, done):
    quick = ("--samples", 1, "--min-numel", 20_000)
    assert main("squeeze", done, *quick)[0] == 0
    squeezed, own = done/"squeezed.pgolf", done/"model.pgolf"
    for command in (("score", "--tokens", 100, "--quiet"), ("audit", "--places", 1)):
        for source in (done, own, squeezed): assert main(command[0], source, *command[1:])[0] == 0
    for source in (done, own, squeezed):
        args = ("plan", "pr610", "--scale", "tiny", "-o", "vocab_size=300", "--run", source)
        assert f"{peek(own if source == done else source)[1][0].stored:,}" and main(*args)[0] == 0
        assert main("squeeze", source, *quick, "--out", done/f"of-{source.name}")[0] == 0
    assert main("report", own)[1].count("pr610") >= 1
    packed = ("--author", "A", "--github-id", "a")
    assert main("pack", own, "--out", done/"folder", *packed)[0] == 0
    refused(main("pack", squeezed, "--out", done/"no", *packed), "squeezed.pgolf",
        "folder of a finished run")
    refused(main("score", done/"nothing"), "nothing")


# ---- 09: what the library leaves out is not left out

def test_lines_of_any_length_reach_the_tokenizer(main, tmp_path):
    (tmp_path/"one.txt").write_text(prose(1, 200).replace("\n", " "))
    (tmp_path/"val.txt").write_text(prose(2, 9))
    args = ("--vocab-size", 320, "--val", tmp_path/"val.txt")
    assert main("data", "build", tmp_path/"a", "--train", tmp_path/"one.txt", *args)[0] == 0
    long, lines = (tmp_path/n for n in ("long.model", "lines.model"))
    text = prose(1, 200).lower().replace(".", "")
    short = train_tokenizer(text.splitlines(), lines, 320)
    whole = train_tokenizer([text.replace("\n", " "), "zebra"], long, 320)
    assert len(whole.encode(text)) <= 1.02*len(short.encode(text)), "the long line was left out"


@pytest.mark.parametrize("size, says", [(8192, "smaller vocabulary"), (262, "larger vocabulary")])
def test_no_text_of_the_library_reaches_the_user(main, tmp_path, size, says):
    (tmp_path/"t.txt").write_text(prose(1, 20))
    args = ("--train", tmp_path/"t.txt", "--val", tmp_path/"t.txt", "--vocab-size", size)
    said = refused(main("data", "build", tmp_path/"d", *args), f"vocab_size={size}", says)
    assert not any(w in said for w in (".cc", "Internal", "[", "trainer_spec"))


# ---- 10: formats by content and usual names

DOCS = [prose(i, 1) for i in range(5)]
LINES = "\n".join(json.dumps(dict(text=d)) for d in DOCS).encode()
ZSTD = zstandard.ZstdCompressor().compress
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": ZSTD, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.ndjson", "x.json", "x.txt", "x"])
def test_documents_by_any_name(name, packed, tmp_path):
    (tmp_path/f"{name}{packed}").write_bytes(PACKED[packed](LINES))
    assert read_documents([tmp_path/f"{name}{packed}"]) == DOCS


@pytest.mark.parametrize("pack", [p for p in PACKED.values() if p is not bytes])
def test_joined_frames_are_read_to_the_end(pack, tmp_path):
    (tmp_path/"x").write_bytes(pack(LINES+b"\n") + pack(LINES))
    assert read_documents([tmp_path/"x"]) == DOCS + DOCS
    (tmp_path/"x").write_bytes(pack(LINES)[:-9])
    with pytest.raises(ValueError, match="damaged or cut off"): read_documents([tmp_path/"x"])


def test_a_list_and_a_mark_of_byte_order(tmp_path):
    (tmp_path/"x.json").write_text(json.dumps([dict(text=d) for d in DOCS], indent=1))
    (tmp_path/"y.jsonl").write_bytes(b"\xef\xbb\xbf"+LINES.replace(b"\n", b"\r\n"))
    assert read_documents([tmp_path/"x.json"]) == read_documents([tmp_path/"y.jsonl"]) == DOCS


STRANGE = {
    "parquet": (b"PAR1"+bytes(99), "a Parquet table"),
    "zip": (b"PK\3\4"+bytes(99), "a zip archive"),
    "UTF-16": ("text".encode("utf-16"), "UTF-16"), "zeros": (bytes(300), "zero bytes"),
    "Latin-1": (b"caf\xe9", "not UTF-8"), "empty": (b" \n", "is empty"),
    "half a character": (b'{"text": "a \\ud83d b"}', "half a character"),
    "other key": (b'{"txt": "a"}', 'line 1: expected a JSON object with a "text"'),
    "cut line": (LINES[:-5], "line 5"), "number": (b'{"text": 5}', "expected a string"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_text_is_named(name, main, tmp_path):
    content, says = STRANGE[name]
    (tmp_path/"x.jsonl").write_bytes(content)
    (tmp_path/"v.txt").write_text(prose(1, 3))
    args = ("--train", tmp_path/"v.txt", "--val", tmp_path/"x.jsonl", "--vocab-size", 300)
    refused(main("data", "build", tmp_path/"d", *args), "x.jsonl", says)
    assert not (tmp_path/"d").exists()


# ---- 12: what a manifest promises is checked when it is opened

def shorten(path, n): write_shard(path, np.fromfile(path, "<u2")[512:512+n])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def promise(d, **stats):
    path = d.path/"manifest.json"
    manifest = json.loads(path.read_text())
    manifest["datasets"][0]["stats"] |= stats
    path.write_text(json.dumps(manifest))


SPOILED = {
    "short validation": (lambda d: shorten(d.val_shards[0], 200), "200 tokens, expected"),
    "short training": (lambda d: shorten(d.train_shards[0], 900), "900 tokens, expected"),
    "flipped bit, validation": (lambda d: flip(d.val_shards[0]), "not the file that was built"),
    "flipped bit, training": (lambda d: flip(d.train_shards[0]), "not the file that was built"),
    "more promised": (lambda d: promise(d, tokens_val=10**6), "1000000 by the manifest"),
    "a shard promised": (lambda d: promise(d, files_val=2), "no shard at"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_promises_of_the_manifest(name, main, data, done, tmp_path):
    spoil, says = SPOILED[name]
    mine = open_dataset(shutil.copytree(data.path, tmp_path/"mine"))
    spoil(mine)
    refused(main(*small(mine, tmp_path/"run")), says)
    for command in ("score", "squeeze", "audit"):
        refused(main(command, done, "--corpus", mine.path), says)
    assert not (tmp_path/"run").exists()


# ---- 13: the denominator is the original text, or an error

def marked(text): return "".join("\ue001"+c.lower() if c.isupper() else c for c in text)


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory):
    "Data whose capitals are marks, as a folder, and the original held-out text."
    text = "Alice met BOB in Paris and LEFT early. "*30
    d = build_dataset([marked(prose(i, 3).title()) for i in range(40)], [marked(text).strip()],
                      tmp_path_factory.mktemp("marked")/"d", vocab_size=300)
    return d, text.strip()


def sidecar(d, text):
    "Bytes of the original that each token stands for."
    sp, ids = d.tokenizer(), d.val_tokens().tolist()
    charged = [0]
    for n in range(1, len(ids)): # a mark costs nothing
        spelt = [sp.decode(ids[1:k]).replace("\ue001", "") for k in (n, n+1)]
        charged.append(len(spelt[1].encode())-len(spelt[0].encode()))
    assert sum(charged) == len(text.encode())
    return np.array(charged)


def test_marks_without_a_sidecar_are_refused(main, rewritten, tmp_path):
    d, text = rewritten
    refused(main(*small(d, tmp_path/"run")), "rewritten before encoding", "_val_bytes_")
    assert any("private-use" in note for note in data_notes(d)) and not (tmp_path/"run").exists()


def test_a_sidecar_is_the_denominator(main, rewritten, tmp_path):
    d, text = rewritten
    d = open_dataset(shutil.copytree(d.path, tmp_path/"d"))
    beside = tmp_path/"d"/"datasets"/"d"/"d_val_bytes_000000.bin"
    write_shard(beside, sidecar(d, text))
    assert main(*small(d, tmp_path/"run", "--eval-tokens", 0))[0] == 0
    for row in json.loads((tmp_path/"run"/"report.json").read_text())["rows"]:
        assert row["text_bytes"] == len(text.encode())
    code, out, _ = main("audit", tmp_path/"run", "--places", 1)
    said = " ".join(out.split())
    assert code == 0 and "how it was rewritten is not known" in said, out
    verdict = json.loads((tmp_path/"run"/"audit.json").read_text())
    assert [f["status"] for f in verdict["findings"] if f["name"] == "D7"] == ["not applicable"]


SIDECARS = {
    "another length": (lambda n: n[:-1], "has "),
    "the tokens themselves": (lambda n: n+3, "control tokens"),
    "nothing": (lambda n: 0*n, "charges no bytes"),
}


@pytest.mark.parametrize("name", SIDECARS)
def test_a_sidecar_that_is_none(name, main, rewritten, tmp_path):
    change, says = SIDECARS[name]
    d = open_dataset(shutil.copytree(rewritten[0].path, tmp_path/"d"))
    write_shard(tmp_path/"d"/"datasets"/"d"/"d_val_bytes_000000.bin", change(sidecar(*rewritten)))
    refused(main(*small(d, tmp_path/"run")), "d_val_bytes_000000.bin", says)


TOKENIZERS = {
    "as here": {}, "words in one piece": dict(split_by_whitespace=False),
    "many spaces": dict(user_defined_symbols=["▁▁▁▁", "▁▁"], remove_extra_whitespaces=False),
    "no space in front": dict(add_dummy_prefix=False),
    "identity": dict(normalization_rule_name="identity"),
    "space behind": dict(treat_whitespace_as_suffix=True), "unigram": dict(model_type="unigram"),
    "characters": dict(model_type="char"),
    "words of its own": dict(user_defined_symbols=["<cap>", "é"]),
    "no bytes": dict(byte_fallback=False, vocab_size=90), "no BOS": dict(bos_id=-1),
    "a unit for unknown": dict(byte_fallback=False, vocab_size=90, unk_surface="?"),
    "spaces kept": dict(remove_extra_whitespaces=False, escape_whitespaces=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_byte_tables_count_the_text_of_any_tokenizer_or_refuse(name, tmp_path):
    text = prose(1, 60) + "\nA naïve café,  two  spaces\n"*5
    texts = [prose(2, 2), "  indented    code\tand tabs", "A café 漢字 🙂 <cap> été", " "]
    options = dict(vocab_size=420, hard_vocab_limit=False) | TOKENIZERS[name]
    try: sp = train_tokenizer(text.splitlines(), tmp_path/"t.model", **options)
    except ValueError as e: return pytest.skip(f"no such tokenizer: {e}")
    refusals, counted = 0, 0
    for t in texts:
        try:
            tables = byte_tables(sp)
            ids = torch.from_numpy(encode_document(sp, t).astype(np.int64))
            check_charge(sp, tables, ids, "here")
        except ValueError: refusals += 1; continue
        counted += 1
        assert int(tables.count(ids[:-1], ids[1:]).sum()) == len(sp.decode(ids.tolist()).encode())
    assert counted or refusals == len(texts)
    assert name not in ("as here", "words in one piece", "identity") or not refusals


def test_marks_spelt_in_bytes_are_refused(tmp_path):
    "A tokenizer that has never seen the marks spells them byte by byte."
    sp = train_tokenizer(prose(1, 60).splitlines(), tmp_path/"t.model", 300)
    ids = torch.from_numpy(encode_document(sp, marked("Alice Met Bob ")*9).astype(np.int64))
    with pytest.raises(ValueError, match="rewritten"):
        check_charge(sp, byte_tables(sp), ids, "here")


# ---- 14: every override is validated before any work

TUPLES = ["eval_rules=[('attn',31)]", "rules=[('attn',31)]", "ve_layers=('a',)", "ve_layers=[99]",
    "ttt_temperatures=('a',)", "ttt_temperatures=[0]", "groups=[1]", "groups=()",
    "ttt_lr_mult=[('x',)]",
    "rules=[('(',None)]", "rules=()", "rules=5", "qat_rules=[('x',{'lo':3})]",
    "keep_float32=(", "ttt_only=zzz",
    "matrix_lr=nan", "ema_decay=2", "grad_clip_norm=-inf", "swa_every=-1", "seed=-1",
    "seed=1e3", "rules=["]


@pytest.mark.parametrize("override", TUPLES)
def test_overrides_are_checked_before_any_work(override, main, data, tmp_path):
    name = override.split("=")[0]
    refused(main(*small(data, tmp_path/"run", "-o", override)),
        "no rule matches" if override == "rules=()" else name)
    assert not (tmp_path/"run").exists()


def test_every_setting_that_is_a_list_knows_its_items():
    r = get_recipe("pr610")
    lists = [n for n, v in r.settings().items() if isinstance(v, (tuple, list))]
    assert len(lists) >= 9
    for name in lists:
        for wrong in ((object(),), ("a", 1, None), ({"no": 1},), (None,), ((("a",),),)):
            with pytest.raises(ValueError, match=name.split(".")[-1]+".*write it like"):
                check_value(name.split(".")[-1], wrong)


def test_all_recipes_pass_the_checks():
    for r in RECIPES.values():
        for name, value in r.settings().items():
            assert check_value(name, value) == value


def test_a_failed_start_blocks_nothing(main, data, tmp_path):
    out = tmp_path/"run"
    refused(main(*small(data, out, "-o", "rules=[('attn',31)]")), "rules")
    refused(main(*small(data, out, "--seed", 99999999999999999999)), "seed=", "expected 0 to")
    out.mkdir()
    # an older version's failed start
    for name in ("report.json", "recipe.json"): (out/name).write_text("{}")
    assert main(*small(data, out))[0] == 0


# ---- 20: messages

def test_messages_say_what_is_wrong(coarse, main, done, tmp_path, monkeypatch):
    refused(main("squeeze", done, "--samples", -3), "samples=-3", "1 window or more")
    # recipe.json lies beside it
    assert main("squeeze", done/"weights.safetensors", "--corpus", "none")[0] == 0
    shutil.copy(done/"weights.safetensors", tmp_path/"w.safetensors")
    refused(main("squeeze", tmp_path/"w.safetensors"), "--recipe and --scale")
    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(scoring, "score", stop)
    code, _, err = main("score", done, "--tokens", 50, "--quiet")
    assert code == 130 and "nothing is kept; with --save FILE" in err
    code, _, err = main("score", done, "--tokens", 50, "--quiet", "--save", tmp_path/"s.npz")
    assert code == 130 and "the same command goes on" in err


def test_a_given_tokenizer_says_its_size(main, data, tmp_path):
    (tmp_path/"t.txt").write_text(prose(1, 9))
    args = ("--train", tmp_path/"t.txt", "--val", tmp_path/"t.txt", "--tokenizer",
        data.tokenizer_path)
    assert main("data", "build", tmp_path/"d", *args)[0] == 0
    assert open_dataset(tmp_path/"d").vocab_size == 300
    refused(main("data", "build", tmp_path/"e", *args, "--vocab-size", 512), "300", "512")


@pytest.mark.parametrize("text, says",
    [("class A[T]: pass\ndef f(: pass", "line"), ("x = = 1", "Python")])
def test_a_script_for_another_python_is_told_so(text, says, tmp_path):
    (tmp_path/"train_gpt.py").write_text(text)
    with pytest.raises(ValueError, match=rf"{says}.*newer Python"):
        load_peer(tmp_path/"train_gpt.py")
    (tmp_path/"train_gpt.py").write_text("from typing import not_there_yet")
    with pytest.raises(ValueError, match="newer Python"): load_peer(tmp_path/"train_gpt.py")


# ---- smaller ones

def test_shared_text_is_said_when_built_and_when_run(main, tmp_path):
    (tmp_path/"a.txt").write_text(prose(1, 150))
    (tmp_path/"b.txt").write_text("\n".join(prose(1, 150).splitlines()[:5]) + "\n" + prose(2, 5))
    args = ("--train", tmp_path/"a.txt", "--vocab-size", 300)
    code, out, _ = main("data", "build", tmp_path/"d", "--val", tmp_path/"a.txt", *args)
    assert code == 0 and "1 held-out documents are training documents too" in out
    _, out, _ = main("data", "build", tmp_path/"e", "--val", tmp_path/"b.txt", *args)
    assert "5 of 10 long held-out lines stand in the training text too" in out
    code, _, err = main(*small(open_dataset(tmp_path/"e"), tmp_path/"run"))
    assert code == 0 and "5 of 10 long held-out lines" in err


def test_lost_whitespace_is_said_when_built(main, tmp_path):
    code = "\n".join(f"def f{i}(x):\n        if x:\n                return {i}" for i in range(400))
    (tmp_path/"a.txt").write_text(code)
    (tmp_path/"v.txt").write_text(prose(1, 3))
    args = ("--train", tmp_path/"a.txt", "--val", tmp_path/"v.txt", "--vocab-size", 300)
    assert "bytes of the training text are in its tokens" in main("data", "build",
        tmp_path/"d", *args)[1]
    assert data_notes(made(tmp_path/"clean", 3)) == []


def test_texts_that_encode_to_nothing(main, data, tmp_path):
    (tmp_path/"v.txt").write_text("\u200b\u200b")
    (tmp_path/"t.txt").write_text(prose(1, 3))
    args = ("--train", tmp_path/"t.txt", "--val", tmp_path/"v.txt", "--tokenizer",
        data.tokenizer_path)
    refused(main("data", "build", tmp_path/"d", *args), "encode to nothing")
    assert not (tmp_path/"d").exists()


@pytest.mark.parametrize("name",
    ["a_train_b", "x_val_y", "with space", "d.jsonl", "_val_bytes_", "ä漢"])
def test_odd_names_of_datasets(name, main, tmp_path):
    d = made(tmp_path/name, 1)
    assert main(*small(d, tmp_path/"run"))[0] == 0 and main("score", tmp_path/"run",
        "--tokens", 9)[0] == 0


def mirror(d, root):
    "A folder laid out as the hub's."
    name = "fineweb10B_sp300"
    (root/"datasets"/"datasets").mkdir(parents=True)
    shutil.copytree(d.path/"tokenizers", root/"datasets"/"tokenizers")
    for split, files in (("train", d.train_shards), ("val", d.val_shards)):
        for i, p in enumerate(files):
            to = root/"datasets"/"datasets"/name/f"fineweb_{split}_{i:06d}.bin"
            to.parent.mkdir(exist_ok=True)
            shutil.copy(p, to)
    manifest = json.loads((d.path/"manifest.json").read_text())
    for split in ("train", "val"):
        manifest["datasets"][0][f"{split}_glob"] = f"datasets/{name}/fineweb_{split}_*.bin"
    manifest["datasets"][0] |= dict(name=name)
    (root/"datasets"/"manifest.json").write_text(json.dumps(manifest))
    return root


def test_another_repository_and_a_flipped_bit(main, data, tmp_path):
    "What was fetched is held against its checksum when fetched again, and brought anew."
    hub, here = mirror(data, tmp_path/"hub"), tmp_path/"here"
    args = ("data", "fineweb", "--variant", "sp300", "--path", here)
    assert main(*args, "--repo", hub)[0] == 0
    shard = here/"datasets"/"fineweb10B_sp300"/"fineweb_val_000000.bin"
    good = shard.read_bytes()
    flip(shard)
    refused(main(*small(data, tmp_path/"run", "--corpus", here)), "SHA-256")
    assert main(*args, "--repo", hub)[0] == 0 and shard.read_bytes() == good
    refused(main(*args, "--repo", tmp_path/"nothing"), "nothing", "mirrors the hub")


def test_an_address_of_another_hub_is_used(monkeypatch, main, tmp_path):
    asked = []
    def fetch(remote, folder, repo, endpoint):
        asked.append((repo, endpoint))
        raise ConnectionError("no")
    monkeypatch.setattr("pgolf.game.fineweb._fetch", fetch)
    refused(main("data", "fineweb", "--repo", "me/mine", "--endpoint", "http://here", "--path",
        tmp_path/"d"), "no")
    assert asked == [("me/mine", "http://here")]
