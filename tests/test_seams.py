"""The places where techniques dock hold what they promise: what CONTRIBUTING.md adds in four lines
trains, and an order of blocks, a schedule and a part need no change of the package."""

import re
import sys
import textwrap
import types
import zlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from pgolf.game.data import build_dataset, check_bytes, open_dataset
from pgolf.game.tokenizer import TRANSFORMS, TextTransform
from pgolf.model import gpt
from pgolf.model.gpt import BASE_GROUPS, GPT, OUTPUT_PARTS, Group, ModelConfig, stored
from pgolf.score import windows
from pgolf.score.lora import ADAPTATIONS
from pgolf.squeeze.artifact import ArtifactError, pack, unpack
from pgolf.squeeze.coders import CODERS, Coder
from pgolf.submit import script
from pgolf.systems import pipeline
from pgolf.systems.published import PR610
from pgolf.systems.recipes import at_scale
from pgolf.train import schedule
from pgolf.train.loop import TrainConfig, train
from pgolf.train.muon import OptimConfig
from pgolf.train.schedule import ScheduleConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(vocab_size=64, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, rope_dims=4)
PLAN = ScheduleConfig(iterations=2, warmdown_iters=1)
STEPS = TrainConfig(train_batch_tokens=64, train_seq_len=16, num_spans=2, warmup_steps=0,
    compile=False)


class Batches:
    "Random tokens in place of shards."
    def __init__(self): self.position, self.gen = 0, torch.Generator().manual_seed(0)
    def next_step(self):
        ids = torch.randint(64, (2, 2, 17), generator=self.gen)
        return [(x[:, :-1], x[:, 1:]) for x in ids]


def trained(model, listeners=(), **optim):
    "The model after two steps, and its losses."
    done = train(model, Batches(), OptimConfig(ns_dtype="float32", **optim), PLAN, STEPS, listeners)
    return model, done.losses


def example():
    "The code blocks of CONTRIBUTING.md: part, field, line of the table, recipe."
    text = (ROOT/"CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^   ```python\n(.*?)^   ```", text, re.M | re.S)
    assert len(blocks) == 4, "CONTRIBUTING.md shows a technique in four pieces of code"
    return [re.sub("(?m)^   ", "", b) for b in blocks]


@pytest.fixture
def extended():
    "The module gpt with the lines that CONTRIBUTING.md adds, and its recipe."
    part, field, line, recipe = example()
    text = (ROOT/"pgolf/model/gpt.py").read_text()
    for mark, new in (("OUTPUT_PARTS = {", part+"\n"), ('    "attn_gate": lambda', line),
        ("    gated_attention:bool=False", field)):
        assert text.count(mark) == 1, f"gpt.py has no single {mark!r} before which the example goes"
        text = text.replace(mark, new+mark)
    module = types.ModuleType("pgolf.model.gpt_extended")
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, "gpt.py with the example", "exec"), module.__dict__)
        names = dict(PR610=replace(PR610, model=module.ModelConfig(**SMALL)))
        exec(textwrap.dedent(recipe), names)
        yield module, names["MINE"]
    finally: del sys.modules[module.__name__]


def test_the_example_of_contributing_trains_and_is_off_by_default(extended):
    module, mine = extended
    assert (mine.name, mine.model.dimming) == ("mine", .9)
    model, losses = trained(module.GPT(mine.model))
    factors = {n: p for n, p in model.named_parameters() if "dimming" in n}
    assert list(factors) == [f"blocks.{i}.attn.dimming.scale" for i in range(4)]
    assert all((p != .9).all() for p in factors.values()) # it learns, as a scalar
    off, same = trained(module.GPT(module.ModelConfig(**SMALL)))
    plain, expected = trained(GPT(ModelConfig(**SMALL)))
    assert same == expected != losses
    assert all(torch.equal(a, b) for a, b in zip(off.parameters(), plain.parameters(), strict=True))


# ---- from outside, without a change of the package

class Shift(nn.Module):
    "A learned vector added to every head, with a name that no group of the package knows."
    def __init__(self, head_dim):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(head_dim))
    def forward(self, y, x, v): return y + self.vector.to(y.dtype)


@dataclass(frozen=True)
class Shifted(ModelConfig):
    shift_from:int=99 # first block that has the part


@pytest.fixture
def outside(monkeypatch):
    "A part and a schedule that only this test knows."
    monkeypatch.setitem(OUTPUT_PARTS, "shift",
        lambda c, block: Shift(c.head_dim) if block >= getattr(c, "shift_from", 99) else None)
    monkeypatch.setitem(schedule.SCHEDULES, "half", lambda c, step, elapsed: .5)


class Rates:
    "What each group's rate was in every step."
    def __init__(self): self.seen = []
    def after_step(self, run):
        self.seen.append({g["name"]: g["lr"] for o in run.optims for g in o.param_groups})


