"""What an edge box pulls and refuses, by the commands, with MLflow out of reach and no Ray."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.__main__ import main
from jobs.site import pull as job
from pipeline.control import loaders
from pipeline.control.deployment import now
from pipeline.data import blobs
from pipeline.models import checkpoint, tail
from pipeline.rollout import Candidate, Pointer, Promote, RolloutConfig, SiteFacts, Status, plan, start
from pipeline.rollout.manifest import ReleaseManifest, private_key, sign
from tests.support.artifacts import flip
from tests.support.crowds import SITES, copy_crowd
from tests.support.releases import OTHER, SITE, serve


@pytest.fixture
def box(tmp_path) -> Path:
    return tmp_path / "box"


def pull(crowd, box, site=SITE, *more):
    return crowd.d.run("site", "pull", site, "--to", str(box), *more)


def verify(crowd, box, *more):
    return main(["site", "verify", str(box), "--public-key", str(crowd.d.root / "release.pem.pub"), *more])


def again(crowd, box, **changes):
    """Signs the manifest on the box again with other content."""
    content = json.loads((box / "release.json").read_bytes())["manifest"] | changes
    key = private_key((crowd.d.root / "release.pem").read_bytes(), "")
    (box / "release.json").write_bytes(sign(ReleaseManifest.model_validate(content), key))


def test_a_box_gets_what_its_site_serves(crowd, box):
    assert pull(crowd, box) == 0 and verify(crowd, box, "--site", SITE) == 0
    source, state = (
        crowd.ledger.sources.champion(),
        crowd.ledger.verdicts.state(crowd.ledger.streams.site(SITE).learner),
    )
    (folder,) = (box / "models").iterdir()
    model = checkpoint.load(folder)
    assert model.manifest.digest == source.digest == folder.name
    (file,) = (box / "states").iterdir()
    moved = load_file(file)
    assert set(moved) == set(tail.MOVABLE), "what only learning needs stays"
    stored = blobs.get(crowd.d.config.place("states"), state.blob)
    assert all(torch.equal(t, stored[n][state.slot]) for n, t in moved.items())
    expected = tail.with_site_state(model.tail, loaders.load_state(crowd.d.config, model, state))
    assert all(torch.equal(t, expected[n]) for n, t in {**model.tail, **moved}.items())
    m = json.loads((box / "release.json").read_bytes())["manifest"]
    assert (m["site"], m["counter"], m["state"], m["verdict"]) == (SITE, 1, state.id, state.id)
    assert {p.name for p in box.iterdir()} == {"models", "states", "release.json", "accepted.json"}


def test_the_model_is_written_once(crowd, box, monkeypatch):
    assert pull(crowd, box) == 0
    written = []
    real = job.write_atomic
    monkeypatch.setattr(job, "write_atomic", lambda path, data: written.append(path.name) or real(path, data))
    assert pull(crowd, box) == 0
    assert written == ["release.json"]
    (box / "models" / crowd.ledger.sources.champion().digest / "model.safetensors").write_bytes(b"torn")
    assert pull(crowd, box) == 0
    assert written == ["release.json", "model.safetensors", "release.json"]


def test_a_site_that_was_never_released_to_gets_the_champion_as_it_is(crowd, box):
    assert pull(crowd, box, SITES[5]) == 0 and verify(crowd, box, "--site", SITES[5]) == 0
    m = json.loads((box / "release.json").read_bytes())["manifest"]
    assert (m["counter"], m["state"], m["verdict"]) == (0, None, None)
    assert not (box / "states").exists()


def test_a_rollback_is_a_higher_counter_and_an_older_release_is_refused(crowd, box, tmp_path, capsys):
    assert pull(crowd, box) == 0 and verify(crowd, box, "--site", SITE) == 0
    shutil.copy(box / "release.json", tmp_path / "old.json")
    serve(crowd, "rollback", {SITE: None})
    assert pull(crowd, box) == 0 and verify(crowd, box) == 0
    assert json.loads((box / "accepted.json").read_bytes())["counter"] == 2
    shutil.copy(tmp_path / "old.json", box / "release.json")
    capsys.readouterr()
    assert verify(crowd, box) == 4
    assert "replayed: release 1, but 2 was accepted before" in capsys.readouterr().err
    assert pull(crowd, box) == 0 and verify(crowd, box) == 0


def test_a_ledger_that_lost_releases_cannot_take_a_box_back(crowd, box, tmp_path, capsys):
    """A ledger restored from a backup issues release counters that boxes have already seen."""
    before = copy_crowd(crowd, tmp_path / "backup")
    serve(crowd, "rollback", {SITE: None})
    assert pull(crowd, box) == 0  # not accepted yet, and yet never undone
    assert pull(before, box) == 4
    assert "replayed: release 1, but 2 was accepted before" in capsys.readouterr().err
    serve(before, "rollback", {SITE: crowd.ledger.streams.site(SITE).learner})
    assert pull(before, box) == 4
    assert "two different releases have the counter 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda crowd, box: again(crowd, box, site=OTHER), f"for site {OTHER}, this is {SITE}"),
        (
            lambda crowd, box: again(crowd, box, expires_at=(now() - timedelta(hours=1)).isoformat()),
            "the manifest expired",
        ),
        (
            lambda crowd, box: again(crowd, box, issued_at=(now() + timedelta(hours=1)).isoformat()),
            "set the clock",
        ),
        (lambda crowd, box: again(crowd, box, state="other"), "two different releases have the counter 1"),
        (
            lambda crowd, box: (box / "release.json").write_bytes(
                (box / "release.json").read_bytes().replace(b'"counter":1', b'"counter":9')
            ),
            "signature does not hold",
        ),
        (lambda crowd, box: (box / "accepted.json").write_text("{"), "a replay could not be seen"),
        (lambda crowd, box: next((box / "states").iterdir()).write_bytes(b"x"), "not what was signed"),
        (lambda crowd, box: shutil.rmtree(box / "models"), "missing or not what was signed"),
    ],
)
def test_what_a_box_refuses(crowd, box, damage, said, capsys):
    assert pull(crowd, box) == 0 and verify(crowd, box, "--site", SITE) == 0
    before = (box / "accepted.json").read_bytes()
    damage(crowd, box)
    capsys.readouterr()
    assert verify(crowd, box) == 4
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert (box / "accepted.json").read_bytes() in (before, b"{")


def test_another_deployments_key_is_refused(crowd, box, tmp_path, capsys):
    assert main(["audit", "keygen", "--out", str(tmp_path / "other.pem")]) == 0
    assert pull(crowd, box, SITE, "--public-key", str(tmp_path / "other.pem.pub")) == 4
    assert "was signed with key" in capsys.readouterr().err
    assert not box.exists(), "nothing is written that the box would refuse"


def test_a_box_that_has_accepted_nothing_must_be_told_who_it_is(crowd, box, capsys):
    assert pull(crowd, box) == 0
    assert verify(crowd, box) == 2
    assert "--site SITE" in capsys.readouterr().err
    assert verify(crowd, box, "--site", OTHER) == 4


@pytest.mark.parametrize("kind", ["states", "models"])
def test_a_damaged_artifact_is_not_pulled(crowd, box, kind, capsys):
    files = list(crowd.d.config.place(kind).rglob("*.safetensors"))
    for path in files:
        flip(path, at=1)
    if kind == "models":
        with crowd.ledger.store.engine.begin() as c:
            c.exec_driver_sql("update sources set path = ?", (str(files[0].parent),))
    assert pull(crowd, box) != 0
    assert "changed or torn" in capsys.readouterr().err
    assert not (box / "release.json").exists()


def test_without_a_key_the_next_step_is_told(crowd, box, capsys):
    assert pull(crowd, box, SITE, "ledger.signing_key=null") == 2
    assert "palisade audit keygen" in capsys.readouterr().err
    assert pull(crowd, box, SITE, f"ledger.signing_key={box}/gone.pem") == 2
    assert "gone.pem: no such file; restore it" in capsys.readouterr().err
    assert pull(crowd, box, "nowhere") == 2


def test_neither_mlflow_nor_ray_is_asked(crowd, box):
    code = (
        "import sys; from jobs.__main__ import main\n"
        f"c = main(['site', 'pull', {SITE!r}, '--to', {str(box)!r}, '--config', {crowd.d.yaml!r}])\n"
        "print(c, [m for m in ('ray', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_after_a_rollback_the_box_goes_back_while_everything_else_is_out_of_reach(crowd, box, capsys):
    ledger = crowd.ledger
    ids = {s: ledger.streams.site(s).learner for s in SITES[2:6]}
    facts = {
        s: SiteFacts(serving=None, candidate=Candidate(Pointer(i, 1), i, "pass")) for s, i in ids.items()
    }
    draft = plan("release-00002", facts, 1, RolloutConfig(waves=(1.0,)))
    r = start(draft.plan, now()).model_copy(update={"status": Status.BAKING, "wave": 0})
    revision = ledger.plans.save(
        "release-00002",
        plan_hash=r.plan_hash,
        status=r.status,
        body=r.model_dump_json(),
        revision=0,
        event={"event": "planned"},
        now=now(),
        draft=draft,
    )
    assert (
        ledger.releases.carry_out(
            "release-00002", [Promote(wave=0)], without=(), reason="", revision=revision, now=now()
        )
        == 4
    )
    site = SITES[2]
    assert pull(crowd, box, site) == 0 and verify(crowd, box, "--site", site) == 0
    m = json.loads((box / "release.json").read_bytes())["manifest"]
    assert (m["counter"], m["state"], m["verdict"], m["plan_hash"]) == (1, ids[site], ids[site], r.plan_hash)
    assert crowd.d.run("rollout", "rollback", "--reason", "bad") == 0
    assert pull(crowd, box, site) == 0 and verify(crowd, box) == 0
    m = json.loads((box / "release.json").read_bytes())["manifest"]
    assert (m["counter"], m["state"], m["rollout"]) == (2, None, "release-00002")
    assert crowd.d.run("audit", "verify") == 0
