"""Every reader of a file that may come from elsewhere, with files to start from, the mutations that
fit their structure, and what "exact" means, computed apart from the reader."""
import io
import json
import struct
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import mutate as m  # noqa: E402
import numpy as np  # noqa: E402
import small  # noqa: E402
import test_formats as published  # noqa: E402
import test_fuzz as container  # noqa: E402
import torch  # noqa: E402

from pgolf.game.data import Dataset, open_dataset  # noqa: E402
from pgolf.game.documents import read_documents  # noqa: E402
from pgolf.game.shards import read_shard  # noqa: E402
from pgolf.game.tokenizer import load_tokenizer  # noqa: E402
from pgolf.scale.runs import read_plan  # noqa: E402
from pgolf.score.compare import load_scores  # noqa: E402
from pgolf.squeeze.artifact import ArtifactError, load_artifact, peek  # noqa: E402
from pgolf.squeeze.budget import open_checkpoint  # noqa: E402
from pgolf.squeeze.coders import CODECS  # noqa: E402
from pgolf.squeeze.formats import FormatError, read_published  # noqa: E402
from pgolf.submit import doctor  # noqa: E402
from pgolf.systems.ownership import own_data  # noqa: E402
from pgolf.systems.pipeline import kept_scores, read_artifact, start  # noqa: E402
from pgolf.systems.recipe import load_recipe  # noqa: E402
from pgolf.systems.report import Report, by_system, scoreboard  # noqa: E402
from pgolf.train.checkpoint import CheckpointError, read_checkpoint  # noqa: E402

WORDS = (ValueError, FileNotFoundError)
RECIPE = small.recipe()


class Target(NamedTuple):
    "A reader and the files it is given."
    file:str       # below the folder of small things; its content is what is changed
    kinds:dict     # mutation -> (random generator, one file, another) -> bytes
    read:Callable  # path of the file -> value
    exact:Callable # (bytes of the file, value) -> whether it is what they say
    errors:tuple=WORDS  # the one clear error
    more:Callable=lambda folder: []  # further files to start from, as bytes
    share:float=1. # how often, beside the others


# ---- what a file says, read apart from the package

def shard_is(data, value):
    n = struct.unpack_from("<i", data, 8)[0]
    return len(value) == n and value.tobytes() == data[1024:1024+2*n]


def arrays_are(data, value):
    "Arrays of a zip are those read, and so is the text beside them."
    names = ("nll", "bytes", "target", "position", "kind", "about")
    with zipfile.ZipFile(io.BytesIO(data)) as z:  # others may be damaged
        a = {n: np.lib.format.read_array(io.BytesIO(z.read(f"{n}.npy"))) for n in names}
    about = json.loads(str(a["about"]))
    s = value.scores
    pairs = ((a["nll"], s.nll), (a["bytes"], s.bytes), (a["target"], value.target),
        (a["position"], value.position), (a["kind"], value.kind))
    return (about["text"], about["available"], about["legal"]) == (value.text, s.available,
        s.legal) and all(np.array_equal(x, y.numpy(), equal_nan=True) for x, y in pairs)


def checkpoint_is(data, value):
    "Names, shapes and bytes, by the header of safetensors."
    size = int.from_bytes(data[:8], "little")
    header, (tensors, meta) = json.loads(data[8:8+size]), value
    said = {n: data[8+size+h["data_offsets"][0]:8+size+h["data_offsets"][1]]
        for n, h in header.items() if n != "__metadata__"}
    read = {n: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for n, t in tensors.items()}
    return said == read and repr(meta) == repr(json.loads(header["__metadata__"]["pgolf"]))


def report_is(data, value):
    said = json.loads(data)
    return all(repr(getattr(value, k)) == repr(v) for k, v in said.items())


def artifact_is(data, value): return container.exact(data, *value)
def weights_are(data, value):
    "No oracle but the file's own counts: every number in a plain tensor."
    state, about = value
    return about["parameters"] == sum(t.numel() for t in state.values()) == about["parameters"]


def anything(data, value): return True


# ---- readers that do what a command does with a file

def tokenizer(path):
    sp = load_tokenizer(path)
    Dataset("data", path.parent, sp.vocab_size(), path, (), ()).byte_tables()
    return sp.decode(sp.encode("It is a truth, 1813."))


def board(path):
    "What `pgolf report` makes of it."
    report = Report.load(path)
    scoreboard([report]), by_system([report]), report.mark, report.bytes_total
    return report


def whole_dataset(path):
    "The dataset around a file of it."
    root = next(p for p in path.parents if (p/"manifest.json").exists())
    data = open_dataset(root)
    return data, data.byte_tables(), data.val_tokens(), data.train_tokens(99)


@cache
def job_of(run):
    "A finished run, opened once."
    return start(RECIPE, open_dataset(run.parent/"data"), run, "cpu", small.TARGETS,
        progress=False)


def run_scores(path):
    "Scores of a finished run, read back."
    return kept_scores(job_of(path.parent))


def examined(path):
    "What the doctor says of the folder."
    found = doctor.doctor(path.parent)
    return doctor.report_text(found, 80).encode()


def both(path):
    "An artifact by its header, then as a whole."
    rows = peek(path)
    return load_artifact(path) if rows else None


JSON = dict(raw=m.raw, value=m.as_json, lines=m.as_lines)
ZIP = dict(raw=m.raw, array=m.as_npz, about=m.as_about)
SAVED = dict(raw=m.raw, saved=m.as_saved)