def test_a_part_and_a_schedule_from_outside_train(outside):
    own = Group("shifts", r"shift\.vector$", "adamw", "scalar_lr", schedule="half")
    flat = Group("gains", r"q_gain$", "adamw", "scalar_lr", schedule="constant")
    rates = Rates()
    model, _ = trained(GPT(Shifted(**SMALL, shift_from=2)), [rates],
        groups=(own, flat, *BASE_GROUPS))
    assert [n for n, _ in model.named_parameters() if "shift" in n] == [
        "blocks.2.attn.shift.vector", "blocks.3.attn.shift.vector"]
    assert model.blocks[2].attn.shift.vector.abs().min() > 0
    lr = OptimConfig().scalar_lr
    assert [(r["shifts"], r["gains"]) for r in rates.seen] == [(.5*lr, lr)]*2
    assert [r["scalars"] for r in rates.seen] == [PLAN.lr_scale(s)*lr for s in (0, 1)]


def test_a_part_that_no_group_takes_is_named(outside):
    with pytest.raises(ValueError, match="'blocks.0.attn.shift.vector' is in none of the groups"):
        trained(GPT(Shifted(**SMALL, shift_from=0)))


def test_an_unknown_schedule_is_an_error_before_any_work(novels, tmp_path):
    odd = at_scale(PR610, "tiny").but(groups=(replace(BASE_GROUPS[0], schedule="half"),
        *BASE_GROUPS[1:]))
    with pytest.raises(ValueError, match="schedule='half' of group 'matrices'"):
        pipeline.start(odd, novels, tmp_path/"run", "cpu", 64)
    assert not (tmp_path/"run").exists()


# ---- the order of blocks

ORDER = (0, 1, 2, 1, 2, 3)
TECHNIQUES = dict(skip_init=1., skip_gate=True, value_residual=True, xsa_last_n=2, ln_scale=True,
    ve_dim=8, ve_layers=(1, 3), gated_attention=True)


def shaken(cfg):
    model, gen = GPT(cfg).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.3*torch.randn(p.shape, generator=gen))
    return model


def test_an_order_that_repeats_equals_six_blocks_with_copied_weights():
    """A model of six different blocks, each with the parameters of the block that it stands for;
    what goes by block number is set by hand."""
    model = shaken(ModelConfig(**SMALL, **TECHNIQUES, layer_order=ORDER))
    plain = shaken(ModelConfig(**SMALL | dict(num_layers=6),
        **TECHNIQUES | dict(ve_layers=(1, 3, 5))))
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for n, p in plain.named_parameters():
            if n.startswith("blocks."):
                i, rest = n.split(".", 2)[1:]
                p.copy_(model.get_parameter(f"blocks.{ORDER[int(i)]}.{rest}"))
            elif n.startswith("ve_layer_scales."):
                p.copy_(model.ve_layer_scales[TECHNIQUES["ve_layers"].index(
                    ORDER[plain.cfg.ve_layers[int(n[-1])]])])
            else: p.copy_(model.get_parameter(n))
        for i, block in enumerate(plain.blocks):
            block.ln_scale = model.blocks[ORDER[i]].ln_scale
            block.attn.parts = model.blocks[ORDER[i]].attn.parts
            if "xsa" in block.attn.parts: block.attn.xsa = gpt.SelfValue()
        assert torch.equal(model(ids), plain(ids))
    assert model.skip_weights.shape == (3, 32)


def test_an_order_learns_in_every_pass_and_may_change_between_steps():
    class Switch:
        def after_step(self, run): run.model.order = run.model.cfg.order
    model = GPT(ModelConfig(**SMALL, skip_init=1., layer_order=ORDER))
    model.order = (0, 1, 2, 3)
    changed, losses = trained(model, [Switch()])
    _, always = trained(GPT(ModelConfig(**SMALL, skip_init=1., layer_order=ORDER)))
    assert changed.order == ORDER and losses[1] != always[1]
    assert (changed.skip_weights[2] != 1).any()  # the third skip exists in the long order alone


def test_an_order_goes_into_an_artifact_and_leaves_no_byte_where_there_is_none():
    plain, looped = ModelConfig(**SMALL), ModelConfig(**SMALL, layer_order=ORDER)
    assert "layer_order" not in stored(plain) and ModelConfig(**stored(looped)) == looped
    with pytest.raises(ValueError, match="layer_order=.*each of the blocks 0..3"):
        ModelConfig(**SMALL, layer_order=(0, 1, 2))


