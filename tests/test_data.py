"Bytes, tokenizer and data against the reference files, the hub's protocol and full disks."
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import CLEAN
from hypothesis import example, given, settings, strategies as st

from pgolf.game import data
from pgolf.game.bpb import byte_tables, compressor_bpb
from pgolf.game.data import austen, austen_documents, build_dataset, open_dataset
from pgolf.game.shards import BatchLoader, ShardError, read_shard, write_shard
from pgolf.game.fineweb import download_fineweb
from pgolf.game.tokenizer import encode_document, load_tokenizer, train_tokenizer


def counted(sp, tables, text):
    ids = torch.from_numpy(encode_document(sp, text).astype(np.int64))
    return int(tables.count(ids[:-1], ids[1:]).sum())


def test_byte_tables_equal_the_published_ones(shared, golden):
    tables,want = (byte_tables(load_tokenizer(shared/"data/fineweb_1024_bpe.model", 1024)),
        golden("functions"))
    for name,table in dict(base=tables.base_bytes, leading_space=tables.has_leading_space,
        boundary=tables.is_boundary).items():
        assert table.numpy().dtype == want[f"bytes/{name}"].dtype
        assert (table.numpy() == want[f"bytes/{name}"]).all()


# a lone surrogate is left out: no UTF-8 file can hold one
@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)),
    max_size=80) | st.text("ab \t\n\0▁é½ﬁ😀\u200b\u3000", max_size=80))
@example("▁▁a ▁ b")
@example(" \u200b ")
@example("<s></s><unk><0x41>")
def test_bytes_are_those_of_the_decoded_text(novels, text):
    sp = novels.tokenizer()
    assert counted(sp, novels.byte_tables(), text) == len(sp.decode(sp.encode(text)).encode())


def test_official_tokenizers_count_the_decoded_text(shared):
    docs = [json.loads(line)["text"] for line in open(shared/"data/fineweb_docs.sample.jsonl",
        encoding="utf-8")]
    for size in (1024, 8192):
        sp = load_tokenizer(shared/f"data/fineweb_{size}_bpe.model", size)
        tables = byte_tables(sp)
        for text in docs:
            assert counted(sp, tables, text) == len(sp.decode(sp.encode(text)).encode())


def test_trainer_options_match_the_official_model(shared, novels):
    "Normalisation and the special pieces; the vocabulary itself depends on the text."
    ours,theirs = novels.tokenizer(),load_tokenizer(shared/"data/fineweb_1024_bpe.model")
    assert [ours.id_to_piece(i) for i in range(260)] == [theirs.id_to_piece(i) for i in range(260)]
    for text in ("a  b\tc\n", "ﬁ…½", "£5 1999", "\u200bx", "▁▁a"):
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert not [p for i in range(260, 1024)
        if re.search(r"\d.|.\d", p := ours.id_to_piece(i).lstrip("▁"))]


def test_official_shard_opens(shared):
    path = shared/"data/fineweb_val_000000.sample.bin"
    tokens = read_shard(path, vocab_size=1024)
    assert len(tokens) == 700_329 and tokens[0] == 1 and int((tokens == 1).sum()) == 625
    with pytest.raises(ShardError,
        match=r"fineweb_val_000000.sample.bin: token id .* expected ids below vocab_size=512"):
        read_shard(path, 512)
    sp = load_tokenizer(shared/"data/fineweb_1024_bpe.model", 1024)
    first = tokens[:int(np.flatnonzero(tokens == 1)[1])]
    assert (encode_document(sp, sp.decode([int(i) for i in first])) == first).all()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    world=st.sampled_from((1, 2, 4, 8)), rows=st.integers(1, 3),
    seq_len=st.integers(1, 9), skip=st.integers(0, 500))
