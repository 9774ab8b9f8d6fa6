"""The five systems' own numbers, reproduced: losses, logits and gradient norms of their published
code."""

import json

import pytest
import torch

from pgolf.model.embeddings import bigram_hash
from pgolf.model.gpt import GPT, ModelConfig, count_parameters
from pgolf.squeeze.formats import load_published, published_name
from pgolf.model.layers import rotary_tables

COMMON = dict(smear=True, ln_scale=True, skip_init=1.)
ODD = { # what each system's code fixes without a field in its own configuration
    "pr610": dict(activation="leaky_relu2"),
    "pr576": dict(activation="relu2"),
    "pr598": dict(activation="star_relu", skip_gate=True),
    "pr1123": dict(activation="leaky_relu2", skip_init=.1, norm_eps=1e-6, rope_train_seq_len=0,
        bigram_zero_init=True, ve_zero_init=True),
    "pr601": dict(activation="relu2", gated_attention=True, value_residual=True,
        rope_train_seq_len=0),
}
RENAMED = dict(bigram_buckets="bigram_vocab_size", bigram_vocab="bigram_vocab_size",
    bigram_embed_dim="bigram_dim", hidden_mult="mlp_mult",
               xsa_layers="xsa_last_n", partial_rope_dims="rope_dims")


def build(z, name):
    "The golden file's small model, its weights loaded."
    published = {RENAMED.get(k, k): v for k, v in json.loads(str(z["config"])).items()}
    fields = {k: v for k, v in published.items() if k in ModelConfig.__dataclass_fields__}
    if "ve_layers" in fields: fields["ve_layers"] = [int(i) for i in fields["ve_layers"].split(",")]
    model = GPT(ModelConfig(**COMMON | fields | ODD[name]))
    return load_published(model,
        {k.removeprefix("param/"): z[k] for k in z.files if k.startswith("param/")})


def pentanary(w):
    """PR #1123's MLP input weights as its evaluation reads them: five levels per row, thresholds
    0.7 and 1.4 of the mean size."""
    m = w.abs().mean(1, keepdim=True)
    q = w.sign()*((w.abs() > .7*m).float() + (w.abs() > 1.4*m).float())
    return q*(w*q).sum(1, keepdim=True)/(q*q).sum(1, keepdim=True).clamp_min(1e-8)


def batch(z):
    ids = torch.from_numpy(z["ids"].astype("int64"))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("name", ODD)
def test_eval_loss_and_logits(golden, name):
    z = golden(name)
    model, (x, y) = build(z, name).eval(), batch(z)
    with torch.no_grad():
        if name == "pr1123": # its integer layers are plain in eval mode, its pentanary one is not
            for b in model.blocks: b.mlp.fc.weight.copy_(pentanary(b.mlp.fc.weight))
        assert model.loss(x, y).item() == pytest.approx(float(z["loss"]), rel=1e-5)
        logits = model(x)
    for part, got in (("first8", logits[:, :8]), ("last8", logits[:, -8:])):
        if f"logits_{part}" in z.files:
            torch.testing.assert_close(got, torch.from_numpy(z[f"logits_{part}"]),
                rtol=1e-5, atol=1e-5)


def check_gradients(model, z):
    "Hold train-mode loss and every gradient norm to a golden file."
    loss = model.loss(*batch(z))
    loss.backward()
    assert loss.item() == pytest.approx(float(z["train_loss"]), rel=1e-5)
    own = {n: p.grad for n, p in model.named_parameters()}
    for k in z.files:
        if k.startswith("gradnorm/"):
            assert own[published_name(k.removeprefix("gradnorm/"))].norm().item() == pytest.approx(
                float(z[k]), rel=1e-4), k


# PR #1123 quantizes in train mode: see the quant tests
@pytest.mark.parametrize("name", [n for n in ODD if n != "pr1123"])
def test_gradients(golden, name):
    z = golden(name)
    check_gradients(build(z, name).train(), z)


