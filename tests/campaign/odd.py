"""Losses that are not finite or nothing, texts that are hardly texts: every system gives a clear
error or the right value. And repetition: every system twice, on 1, 2, 4 threads and ranks."""
import json
import math
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import counts  # noqa: E402
import kills  # noqa: E402
import numpy as np  # noqa: E402
import server  # noqa: E402
import small  # noqa: E402
import torch  # noqa: E402

from pgolf.game.shards import write_shard, write_sums  # noqa: E402
from pgolf.scale.notebook import own_notebooks  # noqa: E402

SYSTEMS = list(own_notebooks())
BOS = 1
APART = 1e-3  # nats between sums in another order, after a few steps and rounding


def streams(train, val):
    "Training and held-out tokens of every odd kind, from sound ones."
    word = int(train[5])
    return {
        "one token over and over": (np.full(4000, word), np.full(300, word)),
        "BOS everywhere": (np.full(4000, BOS), np.full(300, BOS)),
        "documents of one token": (np.tile([BOS, word], 2000), np.tile([BOS, word], 150)),
        "empty documents": (np.tile([BOS, BOS, word], 1300), np.tile([BOS, BOS, BOS, word], 80)),
        "one document longer than the corpus": (train[train != BOS][:4000], val[val != BOS][:300]),
        "two held-out tokens": (train, val[:2]),
        "one held-out token": (train, val[:1]),
        "less training text than a window": (train[:9], val),
    }


def odd_dataset(base, folder, tokens):
    "The small dataset with other tokens in its shards, counted and summed up anew."
    shutil.copytree(base, folder)
    path = folder/"manifest.json"
    about = json.loads(path.read_text())
    stats = about["datasets"][0]["stats"]
    for split, t in zip(("train", "val"), tokens):
        shard = folder/"datasets"/"data"/f"data_{split}_000000.bin"
        write_shard(shard, np.asarray(t))
        write_sums(folder, [shard])
        stats[f"tokens_{split}"] = len(t)
    path.write_text(json.dumps(about))
    return folder


def words(system, data, out, *more):
    "A run of a system, as words of the command."
    own = small.own(small.at_scale(small.get_recipe(system), "tiny"))
    return ["run", system, "--scale", "tiny", "--corpus", str(data), "--out", out,
        "--eval-tokens", small.TARGETS, "--quiet", "--device", "cpu", *small.as_options(own), *more]


def right(report):
    "Whether every row is finite and adds up."
    rows = report["rows"]
    return report["complete"] and all(math.isfinite(r["val_loss"]) and math.isclose(r["val_bpb"],
        r["val_loss"]*r["targets"]/math.log(2)/r["text_bytes"], rel_tol=1e-9) for r in rows)


def ran(base, args, before=None):
    "Exit code and what was said; the folder is left."
    command = server.Command(args, base, base/"said", before)
    command.wait(server.HANG)
    code = command.end()
    text = (base/"said").read_text()
    (base/"said").unlink()
    return code, text


def outcome(base, args):
    "What is wrong with a run that may be refused."
    code, text = ran(base, args)
    report = base/"out"/"report.json"
    if code: return "" if "pgolf: error: " in text and "Traceback" not in text else text[-300:]
    return "" if right(json.loads(report.read_text())) else "a row that is not right"


def note(row, what, wrong, path):
    counts.add(row, what, path, tried=1, passed=int(not wrong))
    if wrong:
        counts.found(row, f"{what}: {wrong[:300]}", path)
        print(f"WRONG {row}, {what}: {wrong}", flush=True)


def odd(base, path=counts.RESULTS, systems=None):
    "Every system on every odd text, and with losses that run away."
    data = small.dataset(base/"data")
    for s in systems or SYSTEMS:  # what is refused later is not refused for its settings
        code, said = ran(base, words(s, base/"data", "out"))
        if code: raise RuntimeError(f"{s} fails on sound text: {said[-300:]}")
        shutil.rmtree(base/"out")
    kinds = streams(data.train_tokens(5000).numpy(), data.val_tokens().numpy())
    for what, tokens in kinds.items():
        odd_dataset(base/"data", base/"odd", tokens)
        for s in systems or SYSTEMS:
            note("odd texts", what, outcome(base, words(s, base/"odd", "out")), path)
            shutil.rmtree(base/"out", ignore_errors=True)
        shutil.rmtree(base/"odd")
    for s in systems or SYSTEMS:
        for lr in ("1e30", "inf", "nan", "0"):
            more = ("-o", f"matrix_lr={lr}", "-o", f"scalar_lr={lr}")
            wrong = outcome(base, words(s, base/"data", "out", *more))
            note("odd numbers", f"rates of {lr}", wrong, path)
            shutil.rmtree(base/"out", ignore_errors=True)


def numbers(folder):
    "Losses of training and of each stage."
    report = json.loads((folder/"report.json").read_text())
    curve = json.loads((folder/"training.json").read_text())["losses"]
    return np.array(curve+[r["val_loss"] for r in report["rows"]])


def by_rank(system):
    "Whether each rank draws rows or clips on its own, so that other numbers of ranks train else."
    train = small.recipe(system).train
    return train.loader == "shuffled" or train.clip_each_rank


def repeat(base, path=counts.RESULTS, systems=None):
    "Twice the same bits; other threads and ranks within a tolerance, and how far apart they came."
    small.dataset(base/"data", shard_size=1200)  # one for each rank at least
    for s in systems or SYSTEMS:
        one = words(s, base/"data", "one", "-o", "num_spans=4", "-o", "train_batch_tokens=128")
        if ran(base, one)[0]:
            note("repeatability", "a first run", f"{s} fails", path)
            continue
        first, whole = numbers(base/"one"), kills.bits(base/"one")
        def again(what, *more, before=None, same=False, most=APART):
            code, text = ran(base, [*map(lambda a: "out" if a == "one" else a, one), *more], before)
            wrong = text[-200:] if code else ""
            if not wrong and same and kills.bits(base/"out") != whole: wrong = f"{s}: other bits"
            if not wrong:
                off = float(np.abs(numbers(base/"out")-first).max())
                if not off <= most: wrong = f"{s}: {off:.2g} nats apart"
                counts.add("repeatability", what, path, most_apart=off)
            note("repeatability", what, wrong, path)
            shutil.rmtree(base/"out", ignore_errors=True)
        again("the same twice", same=True)
        for n in (2, 4):
            again(f"{n} threads", before=lambda n=n: torch.set_num_threads(n))
            if by_rank(s): again(f"{n} ranks, each on its own", "--nproc", n, most=9.)
            else: again(f"{n} ranks", "--nproc", n)
        shutil.rmtree(base/"one")
