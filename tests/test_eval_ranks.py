"""Scoring, calibration and adaptation shared over processes: the numbers of one."""

import numpy as np
import pytest

from conftest import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

JOB = '''
import sys
import numpy as np, torch
from pgolf.game.bpb import ByteTables
from pgolf.model.gpt import GPT, ModelConfig
from pgolf.score import phased
from pgolf.score.lora import LoRAConfig, score_documents
from pgolf.score.ttt import Learner, TTTConfig, score_with
from pgolf.score.windows import ScoreConfig, score
from pgolf.squeeze.calibration import collect_hessians
from pgolf.train.device import close_ranks, setup_ranks

torch.set_num_threads(1)
ranks, V = setup_ranks("cpu"), 64
model = GPT(ModelConfig(vocab_size=V, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2,
    rope_dims=4, skip_init=1.))
g = torch.Generator().manual_seed(1)
with torch.no_grad():
    for p in model.parameters(): p += .05*torch.randn(p.shape, generator=g)
text = torch.randint(2, V, (1201,), generator=g)
text[::170] = 1
tables = ByteTables(torch.ones(V, dtype=torch.int16), *torch.zeros(2, V, dtype=torch.bool))
windows = ScoreConfig(eval_seq_len=32, eval_stride=16, eval_batch=8)
learn = TTTConfig(ttt_lr=.05, ttt_chunk_tokens=224, ttt_batch_seqs=3, ttt_freeze_blocks=0,
    ttt_temperatures=(.9, 1., 1.1))
learner = Learner(model, learn, ranks)
out = dict(sliding=score(model, text, tables, 32, 16, 8, ranks=ranks).nll,
    adapted=score_with(learner, text, tables, windows).nll,
    documents=score_documents(model, text, tables, windows,
        LoRAConfig(ttt_lora_chunk_tokens=32, ttt_lora_docs=2, ttt_lora_lr=.01), ranks=ranks).nll)
def noted(model, *args, real=phased.learn_all):
    "A pause, and the weights that it leaves."
    real(model, *args)
    out["paused"] = torch.cat([p.detach().flatten() for p in model.parameters()])
phased.learn_all = noted
out["queue"] = phased.score_phased(model, text, tables, ScoreConfig(32, 32),
    LoRAConfig(ttt_lora_rank=2, ttt_lora_chunk_tokens=8, ttt_lora_docs=2, ttt_lora_lr=.01),
    phased.PhasedConfig(ttt_phases=1, ttt_phase_docs=3, ttt_phase_lr=.01,
        ttt_phase_chunk_tokens=128, ttt_phase_seq_len=32), ranks=ranks).nll
batches = text[:1024].view(-1, 32).split(2)
out |= {"H "+n: H for n, H in collect_hessians(model, batches, tables=True, ranks=ranks).items()}
out["weights"] = torch.cat([p.detach().flatten() for p in learner.model.parameters()])
out["temperatures"] = torch.tensor([c.temperature for c in learner.graded])
out["few"] = collect_hessians(model, batches[:1], ranks=ranks)["blocks.0.attn.c_q.weight"]
np.savez(sys.argv[1]+f"/rank{ranks.rank}.npz", **{k: v.numpy() for k, v in out.items()})
close_ranks()
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Everything that each rank of 1, 2 and 4 has in the end."
    out = {}
    for world in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"world{world}")
        (folder/"job.py").write_text(JOB)
        on_ranks(world, folder/"job.py", folder)
        out[world] = [dict(np.load(p)) for p in sorted(folder.glob("rank*.npz"))]
    return out


@pytest.mark.slow
def test_scores_are_those_of_one_process_to_the_bit(runs):
    "Windows and documents: each is graded by one process, the others add nothing."
    [one] = runs[1]
    for world in (2, 4):
        for rank in runs[world]:
            for stage in ("sliding", "documents"): assert np.array_equal(rank[stage], one[stage])


@pytest.mark.slow
def test_adaptation_shares_its_gradient(runs):
    "Rows of a batch over ranks, of which four get none at times: scores to 1e-6, weights alike."
    [one] = runs[1]
    assert np.abs(one["adapted"]-one["sliding"]).max() > .01, "it learns"
    for world in (2, 4):
        for rank in runs[world]:
            assert np.abs(rank["adapted"]-one["adapted"]).mean() < 1e-6
            assert np.array_equal(rank["adapted"], runs[world][0]["adapted"])
            assert np.array_equal(rank["weights"], runs[world][0]["weights"])
            assert np.array_equal(rank["temperatures"], one["temperatures"])


@pytest.mark.slow
def test_the_queue_is_shared_by_batches(runs):
    """Each target once, the same on every rank, and one set of weights after a pause; the first
    batch of all is learnt by the first rank as one process does, later ones have other factors."""
    [one] = runs[1]
    assert (one["queue"] > 0).all()
    for world in (2, 4):
        for rank in runs[world]:
            assert np.array_equal(rank["queue"], runs[world][0]["queue"])
            assert np.array_equal(rank["paused"], runs[world][0]["paused"])
        alike = rank["queue"] == one["queue"]
        assert (rank["queue"] > 0).all() and 2*169 <= alike.sum() < alike.size
        np.testing.assert_allclose(rank["queue"], one["queue"], atol=1.)
        np.testing.assert_allclose(rank["paused"], one["paused"], atol=5e-3)


@pytest.mark.slow
def test_hessians_are_those_of_all_batches(runs):
    [one] = runs[1]
    names = [k for k in one if k.startswith("H ")]
    assert len(names) > 10
    for world in (2, 4):
        for rank in runs[world]:
            for k in names: np.testing.assert_allclose(rank[k], one[k], rtol=1e-5, atol=1e-6)
            assert np.array_equal(rank["few"], one["few"]), "fewer batches than ranks"