FULL = {
    "pr610": (26_993_756,
        dict(bigram_vocab_size=2048, xsa_last_n=4, ve_dim=128, ve_layers=(9, 10))),
    "pr576": (33_580_124,
        dict(bigram_vocab_size=8192, xsa_last_n=11, ve_dim=128, ve_layers=(9, 10),
            num_kv_heads=8, mlp_mult=3.5)),
    "pr598": (27_030_108,
        dict(bigram_vocab_size=2048, xsa_last_n=4, ve_dim=128, ve_layers=(9, 10))),
    "pr1123": (32_760_946,
        dict(bigram_vocab_size=2048, xsa_last_n=11, ve_dim=128, ve_layers=(9, 10), mlp_mult=4,
            value_residual=True)),
    "pr601": (26_744_007, dict(bigram_vocab_size=1024, xsa_last_n=4)),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_parameter_counts(name):
    total, fields = FULL[name]
    assert sum(count_parameters(ModelConfig(**COMMON | ODD[name] | fields)).values()) == total


# below and above the length where the base is stretched
@pytest.mark.parametrize("seq_len", [512, 2048])
def test_rotary_tables(golden, seq_len):
    z = golden("functions")
    for name, table in zip(("cos", "sin"), rotary_tables(seq_len, 16)):
        torch.testing.assert_close(table[::37], torch.from_numpy(z[f"rope/{seq_len}/{name}"]),
            rtol=0, atol=1e-6)


@pytest.mark.parametrize("buckets", [2048, 8192, 10240])
def test_bigram_hash(golden, buckets):
    z = golden("functions")
    assert bigram_hash(torch.from_numpy(z["bigram/ids"]),
        buckets).tolist() == z[f"bigram/{buckets}"].tolist()


# ---- blocks that repeat: PR #1394

def build_1394(z):
    "Its small model, in the long order."
    c = json.loads(str(z["config"]))
    order = tuple(int(i) for i in (*z["encoder_indices"], *z["decoder_indices"]))
    fields = {k: v for k, v in c.items() if k in ModelConfig.__dataclass_fields__}
    cfg = ModelConfig(**fields | dict(activation="leaky_relu2", ln_scale=True, skip_init=1.,
        skip_gate=True, rope_train_seq_len=0, xsa_last_n=c["num_layers"], layer_order=order))
    return load_published(GPT(cfg),
        {k.removeprefix("param/"): z[k] for k in z.files if k.startswith("param/")})


@pytest.mark.parametrize("part", ["", "noloop/"])
def test_blocks_that_repeat(golden, part):
    "Loss, logits and gradients of PR #1394's own code, with its loop and before it is switched on."
    z = golden("pr1394")
    model = build_1394(z)
    if part: model.order = tuple(range(model.cfg.num_layers))
    x, y = batch(z)
    logits, loss = model(x), model.loss(x, y)
    loss.backward()
    assert loss.item() == pytest.approx(float(z[part+"loss"]), rel=1e-5)
    training = model.train().loss(x, y).item()  # nothing differs between the modes
    assert training == pytest.approx(float(z[part+"train_loss"]), rel=1e-5)
    for name, got in (("first8", logits[:, :8]), ("last8", logits[:, -8:])):
        torch.testing.assert_close(got, torch.from_numpy(z[f"{part}logits_{name}"]),
            rtol=1e-5, atol=1e-5)
    names = [k for k in z.files if k.startswith(part+"gradnorm/")]
    assert names
    for k in names:
        own = model.get_parameter(published_name(k.removeprefix(part+"gradnorm/"))).grad
        assert own.norm().item() == pytest.approx(float(z[k]), rel=1e-4, abs=1e-9), k


def test_full_size_parameter_count_of_pr1394():
    cfg = ModelConfig(vocab_size=8192, mlp_mult=4., ln_scale=True, skip_init=1., skip_gate=True,
        layer_order=(*range(6), 4, 5, *range(4, 11)))
    assert sum(count_parameters(cfg).values()) == 35_943_512
