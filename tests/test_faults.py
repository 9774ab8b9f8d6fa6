"""Bad input at every door: one line that says what is wrong and what to do, no traceback, an exit
code, nothing half-written."""

import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import HANG, ROOT, half_written, run_pgolf, start_pgolf
from test_end_to_end import STAGES, lines, tiny, wait_until

from pgolf.command.options import resolve
from pgolf.squeeze.artifact import ArtifactError, save_artifact
from pgolf.game.data import Dataset, build_dataset, open_dataset
from pgolf.game.shards import read_shard, write_shard
from pgolf.systems.report import Report
from pgolf.systems.pipeline import read_artifact, run, start
from pgolf.game.tokenizer import train_tokenizer
from pgolf.train.checkpoint import read_checkpoint


def refused(result, *words, code=1):
    "Assert that a command failed with one line that holds `words`; the line."
    got, _, err = result
    assert got == code and "Traceback" not in err, err
    said = [line for line in err.splitlines() if "pgolf: error: " in line]
    assert len(said) == 1 and said[0].startswith(
        "pgolf: error: ") and err.splitlines()[-1] == said[0], err
    for w in words: assert w in said[0], f"{w!r} is missing in: {said[0]}"
    return said[0]


# ---- settings and names

SETTINGS = {
    "unknown recipe": (("run", "pr61"), ("unknown recipe 'pr61'", "near matches: pr610")),
    "unknown scale": (("run", "pr610", "--scale", "huge"),
        ("scale='huge'", "full, pocket", "tiny")),
    "no equals sign": (("run", "pr610", "-o", "ttt_lr"), ("'ttt_lr'", "write field=value")),
    "unknown setting": (("run", "pr610", "-o", "matrix_rl=.1"),
        ("'matrix_rl'", "near matches:", "matrix_lr", "--settings")),
    "wrong type": (("run", "pr610", "-o", "num_layers=many"),
        ("num_layers='many'", "expected int")),
    "wrong number": (("run", "pr610", "-o", "num_layers=2.5"),
        ("num_layers='2.5'", "expected int")),
    "no layers": (("run", "pr610", "-o", "num_layers=0"), ("num_layers=0",)),
    "heads and width": (("run", "pr610", "-o", "num_heads=5"), ("num_heads=5", "model_dim=192")),
    "heads and key heads": (("run", "pr610", "-o", "num_kv_heads=3"),
        ("num_kv_heads=3", "num_heads=4")),
    "stride over window": (("run", "pr610", "--scale", "tiny", "-o", "eval_stride=65"),
        ("eval_stride=65", "64")),
    "batch and rows": (("run", "pr610", "-o", "train_batch_tokens=1000"),
        ("train_batch_tokens=1000", "multiple")),
    "no steps": (("run", "pr610", "--scale", "tiny", "--steps", "0"), ("iterations=0",)),
    "chunks of nothing": (("run", "pr610", "-o", "ttt_chunk_tokens=0"), ("ttt_chunk_tokens=0",)),
    "plan of unknown recipe": (("plan", "pr"), ("unknown recipe 'pr'", "there are: pr610")),
    "plan of impossible size": (("plan", "pr610", "-o", "num_heads=7"), ("num_heads=7",)),
    "plan against unknown": (("plan", "pr610", "--against", "pr611"),
        ("unknown recipe 'pr611'", "near matches: pr610")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_impossible_settings(name, main, novels, tmp_path, monkeypatch):
    args, words = SETTINGS[name]
    monkeypatch.chdir(tmp_path)
    data = ("--corpus", novels.path, "--out", "run") if args[0] == "run" else ()
    refused(main(*args, *data), *words)
    assert not list(tmp_path.iterdir()), "nothing is written for settings that cannot be"


RUNS = {
    "unknown device": (("--device", "toaster"), ("device='toaster'", "cpu")),
    "ranks and spans": (("--nproc", 3), ("nproc=3", "num_spans=2")),
    "no ranks": (("--nproc", 0), ("nproc=0",)),
    "negative targets": (("--eval-tokens", -5), ("eval_tokens=-5",)),
    "other vocabulary": (("-o", "vocab_size=2048"), ("vocab_size=2048", "1024", "other data")),
}


@pytest.mark.parametrize("name", RUNS)
def test_impossible_runs(name, main, novels, tmp_path):
    more, words = RUNS[name]
    refused(main(*tiny(novels, tmp_path/"run", *more)), *words)
    assert not (tmp_path/"run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_that_is_not_there(main, novels, tmp_path):
    refused(main(*tiny(novels, tmp_path/"run", "--device", "cuda")), "device='cuda'",
        "choose device='cpu'")


def test_folder_that_is_a_file(main, novels, tmp_path):
    (tmp_path/"taken").write_text("mine")
    refused(main(*tiny(novels, tmp_path/"taken")), str(tmp_path/"taken"), "another")
    assert (tmp_path/"taken").read_text() == "mine"


@pytest.mark.parametrize("args",
    ["run", "run pr610 --nonsense", "run pr610 --steps many", "nonsense", "data build out"])
def test_misuse_shows_usage(args, main):
    code, _, err = main(*args.split())
    assert (code == 2 and "Traceback" not in err and "Usage: " in err
        and "rror" in err.splitlines()[-1])


def test_real_process_says_it_alike(novels, tmp_path):
    "What the others see in this process, once from outside."
    result = run_pgolf(*tiny(novels, tmp_path/"run", "-o", "num_heads=5"))
    refused(result, "num_heads=5")
    assert len(result[2].splitlines()) == 1 and not (tmp_path/"run").exists()


# ---- data

@pytest.fixture
def copy(novels, tmp_path):
    "A dataset of one's own to spoil."
    return open_dataset(shutil.copytree(novels.path, tmp_path/"data"))


def spoil_tokenizer(d:Dataset):
    train_tokenizer(["one two three four five six"]*50, d.tokenizer_path, 300,
        hard_vocab_limit=False)
def spoil_ids(d:Dataset):
    "As many ids as before, and no checksum that would tell first."
    write_shard(d.train_shards[0], np.full(len(read_shard(d.train_shards[0])), 1024))
    (d.path/"checksums.json").unlink()
def cut(path): path.write_bytes(path.read_bytes()[:-100])


SPOILED = {
    "no corpus": (lambda d: shutil.rmtree(d.path),
        ("no dataset at", "manifest.json", "pgolf data")),
    "no validation shard": (lambda d: d.val_shards[0].unlink(),
        ("no shard at", "_val_000000.bin", "pgolf data")),
    "no training shard": (lambda d: d.train_shards[0].unlink(),
        ("no shard at", "_train_000000.bin", "pgolf data")),
    "cut shard": (lambda d: cut(d.val_shards[0]),
        ("_val_000000.bin", "bytes, expected", "build it again")),
    "not a shard": (lambda d: d.val_shards[0].write_bytes(bytes(4096)),
        ("_val_000000.bin", "magic number 0")),
    "foreign tokenizer": (spoil_tokenizer,
        (".model has", "expected vocab_size=1024", "take the tokenizer")),
    "not a tokenizer": (lambda d: d.tokenizer_path.write_text("no model"),
        (".model", "not a SentencePiece model")),
    "foreign ids": (spoil_ids,
        ("_train_000000.bin", "token id 1024", "vocab_size=1024", "of one dataset")),
    "broken manifest": (lambda d: (d.path/"manifest.json").write_text("{"),
        ("manifest.json is not a manifest", "build the data again")),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_corpus(name, main, copy, tmp_path):
    spoil, words = SPOILED[name]
    spoil(copy)
    refused(main(*tiny(copy, tmp_path/"run")), *words)
    assert half_written(tmp_path/"run") == [] and not (
        tmp_path/"run"/"weights.safetensors").exists()


TEXTS = {
    "empty text": ("", ("train.txt", "empty", "expected text")),
    "blank text": (" \n\n ", ("train.txt", "empty", "expected text")),
    "not UTF-8": (b"caf\xe9", ("train.txt", "not UTF-8")),
    "too little text": ("a b c", ("vocab_size=1024", "smaller vocabulary")),
    "missing": (None, ("train.txt",)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_make_no_dataset(name, main, tmp_path):
    text, words = TEXTS[name]
    if text is not None:
        (tmp_path/"train.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path/"val.txt").write_text("It is a truth universally acknowledged.")
    before = sorted(tmp_path.iterdir())
    refused(main("data", "build", tmp_path/"made", "--train", tmp_path/"train.txt", "--val",
        tmp_path/"val.txt"), *words)
    assert sorted(tmp_path.iterdir()) == before


def test_line_without_text_is_named(main, tmp_path):
    docs = tmp_path/"docs.jsonl"
    docs.write_text('{"text": "fine"}\n{"title": "no text"}\n')
    refused(main("data", "build", tmp_path/"made", "--train", docs, "--val", docs),
        "docs.jsonl line 2", '"text"')
    assert not (tmp_path/"made").exists()


def test_folder_in_use_is_not_built_over(main, novels, tmp_path):
    (tmp_path/"a.txt").write_text("text")
    refused(main("data", "build", novels.path, "--train", tmp_path/"a.txt", "--val",
        tmp_path/"a.txt"), str(novels.path), "choose another path")
    open_dataset(novels.path)


# ---- what a run leaves, damaged

@pytest.fixture(scope="session")
def finished(novels, tmp_path_factory):
    "Folder of a small finished run."
    out = tmp_path_factory.mktemp("runs")/"finished"
    run(start(resolve("pr610", "tiny", {}, steps=3), novels, out, "cpu", 256, progress=False))
    return out


def test_truncated_artifact_is_named(finished, tmp_path, main):
    data, path = (finished/"model.pgolf").read_bytes(), tmp_path/"model.pgolf"
    for n in (0, 5, 40, len(data)//2, len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises(ArtifactError,
            match=r"model\.pgolf: .*(truncated|not a pgolf artifact)"):
            read_artifact(path)
    refused(main("plan", "pr610", "--scale", "tiny", "--run", tmp_path), str(path), "truncated",
        "copy it again")


def test_one_flipped_byte_is_found_wherever_it_is(finished, tmp_path):
    data, path = (finished/"model.pgolf").read_bytes(), tmp_path/"model.pgolf"
    for at in (0, 9, 20, 50, 1000, len(data)//2, len(data) - 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at+1:])
        with pytest.raises(ArtifactError,
            match=r"model\.pgolf: .*(; copy it again|not a pgolf artifact|use the release)"):
            read_artifact(path)


def test_artifact_of_something_else(tmp_path):
    "A sound container that holds no model of ours."
    path = tmp_path/"other.pgolf"
    for tensors, meta in (({"x": torch.zeros(3)}, {}),
        ({"x": torch.zeros(3)}, {"model": {"layers": 3}}),
        ({"x": torch.zeros(3)}, {"model": {"num_layers": 1}})):
        save_artifact(path, tensors, meta)
        with pytest.raises(ValueError, match=r"other\.pgolf"): read_artifact(path)
    with pytest.raises(ValueError, match=r"absent\.pgolf: .*give the path of an artifact"):
        read_artifact(tmp_path/"absent.pgolf")


def test_run_folder_without_what_is_asked(main, tmp_path):
    refused(main("plan", "pr610", "--scale", "tiny", "--run", tmp_path), "model.pgolf",
        "give the path of an artifact")
    refused(main("report", tmp_path), "report.json", "a run writes one")
    (tmp_path/"report.json").write_text('{"recipe": "pr610"}')
    refused(main("report", tmp_path), "report.json", "not a report")
    refused(main("reproduce", "--notebooks", tmp_path), "no run notebooks", "--notebooks")
    refused(main("reproduce", "pr1", "--notebooks", ROOT/"nbs"/"runs"),
        "unknown system 'pr1'", "pr610")


@pytest.fixture(scope="session")
def unfinished(novels, tmp_path_factory):
    "Folder of an interrupted run."
    out = tmp_path_factory.mktemp("runs")/"unfinished"
    child = start_pgolf(*tiny(novels, out, "--steps", 500))
    wait_until(lambda: lines(out/"metrics.jsonl") > 3, child)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=HANG)
    assert child.returncode == 130 and not Report.load(out/"report.json").complete
    return out


def test_unfinished_run_of_other_settings_is_kept(unfinished, novels, main):
    before = {p.name: p.read_bytes() for p in unfinished.iterdir()}
    for other in (("--seed", 5), ("--steps", 9), ("-o", "matrix_lr=.1")):
        refused(main(*tiny(novels, unfinished, *(() if "--steps" in other else ("--steps", 500)),
            *other)), str(unfinished), "unfinished run", "another folder")
    assert {p.name: p.read_bytes() for p in unfinished.iterdir()} == before


def test_unfinished_run_on_other_text_is_kept(unfinished, novels, main, tmp_path):
    other = build_dataset(["Other words. "*500], ["Held out. "*500], tmp_path/"other",
        tokenizer=novels.tokenizer_path)
    out = shutil.copytree(unfinished, tmp_path/"run")
    refused(main(*tiny(other, out, "--steps", 500)), str(out), "unfinished run", "another folder")


def test_damaged_checkpoint_is_named(unfinished, novels, main, tmp_path):
    out = shutil.copytree(unfinished, tmp_path/"run")
    cut(out/"checkpoint.safetensors")
    refused(main(*tiny(novels, out, "--steps", 500)), "checkpoint.safetensors",
        "truncated", "start anew")


# ---- full disk: no file can grow beyond a limit; a file that the command has open already is no
# exception

def full_disk(limit): return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize("limit, victim", [(2_000, "recipe.json"), (8_000, "weights.safetensors")])
def test_full_disk_while_running(novels, tmp_path, limit, victim):
    out = tmp_path/"run"
    result = run_pgolf(*tiny(novels, out, "--steps", 3), preexec_fn=full_disk(limit))
    refused(result, str(out/victim), "free some space")
    assert half_written(tmp_path) == [] and not (out/victim).exists()


LATE = """
import resource, sys
from pgolf import cli
from pgolf.systems import pipeline
_, stage, limit, *args = sys.argv
real = getattr(pipeline, stage)
def on_last_bytes(*a):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), -1))
    return real(*a)
setattr(pipeline, stage, on_last_bytes)
sys.argv = ["pgolf", *args]
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage, limit, victim",
    [("train_weights", 300, "metrics.jsonl"), ("write_artifact", 20_000, "model.pgolf"),
        ("score_all", 2_000, "report.json"), ("score_all", 15_000, "scores.npz")])
def test_disk_that_fills_up_late(finished, novels, tmp_path, stage, limit, victim):
    "The limit falls when a stage begins; with space again, the same command ends the run."
    args, out = [str(a) for a in tiny(novels, tmp_path/"run", "--steps", 3)], tmp_path/"run"
    child = subprocess.run([sys.executable, "-c", LATE, stage, str(limit), *args],
        capture_output=True, text=True, timeout=HANG, cwd=ROOT)
    refused((child.returncode, child.stdout, child.stderr), str(out/victim), "free some space")
    report = Report.load(out/"report.json")
    assert not report.complete and half_written(out) == []
    if victim != "model.pgolf": return
    before = (out/"weights.safetensors").stat().st_mtime_ns
    code, _, err = run_pgolf(*args)
    assert code == 0, err
    assert (out/"weights.safetensors").stat().st_mtime_ns == before, "trained again"
    report = Report.load(out/"report.json")
    assert report.complete and [r["stage"] for r in report.rows] == STAGES


def test_full_disk_while_building_data(tmp_path):
    text = tmp_path/"text.txt"
    text.write_text("\n".join(f"It is a truth number {i} universally acknowledged."
        for i in range(2000)))
    result = run_pgolf("data", "build", tmp_path/"made", "--train", text, "--val", text,
        "--vocab-size", 300, preexec_fn=full_disk(10_000))
    refused(result, "made", "free some space")
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


# ---- numbers that run away

def test_divergence_stops_with_the_state_on_disk(novels, tmp_path, main):
    out = tmp_path/"run"
    refused(
        main(*tiny(novels, out, "--steps", 20, "-o", "matrix_lr=1e30", "-o", "scalar_lr=1e30")),
        "loss", "diverged.safetensors", "lower learning rates")
    assert not Report.load(out/"report.json").complete and half_written(out) == []
    assert read_checkpoint(out/"diverged.safetensors")[1]["step"] < 20
