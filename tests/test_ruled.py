"""The rulings in `pgolf audit` and `pgolf doctor`: a line each, and planted faults that fail it."""
import json
import shutil

import pytest
import torch
from pgolf.files import write_json
from pgolf.squeeze.artifact import load_artifact, save_artifact
from pgolf.squeeze.gptq import quant_errors, quantize_state
from pgolf.submit.ruled_logs import learns_early, settings_of
from pgolf.systems import pipeline
from pgolf.systems.recipes import at_scale, get_recipe
from pgolf.systems.ruled import RULINGS
from pgolf.train.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
LINES = {"T2c", "T3c", "D2n", "D2r", "D2s", "D3l", "D4", "D7l", "D8", "S1"}


@pytest.fixture(scope="module")
def finished(novels, tmp_path_factory):
    "Two seeds of a run without adaptation."
    top = tmp_path_factory.mktemp("ruled")
    r = at_scale(get_recipe("pr610"), "tiny").but(iterations=3, warmup_steps=0, use_ttt=False,
        smear=False, bigram_vocab_size=0) # which look behind a BOS, by D9
    for seed in (1, 2):
        pipeline.run(pipeline.start(r.but(seed=seed), novels, top/f"pr610-{seed}", "cpu",
            eval_tokens=512, progress=False))
    return top


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path/"runs")
    return tmp_path/"runs"/"pr610-1"


@pytest.fixture
def verdict(main, novels):
    "Lines of the audit of a folder, and its exit code."
    def ask(run):
        code, said, _ = main("audit", run, "--data", novels.path)
        found = json.loads((run/"audit.json").read_text())["findings"]
        assert all(f["name"] in said for f in found)
        return code, {f["name"]: f["status"] for f in found}
    return ask


def test_every_ruling_has_its_line(copy, verdict):
    code, lines = verdict(copy)
    assert code == 0 and LINES <= set(lines) and len(RULINGS) == len(LINES)
    absent = {n for n in LINES if lines[n] == "not applicable"}
    assert absent == {"D3l", "D4"} and "failed" not in lines.values()


def failed(verdict, run):
    code, lines = verdict(run)
    assert code
    return {n for n, s in lines.items() if s == "failed"}


def test_weights_that_learnt_before_the_artifact(copy, verdict):
    "All else is as it should be: codes, errors and size are those of the weights that learnt."
    recipe = pipeline.load_recipe(copy/"recipe.json")
    state = {k.removeprefix("averaged/"): t for k, t in
        read_checkpoint(copy/"weights.safetensors")[0].items() if k.startswith("averaged/")}
    gen = torch.Generator().manual_seed(0)
    learnt = {n: t + .02*t.std(correction=0)*torch.randn(t.shape, generator=gen)
        for n, t in state.items()}
    codes = quantize_state(learnt, recipe.quant)
    size = save_artifact(copy/"model.pgolf", codes, load_artifact(copy/"model.pgolf")[1])
    write_json(copy/"errors.json", quant_errors(learnt, codes))
    report = json.loads((copy/"report.json").read_text())
    (copy/"report.json").write_text(json.dumps(report | dict(bytes_artifact=size)))
    assert "T3c" in failed(verdict, copy)


def test_fewer_tokens_reported_than_taken(copy, verdict):
    report = json.loads((copy/"report.json").read_text())
    report["training"]["tokens"] //= 2
    (copy/"report.json").write_text(json.dumps(report))
    assert failed(verdict, copy) == {"D2s"}


def test_a_denominator_of_other_text(copy, verdict):
    "The scores sum up to another number, too, so T4b finds it as well."
    report = json.loads((copy/"report.json").read_text())
    for row in report["rows"]: row["val_bpb"] /= 1.09
    (copy/"report.json").write_text(json.dumps(report))
    assert failed(verdict, copy) == {"D7l", "T4b"}


def test_a_neighbour_of_another_configuration(copy, verdict):
    other = copy.parent/"pr610-2"/"recipe.json"
    settings = json.loads(other.read_text())
    settings["optim"]["matrix_lr"] *= 2
    other.write_text(json.dumps(settings))
    assert failed(verdict, copy) == {"S1"}
    shutil.rmtree(other.parent)
    assert verdict(copy)[1]["S1"] == "not applicable"


# ---- logs of a folder

SETTINGS = "matrix_lr: {}\nnum_layers: 11\nseed: {}\n"
STEPS = "step:1/9 train_loss:3.0\nstep:9/9 train_loss:2.0 train_time:599000ms\n"
MODEL = "Serialized model int6+brotli: 15900000 bytes\n"
ADAPT = "ttt: chunk 1/9 loss 2.1\n"
SCORE = "final_int6_roundtrip_exact val_loss:2.07000000 val_bpb:1.22430000\n"


def doctor_says(main, folder, *logs):
    folder.mkdir(parents=True)
    (folder/"submission.json").write_text(json.dumps(dict(author="A", name="n", val_bpb=1.2243)))
    (folder/"train_gpt.py").write_text("import torch\n")
    (folder/"README.md").write_text("x")
    for i, log in enumerate(logs): (folder/f"train_seed{i}.log").write_text(log)
    return main("doctor", folder)[1]


def test_the_doctor_tells_seeds_of_different_configurations(main, tmp_path):
    def log(lr, seed): return SETTINGS.format(lr, seed) + STEPS + MODEL + SCORE
    said = doctor_says(main, tmp_path/"a", log(.02, 1), log(.03, 2))
    assert "configuration  WARN" in said and "matrix_lr: 0.02" in said
    same = doctor_says(main, tmp_path/"b", log(.02, 1), log(.02, 2))
    assert "configuration  ok" in same and "agree in 2 settings" in " ".join(same.split())


def test_the_doctor_tells_learning_before_the_artifact(main, tmp_path):
    early = doctor_says(main, tmp_path/"a", SETTINGS.format(.02, 1) + STEPS + ADAPT + MODEL + SCORE)
    late = doctor_says(main, tmp_path/"b", SETTINGS.format(.02, 1) + STEPS + MODEL + ADAPT + SCORE)
    assert "order  WARN" in early and "order  WARN" not in late


def test_what_a_log_says_of_its_settings():
    assert settings_of("a_lr=1e-4 seed=3 path_len=2\nstep:1/2 x\nlate_lr: 3\n") == {"a_lr": "1e-4"}
    assert settings_of('{"matrix_lr": 0.02, "ttt_epochs": 3}\n0/20 x') == {"matrix_lr": "0.02",
        "ttt_epochs": "3"}
    assert learns_early(STEPS + "prequant_ttt: epoch 1\n" + MODEL).startswith("prequant_ttt")
    assert not learns_early("ttt_epochs: 3 chunk: 4\n" + STEPS + MODEL)
