"""``palisade site pull`` and ``verify``: one edge box's release in a folder, under a signed manifest.

The folder has ``models/DIGEST/`` (the source model's checkpoint: trunk, its graph, and tail),
``states/SHA256.safetensors`` (the site's adapted part of the tail), ``release.json`` (the signed manifest,
written last: it makes the release) and ``accepted.json`` (the release that the box accepted last). A box
serves ``{**tail, **state}``. Needs neither MLflow nor Ray.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from jobs.terminal import Exit
from pipeline.control.deployment import now, open_ledger, source_model
from pipeline.data import blobs
from pipeline.models import tail
from pipeline.models.manifest import MANIFEST, BadCheckpoint, read_manifest
from pipeline.rollout.manifest import (
    Accepted,
    ManifestError,
    ReleaseManifest,
    acceptance_of,
    open_envelope,
    sign,
    verify,
)
from pipeline.rollout.manifest import private_key as parse_private
from pipeline.rollout.manifest import public_key as parse_public
from pipeline.storage import place, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, ServingRow, SourceRow, StateRow

    # name in the folder → its SHA-256, and a function that reads its bytes
    Content = Mapping[str, tuple[str, Callable[[], bytes]]]

RELEASE, ACCEPTED = "release.json", "accepted.json"


def pull(config: Config, terminal: Terminal, *, site: str, to: Path, public_key: Path | None) -> int:
    """Writes the release of ``site`` into ``to``; a file with the right digest is not written again."""
    key = signing_key(config)
    public = _public(public_key) if public_key else key.public_key()
    ledger = open_ledger(config, create=False)
    ledger.streams.site(site)
    served = ledger.releases.serving([site]).get(site)
    source = source_model(ledger, served.source_version if served else None)
    state = ledger.verdicts.state(served.state) if served else None
    content, delta = _content(config, source, state)
    digests = {name: digest for name, (digest, _) in content.items()}
    manifest = _manifest(config, ledger, site, served, source, state, delta, digests)
    signed = sign(manifest, key)
    verify(signed, public, site=site, last=_newest(to, public), now=now())
    written = [name for name, (digest, read) in content.items() if _put(to / name, digest, read)]
    write_atomic(to.resolve() / RELEASE, signed)
    name = f"state {manifest.state}" if manifest.state else f"source v{manifest.source_version}"
    pub = public_key or f"{config.ledger.signing_key}.pub"
    terminal.result(
        {
            "site": site,
            "to": str(to),
            "counter": manifest.counter,
            "state": manifest.state,
            "source_version": manifest.source_version,
            "expires_at": manifest.expires_at,
            "written": [*written, RELEASE],
        },
        f"{site}: release {manifest.counter} ({name}) in {to}, "
        f"good until {manifest.expires_at:%Y-%m-%d %H:%M} UTC; "
        f"{len(content) - len(written)} of {len(content)} files were there",
        f"on the box: `palisade site verify {to} --site {site} --public-key {pub}`",
    )
    return Exit.DONE


def verify_folder(terminal: Terminal, folder: Path, *, public_key: Path, site: str | None) -> int:
    """Checks signature, site, counter, expiry and every file of ``folder``, then accepts the release.

    A box runs it before it serves the folder. Raises ManifestError if anything does not hold.
    """
    public, last = _public(public_key), _accepted(folder)
    site = site or (last.site if last else None)
    if site is None:
        raise ValueError(f"{folder}: nothing was accepted there yet; say which site this is with --site SITE")
    m = verify(_read(folder / RELEASE), public, site=site, last=last, now=now())
    for name, digest in m.files.items():
        if not _whole(folder / name, digest):
            raise ManifestError(
                f"{folder / name}: missing or not what was signed; run `palisade site pull {site}` again"
            )
    write_atomic(folder.resolve() / ACCEPTED, acceptance_of(m).model_dump_json().encode())
    terminal.result(
        {"site": site, "counter": m.counter, "expires_at": m.expires_at, **m.model_dump(mode="json")},
        f"{site}: release {m.counter} accepted, {len(m.files)} files verified, "
        f"good until {m.expires_at:%Y-%m-%d %H:%M} UTC",
    )
    return Exit.DONE


def signing_key(config: Config) -> Ed25519PrivateKey:
    """Returns the deployment's key; raises ValueError, with the way to get one, if there is none."""
    if config.ledger.signing_key is None:
        raise ValueError(
            "ledger.signing_key: not set, so nothing can be signed; "
            "run `palisade audit keygen --out release.pem` and set ledger.signing_key to that file"
        )
    path = Path(config.ledger.signing_key)
    if not path.exists():
        raise ValueError(
            f"ledger.signing_key: {path}: no such file; restore it, or make one with "
            f"`palisade audit keygen --out {path}`"
        )
    return parse_private(_read(path), str(path))


