"""PR #1855 behind training: adapters and end-to-end adaptation of its own code
(golden/frontier_functions.npz), its squeeze and container as settings of a recipe, bytes foreseen,
and a tiny run to an audited score."""

import functools
import json
import subprocess
import sys
from dataclasses import replace

import brotli
import numpy as np
import pytest
import torch
import zstandard

from conftest import HANG
from pgolf.game.bpb import ByteTables
from pgolf.game.caseops import build_case_dataset
from pgolf.game.data import austen_documents
from pgolf.model.gpt import GPT
from pgolf.score.audit import future_flip, gates_are_blind
from pgolf.score import phased as phased_chapter
from pgolf.score.lora import LoRAConfig, grade_rows
from pgolf.score.order import in_order, tilted_evaluation
from pgolf.score.phased import PhasedConfig, WorkingAdapters, score_phased
from pgolf.score.tilt import TiltConfig, strong_hints
from pgolf.score.windows import ScoreConfig
from pgolf.squeeze.artifact import ArtifactError, pack, unpack
from pgolf.squeeze.lowrank import Protected, load_codes, squeeze_state
from pgolf.squeeze.quant import Grid, Quantized, int_grid, quantize
from pgolf.squeeze.streams import by_columns, from_columns, unpack_streams
from pgolf.submit.script import make_code
from pgolf.submit.submission import read_log
from pgolf.systems import pipeline
from pgolf.systems.plan import estimate_bytes
from pgolf.systems.recipes import at_scale, get_recipe
from pgolf.systems.summit import PR1855
from pgolf.systems.verdict import audit_run, evaluation_of, spelled, stretch, verdict_line
from pgolf.train.device import Ranks
from test_pr1855 import build, in_banks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def z(golden): return golden("frontier_functions")


@pytest.fixture
def model(golden): return build(golden("pr1855"), "param/")


# ---- adapters

FAMILIES = dict(q="q_loras", k="k_loras", v="v_loras", o="o_loras", mlp="mlp_loras")


def published(name):
    "Name of an adapter in the golden file."
    place, _, visit = name.partition(".")
    return "lm_head_lora" if place == "head" else f"{FAMILIES[place]}.{visit}"


def adapted(z, model, part):
    "The golden adapters of three documents."
    meta = json.loads(str(z["lora/meta"]))
    cfg = LoRAConfig(ttt_lora_rank=meta["rank"], ttt_lora_scale=meta["alpha"]/meta["rank"])
    own = WorkingAdapters(model, cfg, PhasedConfig(), meta["batch"], torch.Generator())
    with torch.no_grad():
        for f, factors in (("A", own.A), ("B", own.B)):
            for n, t in factors.items():
                t.copy_(torch.from_numpy(z[f"{part}/adapter/{published(n)}.{f}"]))
    return own


def grades(model, own, ids):
    "Losses of all targets of three rows, each with its own adapters."
    n = ids.shape[1]
    text = torch.cat([row for row in ids])
    windows = [(n*i, n*i+n-1, n*i) for i in range(len(ids))]
    rows = grade_rows(model, own, text, windows, list(range(len(ids))))
    return rows.nll.view(len(ids), n-1)


