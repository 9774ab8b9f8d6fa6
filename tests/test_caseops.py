"CaseOps against the published helper, and on any text."
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgolf.game.caseops import (MARKS, CaseError, case_bytes, decode_case, encode_case,
                                encode_case_document)
from pgolf.game.tokenizer import load_tokenizer


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
