"""The smallest things that are whole: a dataset, a model, a finished run, a submission folder."""
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pgolf.game.data import austen_documents, build_dataset, open_dataset  # noqa: E402
from pgolf.systems import pipeline  # noqa: E402
from pgolf.systems.recipes import SCALES, at_scale, get_recipe  # noqa: E402

# three blocks of width 32, rows of 32 tokens, six steps with a checkpoint after each
SMALL = dict(vocab_size=320, num_layers=3, model_dim=32, num_heads=2, num_kv_heads=1,
    bigram_vocab_size=16, bigram_dim=16, ve_dim=16, train_seq_len=32, eval_seq_len=32,
    eval_stride=16, iterations=6, train_batch_tokens=64, num_spans=2, warmup_steps=0,
    checkpoint_every=1, samples=2, ttt_chunk_tokens=64, xsa_last_n=1, codec="zstd", zstd_level=1)
TARGETS = 128
# the same for commands that take no settings, over a vocabulary of 1,024
SCALES["least"] = replace(SCALES["tiny"], num_layers=3, model_dim=32, bigram_vocab_size=16,
    seq_len=32, batch_tokens=64, iterations=6, stride=16, samples=2, eval_tokens=TARGETS)


def roomy(least=2**29):
    "A folder in memory with so much room, or nothing: many small files are quicker there."
    place = Path("/dev/shm")
    fit = place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free > least
    return place if fit else None


@contextmanager
def folder():
    "A passing folder for a sitting, which others may look into."
    with tempfile.TemporaryDirectory(prefix="pgolf-campaign-", dir=roomy()) as path:
        Path(path).chmod(0o755)
        yield Path(path)


def recipe(name="pr610", **more):
    "A recipe at that size."
    r = at_scale(get_recipe(name), "tiny")
    return r.but(**own(r) | more)


def own(r):
    "The small settings that a recipe has; a part that it leaves out stays out."
    known = {k.rpartition(".")[2]: v for k, v in r.settings().items()}
    parts = ("ve_dim", "bigram_dim", "bigram_vocab_size")
    wanted = SMALL | dict(ttt_lora_chunk_tokens=16)
    return {k: v for k, v in wanted.items() if k in known and (known[k] or k not in parts)}


def as_options(settings):
    "Settings as words of the command."
    return [w for k, v in settings.items() for w in ("-o", f"{k}={v}")]


def texts(chapters=4, characters=3000):
    "A little training text and a little held-out text."
    train, val = austen_documents("train"), austen_documents("val")
    return [t[:characters] for t in train[:chapters]], [t[:900] for t in val[:2]]


def dataset(path, vocab_size=320, **more):
    "The dataset in a folder, made if it is not there."
    if (path/"manifest.json").exists(): return open_dataset(path)
    own = texts() if vocab_size == 320 else texts(12, 6000)
    return build_dataset(*own, path, vocab_size=vocab_size, **more)


def finished(path, data, name="pr610", **more):
    "A finished run in a folder, made if it is not there."
    job = pipeline.start(recipe(name, **more), data, path, "cpu", TARGETS, progress=False)
    pipeline.run(job)
    return path
