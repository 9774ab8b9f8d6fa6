"Twelve steps of PR #610's own code (golden/train_pr610.npz), and what leaving weight decay out would do to them."
import json
import numpy as np, pytest, torch
from pgolf.gpt import GPT, ModelConfig
from pgolf.muon import OptimConfig, make_optimizers


def model_config(c):
    "Our configuration from the published parameter names; the rest as PR #610 has it."
    return ModelConfig(
        **{k: c[k] for k in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "qk_gain_init", "logit_softcap", "tied_embed_init_std",
                             "rope_dims", "rope_base", "bigram_vocab_size", "bigram_dim", "xsa_last_n", "ln_scale", "ve_dim")},
        mlp_mult=float(c["mlp_mult"]), activation="leaky_relu2", smear=True, skip_init=1., ve_layers=tuple(int(i) for i in c["ve_layers"].split(",")))


def run(g, no_decay=None, **changes):
    "Losses of the twelve steps and the norm of every parameter's change, without weight decay for one group, with `changes` to the optimizer."
    h = json.loads(str(g["hyper"]))
    model = GPT(model_config(json.loads(str(g["config"]))))
    model.load_state_dict({n: torch.from_numpy(g[f"param0/{n}"]) for n,_ in model.named_parameters()})
    start = {n: p.detach().clone() for n,p in model.named_parameters()}
    cfg = dict(matrix_lr=h["matrix_lr"], tied_embed_lr=h["embed_lr"], scalar_lr=h["scalar_lr"], muon_weight_decay=h["weight_decay"],
               adam_weight_decay=h["weight_decay"], beta1=h["betas"][0], beta2=h["betas"][1], adam_eps=h["eps"], ns_steps=h["ns_steps"])
    opts = make_optimizers(model, OptimConfig(**cfg | changes))
    for o in opts:
        for group in o.param_groups:
            if "momentum" in group: group["momentum"] = h["momentum"]
            if group["name"] == no_decay: group["weight_decay"] = 0.
    ids,n,losses = torch.from_numpy(g["ids"].astype(np.int64)), h["batch"]*h["seq_len"], []
    for s in range(h["steps"]):
        span = ids[s*n:(s+1)*n+1]
        loss = model.loss(span[:-1].view(-1, h["seq_len"]), span[1:].view(-1, h["seq_len"]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), h["grad_clip"])
        for o in opts: o.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    change = {n: (p.detach()-start[n]).norm().item() for n,p in model.named_parameters()}
    return np.array(losses), change


@pytest.fixture(scope="module")
def twelve(golden):
    g = golden("train_pr610")
    return g, *run(g)


def off(losses, g): return np.abs(losses/g["losses"]-1)


def test_groups(twelve):
    g = twelve[0]
    groups = json.loads(str(g["hyper"]))["groups"]
    model = GPT(model_config(json.loads(str(g["config"]))))
    names = {id(p): n for n,p in model.named_parameters()}
    ours = [{names[id(p)] for p in group["params"]} for o in make_optimizers(model) for group in o.param_groups]
    assert ours == [set(groups[k]) for k in ("muon", "adam_embed", "adam_scalar")]


def test_losses(twelve):
    g,losses,_ = twelve
    assert off(losses, g)[0] < 1e-5
    assert off(losses, g).max() < 3e-3


def test_changes(twelve):
    g,_,change = twelve
    err = [abs(v/float(g[f"delta_norm/{n}"])-1) for n,v in change.items() if float(g[f"delta_norm/{n}"]) > 0]
    assert np.median(err) < 3e-3
    assert all(v == 0 for n,v in change.items() if float(g[f"delta_norm/{n}"]) == 0) # a dead bigram stays dead


# 2.5e-4: other kernels, thread counts and precisions of Newton-Schulz stay within 1.4e-4, the smallest effect to be caught is 4.2e-4 (scalars)
@pytest.mark.parametrize("group", ["matrices", "tables", "scalars"])
def test_forgotten_weight_decay_shows(twelve, group):
    g,losses,_ = twelve
    assert off(losses, g).max() < 2.5e-4
    assert off(run(g, no_decay=group)[0], g).max() > 2.5e-4