def test_one_compilation_per_order():
    graphs = []
    def count(graph, inputs): graphs.append(graph); return graph
    torch._dynamo.reset()
    model = GPT(ModelConfig(**SMALL, **TECHNIQUES, layer_order=ORDER))
    loss = torch.compile(model.loss, backend=count, fullgraph=True)
    x = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    for order in ((0, 1, 2, 3), ORDER, (0, 1, 2, 3)):
        model.order = order
        for _ in range(2):
            torch.testing.assert_close(loss(x[:, :-1], x[:, 1:]), model.loss(x[:, :-1], x[:, 1:]))
    assert len(graphs) == 2


# ---- text transforms, coders, adaptation

class Swapped(TextTransform):
    "Capitals and small letters change places; the tokens say where the bytes of a document end."
    counts = True
    def encode(self, text): return text.swapcase()
    def decode(self, text): return text.swapcase()
    def token_bytes(self, sp, text):
        n = len(sp.encode(self.encode(text)))
        return np.array([0]*n+[len(text.encode())], dtype=np.uint16)


def test_a_dataset_of_a_transformed_text_carries_its_sidecar(monkeypatch, tmp_path):
    monkeypatch.setitem(TRANSFORMS, "swapped", Swapped())
    train_docs, val = ["Anne Elliot, with all her claims."]*9, ["Captain Wentworth.", "Lyme"]
    data = build_dataset(train_docs, val, tmp_path/"data", 300, shard_size=16, transform="swapped")
    again = open_dataset(tmp_path/"data")
    assert again == data and data.transform == "swapped"
    assert len(data.val_bytes) == len(data.val_shards) > 1
    tokens, sp = data.val_tokens(), data.tokenizer()
    spelt = sp.decode(tokens.tolist())
    assert spelt == "cAPTAIN wENTWORTH.lYME"
    assert TRANSFORMS[data.transform].decode(spelt) == "".join(val)
    assert int(data.byte_tables().count(tokens[:-1], tokens[1:]).sum()) == len("".join(val))
    check_bytes(data)
    for path in data.val_bytes: path.unlink()
    with pytest.raises(FileNotFoundError, match="'swapped'.*no .*_val_bytes_"):
        open_dataset(tmp_path/"data")
    monkeypatch.delitem(TRANSFORMS, "swapped")
    with pytest.raises(ValueError, match="text transform 'swapped' is none of"):
        open_dataset(tmp_path/"data")


def test_a_dataset_without_a_transform_says_nothing_of_one(novels):
    assert "text_transform" not in (novels.path/"manifest.json").read_text()
    assert novels.transform == "" and novels.val_bytes == ()


def test_a_coder_from_outside_writes_and_reads_an_artifact(monkeypatch):
    def undo(data, size, what):
        out = zlib.decompress(data)
        assert len(out) == size, what
        return out
    monkeypatch.setitem(CODERS, "zlib",
        Coder(lambda array, level, long: zlib.compress(array.tobytes(), 9), undo))
    tensors = {"a": torch.zeros(40, 8), "b": torch.arange(64, dtype=torch.int8).view(8, 8)}
    packed = pack(tensors, codec="zlib")
    assert all(torch.equal(t, unpack(packed)[0][n]) for n, t in tensors.items())
    assert len(pack(tensors, codec="best")) <= len(packed)
    assert PR610.but(codec="zlib").stages.codec == "zlib"
    monkeypatch.delitem(CODERS, "zlib")
    with pytest.raises(ArtifactError, match="must be a codec, zstd or rans or .*, and a size"):
        unpack(packed)
    with pytest.raises(ValueError, match="codec='zlib': choose one of zstd, rans, brotli"):
        PR610.but(codec="zlib")


def test_an_adaptation_is_named_by_the_recipe(monkeypatch):
    class Never:
        what = "learning nothing"
        def __init__(self, model, recipe, ranks=None): self.model = model
        def score(self, tokens, tables, cfg, progress=False):
            return windows.score(self.model, tokens, tables, cfg.eval_seq_len, cfg.eval_stride)
    monkeypatch.setitem(ADAPTATIONS, "never", Never)
    assert PR610.but(adaptation="never").stages.adaptation == "never"
    with pytest.raises(ValueError, match="adaptation='sometimes': choose one of chunks, documents"):
        PR610.but(adaptation="sometimes")
    with pytest.raises(ValueError, match="rescore_temperature=1.0 needs weights that"):
        PR610.but(adaptation="documents", rescore_temperature=1.)
    with pytest.raises(ValueError, match="the script cannot do that yet"):
        script.entry_script(at_scale(PR610.but(adaptation="documents"), "tiny"))


@pytest.mark.slow
def test_a_run_adapts_by_document(novels, tmp_path):
    small = at_scale(PR610, "tiny").but(iterations=2, warmup_steps=0, adaptation="documents",
        ttt_lora_chunk_tokens=64)
    report = pipeline.run(pipeline.start(small, novels, tmp_path/"run", "cpu", 256, progress=False))
    assert report.result["stage"] == "adapted" and report.result["targets"] == 256
    assert "each document by itself" in report.result["what"]
