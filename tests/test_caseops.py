"CaseOps against the published helper, on any text, and what an audit says of its sidecar."
import json
import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgolf.game.bpb import byte_tables
from pgolf.game.caseops import (MARKS, CaseError, build_case_dataset, case_bytes, decode_case,
                                encode_case, encode_case_document)
from pgolf.game.data import austen_documents, open_dataset
from pgolf.game.shards import write_shard
from pgolf.game.tokenizer import load_tokenizer
from pgolf.systems.verdict import sidecar_is_whole, transform_of


@pytest.fixture(scope="module")
def strings(golden):
    "The published strings by name: text, encoded, ids, sidecar_bytes, malformed, odd."
    z = golden("frontier_functions")
    return {k.removeprefix("caseops/"): json.loads(str(z[k])) for k in z.files if "caseops/" in k}


def test_published_strings_there_and_back(strings):
    assert len(strings["text"]) > 20
    assert [encode_case(t) for t in strings["text"]] == strings["encoded"]
    assert [decode_case(t) for t in strings["encoded"]] == strings["text"]


def test_published_ids_and_sidecar(strings, shared):
    sp = load_tokenizer(shared/"data"/"fineweb_8192_bpe_caseops.model", 8192)
    for text, ids, sizes in zip(strings["text"], strings["ids"], strings["sidecar_bytes"],
                                strict=True):
        got, counts = encode_case_document(sp, text)
        assert got.tolist() == [sp.bos_id(), *ids]
        assert counts.tolist() == [0, *sizes]


def test_published_decisions_on_what_nobody_wrote(strings):
    def read(text):
        try: return decode_case(text)
        except CaseError: return None
    for text, accepted in zip(strings["malformed"], strings["malformed_accepted"], strict=True):
        assert (read(text) is not None) == accepted
    assert [read(t) for t in strings["odd"]] == strings["odd_decoded"]


LIKELY = st.text(st.sampled_from([*"abAB 1é\u00a0", *MARKS, "\ue000"]), max_size=40)


@given(st.text(max_size=60) | LIKELY)
@example("İßﬁ\u0130")
@settings(max_examples=500, deadline=None)
def test_any_text_comes_back(text):
    coded = encode_case(text)
    assert decode_case(coded) == text
    assert not any("A" <= c <= "Z" for c in coded)
    assert sum(case_bytes(coded)) == len(text.encode())


@given(LIKELY)
@settings(max_examples=500, deadline=None)
def test_what_is_read_at_all_has_one_canonical_form(text):
    try: plain = decode_case(text)
    except CaseError: return
    assert decode_case(encode_case(plain)) == plain


@pytest.mark.parametrize("size", [1, 2, 7])
def test_bytes_do_not_depend_on_where_pieces_end(size):
    coded = encode_case("x\ue001y NASA É\ue004")
    pieces = [coded[i:i+size] for i in range(0, len(coded), size)]
    assert sum(case_bytes(pieces)) == len("x\ue001y NASA É\ue004".encode())


def test_marks_are_charged_nothing_and_their_namesakes_three_bytes():
    assert case_bytes(["\ue001hello", "\ue004", "\ue001", "\ue002ab"]) == [5, 0, 3, 2]


# ---- what an audit says of a sidecar

ODD = {"compatibility": "The ™ of Acme", "spaces": "Two  spaces   Here", "ligature": "café ﬁne",
    "a letter made before a mark": "It was 20 ºC Outside.", "nothing odd": "Sir Walter Elliot"}


def unnamed(data, folder):
    "The same data without pgolf's own key in the manifest, as published exports are."
    shutil.copytree(data.path, folder)
    manifest = json.loads((folder/"manifest.json").read_text())
    del manifest["datasets"][0]["text_transform"]
    (folder/"manifest.json").write_text(json.dumps(manifest))
    return open_dataset(folder)


def of_coded_text(data):
    "Write the sidecar that charges the bytes of the text with its marks."
    tokens = data.val_tokens()
    coded = byte_tables(data.tokenizer()).count(tokens[:-1], tokens[1:])
    write_shard(data.val_bytes[0], np.array([0, *coded.tolist()]))


@pytest.mark.parametrize("name", ODD)
def test_an_honest_sidecar_passes_and_one_of_coded_text_fails(name, tmp_path):
    data = build_case_dataset(austen_documents("train")[:9],
        [ODD[name], *austen_documents("val")[3:4]], tmp_path/"data", 400)
    for d in (data, unnamed(data, tmp_path/"unnamed")):
        n = len(d.val_tokens())-1
        assert transform_of(d).marks == MARKS
        assert sidecar_is_whole(d, n).status == "passed"
        of_coded_text(d)
        assert sidecar_is_whole(open_dataset(d.path), n).status == "failed"