def test_any_split_reads_the_same_spans(tmp_path_factory, lengths, world, rows, seq_len, skip):
    folder,paths,at = tmp_path_factory.mktemp("split"),[],0
    for i,n in enumerate(lengths):
        write_shard(folder/f"{i}.bin", np.arange(at, at+n)); at += n
        paths.append(folder/f"{i}.bin")
    span = rows*seq_len+1
    ranks = [BatchLoader(paths, 8*rows*seq_len, seq_len, rank=r, world=world, position=skip)
        for r in range(world)]
    for step in range(2):
        got = [r.next_step() for r in ranks]
        assert {len(g) for g in got} == {8//world}
        for k,(x,y) in enumerate(pair for micro in zip(*got) for pair in micro):
            want = [(skip+(8*step+k)*span+i)%at for i in range(span)]
            assert x.shape == y.shape == (rows, seq_len)
            assert x.flatten().tolist() == want[:-1] and y.flatten().tolist() == want[1:]
    assert {r.position for r in ranks} == {skip+16*span}


def test_embedded_text_is_the_source(shared):
    for path in sorted((shared/"data/austen").glob("*.txt")):
        source,ours = path.read_text("utf-8"),data.austen_text(path.stem)
        if path.stem == "northanger_abbey":
            source = source[:source.index("A NOTE ON THE TEXT")].rstrip()+"\n"
        assert ours == source


def test_chapters_keep_every_word():
    for split,names in data.AUSTEN.items():
        text = " ".join(data.austen_text(n) for n in names).split()
        kept = " ".join(austen_documents(split)).split()
        assert len(kept) > .998*len(text)


def test_compressors_reach_what_they_should(shared):
    got = compressor_bpb((shared/"data/austen/persuasion.txt").read_bytes())
    assert {k: round(v, 2) for k,v in got.items()} == {"gzip -9": 2.93,
        "zstd -22": 2.50, "xz -9e": 2.47}


def test_austen_is_the_same_every_time(novels, tmp_path):
    again = austen(tmp_path/"austen_sp1024")
    for a,b in zip(novels.train_shards+novels.val_shards+(novels.tokenizer_path,),
        again.train_shards+again.val_shards+(again.tokenizer_path,)):
        assert a.read_bytes() == b.read_bytes()


def _build(path): return austen(path).vocab_size


@pytest.mark.slow
def test_concurrent_builders_share_one_dataset(tmp_path):
    path = tmp_path/"data"/"austen_sp1024"
    with CLEAN.Pool(2) as pool: assert pool.map(_build, [path]*2) == [1024, 1024]
    assert [p.name for p in path.parent.iterdir()] == ["austen_sp1024"]
    assert len(open_dataset(path).val_tokens()) > 160_000


def test_dataset_of_another_vocabulary_is_refused(novels, tmp_path):
    made = build_dataset(["some words here "*30], ["more words"], tmp_path/"d", vocab_size=1024,
        tokenizer=novels.tokenizer_path)
    train_tokenizer([d for d in austen_documents("val")], made.tokenizer_path, 512,
        max_sentence_length=10**6)
    with pytest.raises(ValueError, match="512 pieces, expected vocab_size=1024"):
        open_dataset(tmp_path/"d")
    made.tokenizer_path.unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*pgolf data build"):
        open_dataset(tmp_path/"d")


def test_broken_manifest_names_itself(tmp_path):
    for text in (
        "{",
        "[]",
        "{}",
        (
            '{"datasets": [{"name": "x", "tokenizer_name": "t"}], "tokenizers": [{"name": "t",'
            ' "model_path": "m"}]}'
        ),
    ):
        (tmp_path/"manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json"): open_dataset(tmp_path)


# --- a full disk: the kernel refuses to let a file grow beyond the limit ---

FULL = """
import resource, signal, sys
from pathlib import Path
from pgolf.game.data import austen
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: austen(Path(sys.argv[1])/"austen_sp1024")
except OSError as e: print(e)
"""


def test_full_disk_leaves_nothing(tmp_path):
    said = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True,
        check=True).stdout
    assert "while writing" in said and "free some space" in said
    assert list(tmp_path.iterdir()) == []


# --- the hub, played on a loopback socket ---