def bare_tokenizer(folder):
    "The tokenizer without its 240,000 bytes of rules for characters: what is left is its pieces."
    fields = m.fields_of((folder/"data"/"tokenizers"/"data.model").read_bytes())
    def bare(value): return m.message([f for f in m.fields_of(value) if f[0] != 2])
    return [m.message([(n, kind, bare(v) if n == 3 else v) for n, kind, v in fields])]*3


def published_files(layouts, press):
    "The published layouts, of a small model of each system, under one compressor."
    def make(_):
        out = []
        for name in layouts:
            system, write, _ = published.WRITERS[name]
            state = {n: t for n, t in published.renamed(system,
                published.own_model(system).state_dict()).items() if "blocks" not in n
                or "blocks.1" in n}
            out.append(published.PRESS[press](published.saved(write(state, published.KEEP)[0])))
        return out
    return make


def of_published(press):
    kinds = SAVED if press == "none" else dict(raw=m.raw, inside=m.under(press, m.as_saved))
    return Target("published.bin", kinds, read_published, weights_are, (FormatError,),
        published_files(list(published.WRITERS), press), dict(none=1, xz=.3).get(press, .5))


TARGETS = {
    "artifact": Target("run/model.pgolf", container.KINDS, both, artifact_is, (ArtifactError,),
        lambda _: [container.example(c) for c in CODECS], 10),
    "artifact, model": Target("run/model.pgolf", dict(header=container.header), read_artifact,
        anything, (ArtifactError,), share=.5),
    "shard": Target("data/datasets/data/data_val_000000.bin", dict(raw=m.raw, shard=m.as_shard),
        lambda p: read_shard(p, 320), shard_is, share=8),
    "shard of a dataset": Target("data/datasets/data/data_val_000000.bin",
        dict(raw=m.raw, shard=m.as_shard), whole_dataset, anything, share=.5),
    "manifest": Target("data/manifest.json", JSON, whole_dataset, anything, share=8),
    "checksums": Target("data/checksums.json", JSON, whole_dataset, anything, share=.5),
    "tokenizer": Target("data/tokenizers/data.model", dict(raw=m.raw, message=m.as_message),
        tokenizer, anything, more=bare_tokenizer, share=2),
    "scores": Target("scores.npz", ZIP, load_scores, arrays_are, share=5),
    "scores of a run": Target("run/scores.npz", dict(raw=m.raw, array=m.as_npz), run_scores,
        anything, share=.3),
    "report": Target("run/report.json", JSON, board, report_is, share=10),
    "recipe": Target("run/recipe.json", JSON, load_recipe, anything, share=8),
    "data of a run": Target("run/data.json", JSON, own_data, anything, share=8),
    "checkpoint": Target("run/checkpoint.safetensors", dict(raw=m.raw, tensors=m.as_safetensors),
        read_checkpoint, checkpoint_is, (CheckpointError,), share=2),
    "weights": Target("run/weights.safetensors", dict(raw=m.raw, tensors=m.as_safetensors),
        lambda p: open_checkpoint(p, RECIPE.model), anything),
    "published": of_published("none"),
    "published, zlib": of_published("zlib"),
    "published, zstd": of_published("zstd"),
    "published, xz": of_published("xz"),
    "published, brotli": of_published("brotli"),
    "claims of a submission": Target("folder/submission.json", JSON, examined, anything, share=.7),
    "script of a submission": Target("folder/train_gpt.py", dict(raw=m.raw, source=m.as_source),
        examined, anything, share=.7),
    "log of a submission": Target("folder/train.log", dict(raw=m.raw, lines=m.as_lines),
        examined, anything, share=.7),
    "plan of runs": Target("plan.yaml", dict(raw=m.raw, lines=m.as_lines), read_plan, anything,
        more=lambda _: [b"[pr610, pr576]", b"runs: &a [pr610, {recipe: pr576}]\nseeds: [1]"],
        share=8),
    "documents": Target("docs.jsonl", dict(raw=m.raw, lines=m.as_lines),
        lambda p: read_documents([p]), anything, share=6),
    "documents, gzip": Target("docs.jsonl.gz", dict(raw=m.raw, lines=m.under("gzip", m.as_lines)),
        lambda p: read_documents([p]), anything, share=6),
}


def furnish(folder):
    "The folder of small things that the targets are files of."
    import gzip

    import test_doctor
    data = small.dataset(folder/"data")
    small.finished(folder/"run", data)
    test_doctor.write(folder/"folder")
    (folder/"scores.npz").write_bytes(_scores(folder, data))
    docs = "".join(json.dumps(dict(text=t[:200]))+"\n" for t in small.texts()[1]*2).encode()
    (folder/"docs.jsonl").write_bytes(docs)
    (folder/"docs.jsonl.gz").write_bytes(gzip.compress(docs))
    (folder/"plan.yaml").write_text("runs: [pr610, {recipe: pr576, seed: 2}]\nscale: tiny\n"
        "seeds: [1, 2]\noverrides: {iterations: 5}\n")
    (folder/"published.bin").write_bytes(published_files(["pr598"], "none")(folder)[0])


def _scores(folder, data):
    "A file of scores, as `pgolf score --save` writes it."
    from pgolf.score.compare import describe, save_scores
    run = start(small.recipe(), data, folder/"run", "cpu", small.TARGETS, progress=False)
    scores = kept_scores(run)["sliding"]
    save_scores(folder/"saved.npz", describe(scores, data.val_tokens(), about=dict(a=[1])))
    return (folder/"saved.npz").read_bytes()