@pytest.mark.parametrize("part", ["lora_loop", "lora_noloop"])
def test_adapters_grade_and_learn_as_published(z, model, part):
    if part == "lora_noloop": model.order = tuple(range(model.cfg.num_layers))
    model.eval()
    own, ids = adapted(z, model, part), torch.from_numpy(z[f"{part}/ids"].astype(np.int64))
    nll = grades(model, own, ids)
    torch.testing.assert_close(nll.detach(), torch.from_numpy(z[f"{part}/nll"]), rtol=1e-5,
        atol=1e-5)
    nll[:, -8:].mean(1).sum().backward()
    for f, factors in (("A", own.A), ("B", own.B)):
        for n, t in factors.items():
            want = float(z[f"{part}/gradnorm/{published(n)}.{f}"])
            assert t.grad.norm().item() == pytest.approx(want, rel=1e-5, abs=1e-9), n
    first = {n: t.detach().clone() for n, t in own.A.items()}
    own.restart()
    assert all(torch.equal(t, first[n]) for n, t in own.A.items()), "warm"
    torch.testing.assert_close(grades(model, own, ids).detach(),
        torch.from_numpy(z[f"{part}/nll_reset"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["rank", "o", "visits"])
def test_a_fault_in_the_adapters_shows(z, model, fault):
    "Scale 144 in place of 144/4, the output adapter left out, the visits of a block mixed up."
    own = adapted(z, model, "lora_loop")
    if fault == "rank": own.cfg = replace(own.cfg, ttt_lora_scale=144.)
    if fault == "o": del own.parts["o"]
    if fault == "visits": own.A["q.2"], own.A["q.4"] = own.A["q.4"], own.A["q.2"]
    ids = torch.from_numpy(z["lora_loop/ids"].astype(np.int64))
    assert (grades(model.eval(), own, ids).detach()-torch.from_numpy(z["lora_loop/nll"])).abs(
        ).max() > 1e-3


# ---- end to end

class Sine(WorkingAdapters):
    "First factors as the golden runs draw them."
    def draw(self, name, width):
        b, r, i = (torch.arange(n, dtype=torch.float64) for n in (self.docs,
            self.cfg.ttt_lora_rank, width))
        phase = 1+.7*r[:, None]+.37*i+1.9*b[:, None, None]
        return (width**-.5*phase.sin()).float()


@pytest.fixture
def sine(monkeypatch): monkeypatch.setattr("pgolf.score.phased.WorkingAdapters", Sine)


class Counts(ByteTables):
    "Bytes by position, as the golden file gives them."
    def __init__(self, n_bytes, vocab_size):
        object.__setattr__(self, "base_bytes", torch.zeros(vocab_size))
        object.__setattr__(self, "n_bytes", n_bytes)
    def count(self, prev, targets): return self.n_bytes


def run(z, model, part, lora={}, phased={}, **kw):
    "An evaluation with the golden settings, and how far its losses are off."
    h = json.loads(str(z[f"{part}/hyper"]))
    cfg = LoRAConfig(ttt_lora_rank=h["ttt_lora_rank"], ttt_lora_lr=h["ttt_lora_lr"],
        ttt_lora_scale=h["alpha"]/h["ttt_lora_rank"], ttt_lora_beta2=h["ttt_beta2"],
        ttt_lora_weight_decay=h["ttt_weight_decay"], ttt_lora_chunk_tokens=h["ttt_chunk_size"],
        ttt_lora_docs=h["ttt_batch_size"])
    docs = h["phased_ttt_prefix_docs"]
    pauses = PhasedConfig(ttt_phases=h["phased_ttt_num_phases"] if docs else 0,
        ttt_phase_docs=max(1, docs), ttt_phase_lr=h["global_ttt_lr"],
        ttt_phase_momentum=h["global_ttt_momentum"], ttt_phase_clip=h["global_ttt_grad_clip"],
        ttt_phase_chunk_tokens=h["global_ttt_chunk_tokens"], ttt_phase_seq_len=h["eval_seq_len"])
    tokens = torch.from_numpy(z[f"{part}/tokens"].astype(np.int64))
    n_bytes = torch.from_numpy(z[f"{part}/bytes"].astype(np.int64))[1:]
    got = score_phased(model, tokens, Counts(n_bytes, model.cfg.vocab_size),
        ScoreConfig(h["ttt_eval_seq_len"], h["ttt_eval_seq_len"]), replace(cfg, **lora),
        replace(pauses, **phased), **kw)
    return got, np.abs(got.nll.numpy()-z[f"{part}/nll"][1:]).max()


@pytest.mark.parametrize("part", ["ttt_lora_only", "ttt_phased"])
def test_the_whole_evaluation_is_the_published_one(z, model, sine, part):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    got, off = run(z, model, part)
    assert off < 2e-5
    assert got.val_loss == pytest.approx(float(z[f"{part}/val_loss"]), rel=1e-6)
    assert got.val_bpb == pytest.approx(float(z[f"{part}/val_bpb"]), rel=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("part", ["ttt_lora_only", "ttt_phased"])
def test_pauses_move_the_weights_as_published(z, model, sine, monkeypatch, part):
    "How far each tensor of the model is from where it began; without pauses nothing moves."
    seen = []
    class Kept(phased_chapter._Phases):
        def __init__(self, *a):
            super().__init__(*a)
            seen.append(self.model)
    monkeypatch.setattr(phased_chapter, "_Phases", Kept)
    run(z, model, part)
    before, after = (in_banks(m.state_dict()) for m in (model, seen[0]))
    wanted = {k.split("/")[-1]: float(z[k]) for k in z.files if f"{part}/delta_norm/" in k}
    moved = {n: (after[n]-before[n]).norm().item() for n in wanted}
    assert len(wanted) == 46 and any(wanted.values()) == (part == "ttt_phased")
    assert moved == pytest.approx(wanted, rel=2e-3, abs=1e-7)


FAULTS = {
    "a decay of zero": ("ttt_lora_only", dict(ttt_lora_weight_decay=0.), {}),
    "beta2 0.95": ("ttt_lora_only", dict(ttt_lora_beta2=.95), {}),
    "fresh first factors": ("ttt_lora_only", {}, dict(ttt_warm=False)),
    "no pauses": ("ttt_phased", {}, dict(ttt_phases=0)),
    "momentum 0.8": ("ttt_phased", {}, dict(ttt_phase_momentum=.8)),
    "no clipping": ("ttt_phased", {}, dict(ttt_phase_clip=0.)),
    "longer segments": ("ttt_phased", {}, dict(ttt_phase_seq_len=64)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_evaluation_shows(z, model, sine, fault):
    part, lora, phased = FAULTS[fault]
    assert run(z, model, part, lora, phased)[1] > 4e-4


@pytest.mark.slow
def test_ranks_share_the_batches_and_each_gets_all_scores(z, model, sine, monkeypatch):
    "Two ranks one after the other; the sum of what each has scored is the whole, each target once."
    monkeypatch.setattr("pgolf.score.phased.dist.all_reduce", lambda t: t)
    parts = [run(z, model, "ttt_lora_only", ranks=Ranks(rank, 2))[0].nll for rank in range(2)]
    assert not ((parts[0] != 0) & (parts[1] != 0)).any()
    plain = run(z, model, "ttt_lora_only")[0].nll
    first = parts[0] != 0  # the first batch of each rank begins as it does alone
    assert (parts[0]+parts[1] > 0).all() and (parts[0][first] == plain[first]).sum() >= 91-1


# ---- squeeze

def test_the_streams_of_a_kind_are_the_published_ones(z):
    "Similar rows together, by columns, and the lists of rows, under brotli in our own wrapper."
    codes = z["simsort/in"]
    shape, blob, lists = unpack_streams(by_columns(codes, reorder=True))
    order = z["simsort/order"]
    assert brotli.decompress(blob) == codes[order].T.tobytes()
    assert brotli.decompress(lists) == order.astype("<u2").tobytes()
    assert np.frombuffer(shape, "<u4").tolist() == [1, *codes.shape]
    np.testing.assert_array_equal(from_columns(by_columns(codes, True), codes.size)[0], codes)


@pytest.mark.parametrize("i", range(5))
def test_a_recipes_quantizer_gives_the_published_codes(z, i):
    "GPTQ with SDClip, dead columns included, through the stage of a run."
    meta = json.loads(str(z[f"gptq/{i}/meta"]))
    W, H = torch.from_numpy(z[f"gptq/{i}/W"]), torch.from_numpy(z[f"gptq/{i}/H"])
    grid = int_grid(meta["bits"], sigmas=meta["clip_sigmas"])
    cfg = replace(PR1855.quant, rules=(("", grid),), keep_numel=0, lqer_top=0)
    q = squeeze_state({"w": W}, cfg, PR1855.gptq, {"w": H})["w"]
    np.testing.assert_array_equal(q.codes, z[f"gptq/{i}/q"])
    np.testing.assert_array_equal(q.scale[:, 0], z[f"gptq/{i}/scale"])


def test_the_recipe_is_the_table_of_its_sheet(shared):
    "Sections 2, 7 and 10 of the sheet, as far as squeeze and score go."
    r, sheet = PR1855, " ".join((shared/"spec"/"pr1855.md").read_text().split())
    grids = {p: (g.hi, g.sigmas) for p, g in r.quant.rules}
    mlp, attn, table = grids[r"\.mlp\."], grids[r"\.attn\."], grids["^tok_emb"]
    for line in (f"matrix 6 bits, embed 7 bits*; clip sigmas MLP {mlp[1]}*, attention {attn[1]},"
            f" embedding {table[1]}*", f"LQER on, rank {r.quant.lqer_rank}, top"
            f" {r.quant.lqer_top}, asymmetric, group {r.quant.lqer_group}",
            f"{r.gptq.samples//48} calibration batches",
            f"chunk {r.lora.ttt_lora_chunk_tokens}, window 2,048, batch {r.lora.ttt_lora_docs}"
            " documents, 1 gradient step, adapters on q, k, v, o, mlp and head",
            f"beta2 {r.lora.ttt_lora_beta2}*, wd {r.lora.ttt_lora_weight_decay}*",
            f"rank {r.lora.ttt_lora_rank}*, alpha 144",
            f"{r.phased.ttt_phases}*, prefix documents {r.phased.ttt_phase_docs:,}*; global SGD lr"
            f" {r.phased.ttt_phase_lr}, momentum {r.phased.ttt_phase_momentum}, 1 epoch, chunk"
            f" {r.phased.ttt_phase_chunk_tokens:,}, clip {r.phased.ttt_phase_clip}"):
        assert line in sheet, line
    assert (mlp[0], attn[0], table[0]) == (31, 31, 63)
    assert r.lora.ttt_lora_scale*r.lora.ttt_lora_rank == 144 and r.lora.ttt_lora_lr == 1e-4
    assert r.score.eval_seq_len == r.phased.ttt_phase_seq_len == 2048
    assert r.quant.keep_numel == 65_536 and r.gptq.zero_dead and r.gptq.damping == .01
    with torch.device("meta"): state = GPT(r.model).state_dict()
    gates = [n for n, t in state.items() if isinstance(g := r.quant.grid(n, t), Grid)
        and g.hi == 127]
    assert len(gates) == 11 and all(state[n].shape == (8, 12) for n in gates)


@pytest.mark.parametrize("name, logged", [("pr1394", 15_970_162), ("pr1855", 15_869_920)])
def test_the_plan_foresees_the_logged_bytes(name, logged):
    assert sum(b for *_, b in estimate_bytes(get_recipe(name))) == pytest.approx(logged, rel=.01)


# ---- a run

@pytest.fixture(scope="module")
def cased(tmp_path_factory):
    "Short documents, capitals as marks, with a sidecar."
    words, docs = austen_documents("val")[0].split(), []
    for n in (40, 120, 25, 70, 90, 30, 60, 150, 35, 80)*2:
        docs.append(" ".join(words[:n]))
        del words[:n]
    return build_case_dataset(austen_documents("train")[:12], docs,
        tmp_path_factory.mktemp("cased")/"cased", 512)


@pytest.fixture(scope="module")
def finished(cased, tmp_path_factory):
    "A tiny run with everything on."
    r = at_scale(PR1855, "tiny").but(iterations=12, warmup_steps=0, vocab_size=cased.vocab_size,
        awq_top=1, awq_group=16, use_tilt=True, tilt_order=3, tilt_confidence=.5,
        ttt_phase_chunk_tokens=64)
    job = pipeline.start(r, cased, tmp_path_factory.mktemp("finished")/"run", "cpu", 1200,
        progress=False)
    return job, pipeline.run(job)


@pytest.mark.slow
def test_a_tiny_run_adapts_by_length_and_ends_in_an_audited_score(finished, cased):
    job, report = finished
    assert [r["stage"] for r in report.rows][-3:] == ["sliding", "adapted", "tilted"]
    assert report.result["targets"] == 1200 and report.result["legal"]
    for stage in ("", "adapted"):
        verdict = audit_run(job.out, cased, stage=stage)
        found = {f["name"]: f for f in verdict["findings"]}
        assert verdict["passed"], [f for f in verdict["findings"] if f["status"] == "failed"]
        assert found["10.7"]["status"] == "failed" and "10.7" in verdict_line(verdict)
        assert found["T3a"]["status"] == found["T1a"]["status"] == "passed"
        assert found["D7"]["status"] == "passed" and "in the text" in found["D7"]["detail"]


@pytest.mark.slow
def test_its_artifact_holds_corrections_and_comes_back(finished):
    job, _ = finished
    codes, meta = load_codes(job.artifact)
    kinds = [type(t).__name__ for t in codes.values()]
    assert kinds.count("Corrected") == 3 and meta["recipe"] == "pr1855"
    assert any(isinstance(x, Protected) for t in codes.values() for x in (t, getattr(t, "base", t)))
    gates = {n: t for n, t in codes.items() if n.endswith("out_gate.gate")}
    assert len(gates) == 3 and all(isinstance(t, Quantized) for t in gates.values())
    model = pipeline.read_artifact(job.artifact)
    for n, t in codes.items():
        want = t if isinstance(t, torch.Tensor) else t.dequantize()
        got = model.state_dict()[n]
        assert torch.equal(got, want.to(got.dtype)), n


@pytest.mark.slow
def test_a_target_aware_hint_fails_the_audit(finished, cased):
    job, _ = finished
    model = pipeline.read_artifact(job.artifact)
    tokens = in_order(stretch(cased, 128), cased.tokenizer().bos_id())
    ev = evaluation_of(job.recipe, cased, model, "adapted", len(tokens)-1, tokens)
    def knowing(x, tilt):
        hint = strong_hints(x, tilt)
        return torch.where(hint == x[1:], hint, -1)
    eager = TiltConfig(tilt_order=2, tilt_confidence=0.)
    hits = (knowing(tokens, eager) >= 0).nonzero()[:1, 0].tolist()
    found = {hints: [ask(tilted_evaluation(ev, eager, hints), tokens, hits).status
        for ask in (future_flip, gates_are_blind)] for hints in (strong_hints, knowing)}
    assert found == {strong_hints: ["passed"]*2, knowing: ["failed"]*2}


def test_text_is_spelled_as_it_was(cased):
    "Whole documents, and of one that is cut off what comes before a pending mark."
    text = " ".join(austen_documents("val")[0].split())
    for n in (60, 61, 62, 63, 64, 200):
        said = spelled(cased, cased.val_tokens(n))
        assert said and text.startswith(said[:100].strip()) and said.isascii()
    assert "Sir Walter Elliot, of Kellynch Hall" in spelled(cased, cased.val_tokens(200))


# ---- bad input

@pytest.mark.parametrize("changes, says", [
    (dict(ttt_places=("q", "mind")), "'mind' is none of q, k, v, o, mlp, head"),
    (dict(codec="lrzip"), "codec='lrzip': choose one of"),
    (dict(lqer_fit="best"), "lqer_fit='best'"), (dict(awq_top=-1), "awq_top=-1"),
    (dict(small_rules=(("x", 3),)), "3 is no grid"), (dict(tilt_order=99), "tilt_order=99"),
    (dict(ttt_phase_momentum=1.5), "ttt_phase_momentum=1.5"),
])
def test_a_setting_that_no_run_can_use_names_itself(changes, says):
    with pytest.raises(ValueError, match=says): PR1855.but(**changes)


@pytest.mark.parametrize("changes, says", [
    (dict(use_tilt=True, adaptation="chunks"), "use_tilt with adaptation='chunks'"),
    (dict(use_gptq=False, awq_top=1), "set use_gptq, or awq_top=0"),
    (dict(ttt_lora_chunk_tokens=65), "ttt_lora_chunk_tokens=65 does not fit in a window"),
])
def test_settings_that_do_not_go_together_are_named_before_any_work(novels, tmp_path, changes,
    says):
    with pytest.raises(ValueError, match=says):
        pipeline.start(at_scale(PR1855, "tiny").but(**changes), novels, tmp_path/"run", "cpu")
    assert not (tmp_path/"run").exists()


def test_any_changed_byte_of_a_grouped_file_is_noticed():
    gen = torch.Generator().manual_seed(0)
    tensors = {f"blocks.{i}.w": quantize(torch.randn(24, 16, generator=gen), int_grid(5))
        for i in range(3)} | {"s": torch.randn(40, generator=gen)}
    data = pack(tensors, codec="similar")
    assert b'"similar"' in zstandard.decompress(data[36:36+int.from_bytes(data[16:20], "little")])
    for i in range(0, len(data), 5):
        with pytest.raises(ArtifactError): unpack(data[:i]+bytes([data[i] ^ 1])+data[i+1:])


# ---- the packed script

OTHERS = {"longer segments": ("pr1855", dict(lengths=((0, .5), (.5, 1))))}


def tiny(name):
    "A recipe, or a variant of one, that trains in a second."
    name, changes = OTHERS.get(name, (name, {}))
    return at_scale(get_recipe(name), "tiny").but(iterations=12, warmup_steps=0, **changes)


@functools.cache
def code(name="pr1855"): return make_code(tiny(name))


@pytest.mark.slow
def test_the_readable_script_has_fewer_than_1500_lines():
    found = code()
    assert found.sizes()["lines"] < 1500 and len(found.packed) < len(found.minified)


@pytest.fixture(scope="module")
def case_novels(tmp_path_factory):
    "Two novels with case marks, and the sidecar that counts the bytes of the text as it was."
    return build_case_dataset(austen_documents("train")[:60], austen_documents("val")[:6],
        tmp_path_factory.mktemp("case")/"novels")


@pytest.mark.slow
@pytest.mark.parametrize("name, text", [("pr1855", "novels"), ("pr1855", "case_novels"),
    ("pr2135", "novels"), ("pr1218", "novels"), ("longer segments", "novels")])
def test_the_script_gives_the_packages_bytes_and_scores(name, text, request, tmp_path):
    "With #2135 to the last score, in which hints have raised their tokens."
    r, data = tiny(name), request.getfixturevalue(text)
    report = pipeline.run(pipeline.start(r, data, tmp_path/"run", "cpu", 512, progress=False))
    (tmp_path/"train_gpt.py").write_text(code(name).packed)
    done = subprocess.run([sys.executable, "train_gpt.py", data.path, "--eval-tokens", "512",
        "--device", "cpu"], capture_output=True, text=True, cwd=tmp_path, timeout=HANG,
        env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"model.pgolf").read_bytes() == (tmp_path/"run"/"model.pgolf").read_bytes()
    said = read_log(done.stdout)["score"]
    assert said[-1]["stage"] == dict(pr1218="sliding", pr2135="tilted").get(name, "adapted")
    for row, want in zip(said, report.rows[-len(said):], strict=True):
        assert [row[k] for k in ("stage", "val_loss", "val_bpb")] == [want[k]
            for k in ("stage", "val_loss", "val_bpb")]
