"""The official tokenizer and the sample of FineWeb's validation split: bytes, and two small models
side by side."""

import json

import numpy as np
import pytest
import torch

from pgolf.score.audit import bytes_are_text, documents
from pgolf.game.bpb import byte_tables
from pgolf.game.data import austen_documents, build_dataset
from pgolf.game.shards import read_shard
from pgolf.game.documents import read_documents
from pgolf.systems.pipeline import run, start
from pgolf.systems.recipes import at_scale, get_recipe
from pgolf.game.tokenizer import encode_document, load_tokenizer
from pgolf.systems.verdict import audit_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sp(shared): return load_tokenizer(shared/"data/fineweb_1024_bpe.model", 1024)


@pytest.fixture(scope="module")
def sample(shared):
    return torch.from_numpy(np.array(read_shard(shared/"data/fineweb_val_000000.sample.bin", 1024))
        .astype(np.int64))


def test_bytes_of_all_documents_are_those_of_their_text(sp, sample):
    tables, docs = byte_tables(sp), documents(sample, sp.bos_id())
    assert len(docs) == 625 and int(sum(map(len, docs))) == 700_329
    total = 0
    for d in docs:
        text = len(sp.decode(d.tolist()).encode())
        assert int(tables.count(d[:-1], d[1:]).sum()) == text
        total += text
    # the starts of documents count nothing
    assert int(tables.count(sample[:-1], sample[1:]).sum()) == total
    finding = bytes_are_text(sample, tables, sp)
    assert finding.status == "passed" and f"{total:,} bytes" in finding.detail


def test_decoded_documents_are_encoded_to_the_shard_again(sp, sample):
    for d in documents(sample, sp.bos_id()):
        assert encode_document(sp, sp.decode(d.tolist())).tolist() == d.tolist()


@pytest.fixture(scope="module")
def side_by_side(shared, sp, sample, tmp_path_factory):
    "Two runs of some seconds, trained on Austen and on FineWeb, scored on the sample and audited."
    folder, model = tmp_path_factory.mktemp("side"), shared/"data/fineweb_1024_bpe.model"
    val = [sp.decode(d.tolist()) for d in documents(sample, sp.bos_id())]
    train = dict(austen=austen_documents("train")[:120],
        fineweb=read_documents([shared/"data/fineweb_docs.sample.jsonl"]))
    recipe, out = at_scale(get_recipe("pr610"), "tiny").but(iterations=120), {}
    for name, docs in train.items():
        data = build_dataset(docs, val, folder/name, tokenizer=model)
        report = run(start(recipe, data, folder/"runs"/name, "cpu", eval_tokens=4096,
            progress=False))
        out[name] = report.result, audit_run(folder/"runs"/name, data)
        assert json.loads((folder/"runs"/name/"audit.json").read_text()) == out[name][1]
    return out


def test_fineweb_teaches_fineweb_and_both_audits_pass(side_by_side):
    (austen, audit_austen), (fineweb,
        audit_fineweb) = side_by_side["austen"], side_by_side["fineweb"]
    for name, (row, _) in side_by_side.items():
        print(
            f"\ntrained on {name}: {row['val_bpb']:.4f} bpb over {row['targets']:,} targets,"
            f" {row['text_bytes']:,} bytes",
            end="",
        )
    assert fineweb["val_bpb"] < austen["val_bpb"] - .02
    assert (fineweb["targets"], fineweb["text_bytes"]) == (austen["targets"], austen["text_bytes"])
    for verdict in (audit_austen, audit_fineweb):
        assert verdict["passed"], verdict
        assert {f["name"] for f in verdict["findings"] if f["status"] == "passed"} >= {"T1a",
            "T1b", "T1e", "T2a", "T3a", "T3b", "T4a", "T4b", "T4c", "D2", "D3", "D7"}


def test_bytes_scored_are_those_of_the_sample(side_by_side, sp, sample):
    tables = byte_tables(sp)
    for row, _ in side_by_side.values():
        assert row["text_bytes"] == int(tables.count(sample[:4096], sample[1:4097]).sum())