def _content(config: Config, source: SourceRow, state: StateRow | None) -> tuple[Content, str | None]:
    """Returns the verified files of a release, and the digest of the state's file if there is one."""
    path = place(source.path)
    manifest = read_manifest(path)
    if (manifest.digest, manifest.trunk_digest) != (source.digest, source.trunk):
        raise BadCheckpoint(
            f"{path}: is not source v{source.version} of the ledger; restore it from a backup"
        )
    card, folder = (path / MANIFEST).read_bytes(), f"models/{source.digest}"
    content: dict[str, tuple[str, Callable[[], bytes]]] = {
        f"{folder}/{MANIFEST}": (_sha256(card), lambda: card),
        **{
            f"{folder}/{name}": (digest, partial(blobs.verified, path / name, digest))
            for name, digest in manifest.files.items()
        },
    }
    if state is None:
        return content, None
    data = delta(config, state)
    content[f"states/{_sha256(data)}.safetensors"] = (_sha256(data), lambda: data)
    return content, _sha256(data)


def delta(config: Config, state: StateRow) -> bytes:
    """Returns the safetensors of a site's serving part of the tail, from its slot of the blob."""
    from safetensors.torch import save

    tensors = blobs.get(config.place("states"), state.blob)
    adapted = {n: tensors[n][state.slot].clone().contiguous() for n in tail.MOVABLE if n in tensors}
    return save(adapted)  # without metadata: its order is not fixed, so the digest would not be


def _manifest(
    config: Config,
    ledger: Ledger,
    site: str,
    served: ServingRow | None,
    source: SourceRow,
    state: StateRow | None,
    digest: str | None,
    files: dict[str, str],
) -> ReleaseManifest:
    at = now().replace(microsecond=0)
    verdict = _verdict(ledger, served) if served else None
    return ReleaseManifest(
        site=site,
        counter=served.counter if served else 0,
        source_version=source.version,
        source_digest=source.digest,
        trunk_digest=source.trunk,
        state=state.id if state else None,
        state_sha256=digest,
        rollout=served.rollout if served else None,
        plan_hash=ledger.plans.plan_hash(served.rollout) if served else None,
        verdict=verdict,
        issued_at=at,
        expires_at=at + timedelta(hours=config.ledger.manifest_hours),
        files=files,
    )


def _verdict(ledger: Ledger, served: ServingRow) -> str | None:
    """Returns the verdict that allows the serving state: the plan's, or that of a state rolled back to."""
    target = (
        ledger.plans.targets(served.rollout, [served.site]).get(served.site)
        if served.kind == "promote"
        else None
    )
    if target is not None:
        return target.verdict_id
    return next((v.id for v in ledger.verdicts.find(ids=[served.state])), None) if served.state else None


def _newest(folder: Path, public: Ed25519PublicKey) -> Accepted | None:
    """Returns the highest release of the folder, now or earlier; a manifest that is not signed is ignored."""
    last = _accepted(folder)
    try:
        stored = acceptance_of(open_envelope((folder / RELEASE).read_bytes(), public))
    except (FileNotFoundError, ManifestError):
        return last
    return stored if last is None or stored.counter > last.counter else last


def _accepted(folder: Path) -> Accepted | None:
    path = folder / ACCEPTED
    try:
        return Accepted.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise ManifestError(
            f"{path}: torn or changed, so a replay could not be seen; "
            "restore it, or delete it to accept any release once"
        ) from None


def _put(path: Path, digest: str, read: Callable[[], bytes]) -> bool:
    """Writes a file unless it already has this digest; returns True if it wrote."""
    if _whole(path, digest):
        return False
    write_atomic(path.resolve(), read())
    return True


def _whole(path: Path, digest: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError:
        return False


def _public(path: Path) -> Ed25519PublicKey:
    return parse_public(_read(path), str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
