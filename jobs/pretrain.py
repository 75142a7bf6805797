"""``palisade pretrain``: fits a model on rendered faces, a start for source training (``source.start``).

It does for the small trunk what pre-training on photographs does for a large one: the trunk sees every PAI
species under a thousand sensor rigs before it sees the labelled domains. No real data is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.import_corpus import import_into
from jobs.terminal import Exit
from pipeline.config import method_config
from pipeline.data.corpus import read_corpus, read_manifest
from pipeline.source import fit as fits
from pipeline.source.contract import SourceMethod
from pipeline.source.fit import threads

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.config import Config

DOMAIN = "rendered"
STEPS = 800
EVERY = 20  # steps between two updates of the progress bar


def pretrain(config: Config, terminal: Terminal) -> int:
    """Makes the fit, or finds it stored, and shows its folder."""
    path = pretrained(config, terminal)
    terminal.result({"start": str(path)}, f"{path}\nstart from it: palisade train source.start={path}")
    return Exit.DONE


def pretrained(config: Config, terminal: Terminal) -> Path:
    """Returns the folder of the fit for this model, frame size and schedule; makes a missing fit."""
    folder = Path(config.data.corpora) / DOMAIN
    if not (folder / "manifest.json").exists():
        import_into(config, terminal, kind="rendered", root=None, name=DOMAIN)
    if (size := read_manifest(folder).size) != config.data.frame_px:
        px = config.data.frame_px
        raise ValueError(
            f"data.frame_px: {px}, but {folder} was imported at {size}; remove it to render anew"
        )
    shared = {k: v for k, v in config.source.model_dump().items() if k in SourceMethod.model_fields}
    method = method_config("source", "erm").model_validate(
        {**shared, "kind": "erm", "steps": STEPS, "seed": 0, "start": None}
    )
    model = config.model.model_copy(update={"tail": config.model.tail.model_copy(update={"head": "radial"})})
    inputs = [method.model_dump(), model.model_dump(), config.data.frame_px, read_manifest(folder).digest]
    out = config.folder(
        "starts", hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    )
    if out.exists():
        return out
    corpus = read_corpus(folder, ("train",))
    task = fits.Task(method, model, config.data.frame_px)
    with threads(config.cluster.cpus), terminal.progress("pretrain", "steps") as advance:
        state = fits.begin(task, domains=1)
        fits.advance(state, [corpus], until=STEPS, every=EVERY, report=lambda s, _: advance(s.step, STEPS))
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    fits.save(state, building)
    building.rename(out)
    return out