class Hub(BaseHTTPRequestHandler):
    "The two routes that hf_hub_download uses: HEAD and GET of a resolved file, ranges included."
    protocol_version = "HTTP/1.1"
    def __init__(self, *args, root, log, cut):
        self.root,self.log,self.cut = root,log,cut
        super().__init__(*args)
    def log_message(self, *args): pass
    def do_HEAD(self): self.answer(head=True)
    def do_GET(self): self.answer()

    def answer(self, head=False):
        found = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/main/(.+)", self.path)
        file = self.root/found[2] if found else None
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = file.read_bytes()
        size,start = (len(body),int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if "Range" in self.headers else 0)
        # and the hub stays away
        if not head and found[2] in self.cut and found[2] in {name for name,_ in self.log}:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        for k,v in {"ETag": f'"{abs(hash(body)):040x}"', "X-Repo-Commit": "0"*40,
            "Accept-Ranges": "bytes", "Content-Length": size-start}.items():
            self.send_header(k, str(v))
        if start: self.send_header("Content-Range", f"bytes {start}-{size-1}/{size}")
        self.end_headers()
        if head: return
        self.log.append((found[2], start))
        if found[2] in self.cut: # the line goes dead half way
            self.wfile.write(body[start:start+(size-start)//2]); self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR); self.close_connection = True; return
        self.wfile.write(body[start:])


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    "Files of a hub: a small dataset under the challenge's names."
    folder = tmp_path_factory.mktemp("mirror")
    made = build_dataset(austen_documents("train")[:12], austen_documents("val")[:2],
        folder/"made", vocab_size=400, shard_size=20_000)
    root = folder/"hub"/"datasets"
    manifest = json.loads((made.path/"manifest.json").read_text())
    manifest["datasets"][0] |= dict(name="fineweb10B_sp400",
        train_glob="datasets/fineweb10B_sp400/fineweb_train_*.bin",
        val_glob="datasets/fineweb10B_sp400/fineweb_val_*.bin")
    for p in made.train_shards+made.val_shards:
        to = root/"datasets"/"fineweb10B_sp400"/p.name.replace("made", "fineweb")
        to.parent.mkdir(parents=True, exist_ok=True); to.write_bytes(p.read_bytes())
    (root/"tokenizers").mkdir()
    for key in ("model_path", "vocab_path"):
        (root/manifest["tokenizers"][0][key]).write_bytes(
            (made.path/manifest["tokenizers"][0][key]).read_bytes())
    (root/"manifest.json").write_text(json.dumps(manifest))
    return root.parent,made


@pytest.fixture
def hub(mirror):
    pytest.importorskip("huggingface_hub")
    log,cut = [],set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root=mirror[0], log=log, cut=cut))
    thread = threading.Thread(target=server.serve_forever, daemon=True); thread.start()
    yield f"http://127.0.0.1:{server.server_port}",log,cut,mirror[1]
    server.shutdown(); server.server_close(); thread.join()


def test_download_resumes_and_keeps_what_is_whole(hub, tmp_path):
    endpoint,log,cut,made = hub
    fetch = partial(download_fineweb, "sp400", path=tmp_path/"fw", endpoint=endpoint)
    got = fetch(train_shards=1)
    assert [p.name for p in got.train_shards+got.val_shards] == ["fineweb_train_000000.bin",
        "fineweb_val_000000.bin"]
    assert torch.equal(got.val_tokens(), made.val_tokens())
    assert [p.name for p in (tmp_path/"fw").iterdir() if p.name.startswith(".")] == []

    second = "datasets/datasets/fineweb10B_sp400/fineweb_train_000001.bin"
    cut.add(second); log.clear()
    with pytest.raises(ConnectionError,
        match="fineweb_train_000001.bin.*run the same command again"):
        fetch(train_shards=2)
    assert not list((tmp_path/"fw"/"datasets").rglob("*000001*"))
    # nothing whole was fetched again
    assert {name for name,_ in log} <= {"datasets/manifest.json", second}

    cut.clear(); log.clear()
    got = fetch(train_shards=2)
    assert torch.equal(got.train_tokens(40_000), made.train_tokens(40_000))
    # it went on with what was missing
    assert {name for name,_ in log} == {"datasets/manifest.json", second}


def test_download_mends_a_broken_file(hub, tmp_path):
    endpoint,log,_,made = hub
    fetch = partial(download_fineweb, "sp400", 1, tmp_path/"fw", endpoint=endpoint)
    shard = fetch().train_shards[0]
    whole = shard.read_bytes(); shard.write_bytes(whole[:-10]); log.clear()
    with pytest.raises(ShardError, match="fineweb_train_000000.bin"): open_dataset(tmp_path/"fw")
    fetch()
    assert shard.read_bytes() == whole and [n for n,_ in log
        if n.endswith(".bin")] == [f"datasets/datasets/fineweb10B_sp400/{shard.name}"]


def test_download_refuses_shards_that_the_manifest_does_not_promise(mirror, tmp_path):
    shutil.copytree(mirror[0], tmp_path/"hub")
    shard = next((tmp_path/"hub").rglob("fineweb_train_000000.bin"))
    write_shard(shard, np.arange(100))
    with pytest.raises(ShardError, match="100 tokens, expected 20000 by the manifest"):
        download_fineweb("sp400", 1, tmp_path/"fw", repo_id=tmp_path/"hub")
    write_shard(shard, np.full(20_000, 400))
    with pytest.raises(ShardError,
        match="token id 400 at position 0, expected ids below vocab_size=400"):
        download_fineweb("sp400", 1, tmp_path/"fw", repo_id=tmp_path/"hub")
    assert not list((tmp_path/"fw"/"datasets").rglob("*train*"))
    manifest = json.loads((tmp_path/"hub/datasets/manifest.json").read_text())
    manifest["shuffle_seed"] = 2
    (tmp_path/"hub/datasets/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="holds another export"):
        download_fineweb("sp400", 1, tmp_path/"fw", repo_id=tmp_path/"hub")


def test_download_without_the_client_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        download_fineweb(path=tmp_path/"fw")
