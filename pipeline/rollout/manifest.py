"""Signs and verifies the manifest of what one site is to serve: ed25519 over canonical JSON.

The signed manifest is small and names everything else by sha256. A site accepts one that was signed with the
one key it knows, for this site, at a counter not below the last that it accepted, before it expires. Times
are UTC; no clock is read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Literal, TypeGuard, cast

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AfterValidator, AwareDatetime, Field, ValidationError

from pipeline.types import PalisadeError, Section, check_site_id

if TYPE_CHECKING:
    from datetime import datetime

SKEW = timedelta(minutes=5)  # the clocks of issuer and site may differ by this much
LARGEST = 2**16  # bytes of a signed manifest, at most
TIMES = {"issued_at", "expires_at"}  # differ when the same release is issued again
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9]+)?(/[a-z0-9][a-z0-9_-]*(\.[a-z0-9]+)?){0,3}")

MINUTE = "%Y-%m-%d %H:%M"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class BadKey(PalisadeError, ValueError):
    """A file without a key of the needed kind; the message is one line with the next step."""


class ManifestError(PalisadeError, ValueError):
    """A manifest that is refused; the message is one line with the next step."""

    exit_code = 4


def _inside(names: dict[str, Digest]) -> dict[str, Digest]:
    """Raises ValueError for a name that could lead outside the folder."""
    if odd := next((n for n in names if not NAME.fullmatch(n)), None):
        raise ValueError(f"{odd!r} is not the name of a file inside the folder")
    return names


class ReleaseManifest(Section):
    """Says what ``site`` is to serve.

    Counter 0: the site was never released to and serves the champion source model as it is.
    """

    format: Literal[1] = 1
    site: Annotated[str, AfterValidator(check_site_id)]
    counter: int = Field(ge=0)
    source_version: int
    source_digest: Digest
    trunk_digest: Digest
    state: str | None  # id of the site state; None: the source model as it is
    state_sha256: Digest | None  # of the file with the tensors of the state
    rollout: str | None
    plan_hash: str | None
    verdict: str | None
    issued_at: AwareDatetime
    expires_at: AwareDatetime
    files: Annotated[dict[str, Digest], AfterValidator(_inside)]  # path inside the folder → sha256


class Accepted(Section):
    """Remembers the last manifest that a site accepted; the site stores it."""

    site: str
    counter: int
    content: Digest  # sha256 of the manifest without its times
    issued_at: AwareDatetime


def new_key() -> tuple[bytes, bytes]:
    """Returns a new key pair: (private, public), both PEM."""
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return secret, public


def private_key(pem: bytes, where: str) -> Ed25519PrivateKey:
    """Returns the key in ``pem``, which was read from the file ``where``. Raises BadKey."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadKey(
            f"{where}: not an ed25519 private key in PEM; make one with `palisade audit keygen --out FILE`"
        )
    return key


def public_key(pem: bytes, where: str) -> Ed25519PublicKey:
    """Returns the key in ``pem``, which was read from the file ``where``. Raises BadKey."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise BadKey(
            f"{where}: not an ed25519 public key in PEM; `palisade audit keygen` wrote it as KEY.pub"
        )
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """Returns the sha256 of the raw public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def sign(manifest: ReleaseManifest, key: Ed25519PrivateKey) -> bytes:
    """Returns the envelope: JSON with the manifest, its signature and the fingerprint of the key."""
    content = manifest.model_dump(mode="json")
    signature = base64.b64encode(key.sign(_canonical(content))).decode()
    return _canonical({"manifest": content, "signature": signature, "key": fingerprint(key.public_key())})


def open_envelope(signed: bytes, key: Ed25519PublicKey) -> ReleaseManifest:
    """Returns the manifest in an envelope that ``key`` signed, of any site and age. Raises ManifestError."""
    try:
        envelope = cast("object", json.loads(signed)) if len(signed) <= LARGEST else None
    except (ValueError, RecursionError):
        envelope = None
    if not _is_envelope(envelope) or _canonical(envelope) != signed:
        raise ManifestError(
            "the manifest is torn or was changed: not the bytes that were signed; pull it again"
        )
    expected, signer = fingerprint(key), str(envelope["key"])
    if signer != expected:
        raise ManifestError(
            f"the manifest was signed with key {signer[:12]}, not with {expected[:12]}; "
            "give the public key of the deployment"
        )
    if not _signed(envelope["manifest"], str(envelope["signature"]), key):
        raise ManifestError("the manifest was changed: its signature does not hold; pull it again")
    try:
        return ReleaseManifest.model_validate(envelope["manifest"])
    except ValidationError as e:
        where = ".".join(str(p) for p in e.errors()[0]["loc"])
        raise ManifestError(
            f"the manifest is not one that this version reads ({where}); upgrade palisade"
        ) from None


def verify(
    signed: bytes, key: Ed25519PublicKey, *, site: str, last: Accepted | None, now: datetime
) -> ReleaseManifest:
    """Returns the manifest in ``signed`` if ``site`` may accept it at ``now`` after it accepted ``last``.

    Raises ManifestError for another key, site or clock, for an expired, changed or replayed manifest.
    """
    m = open_envelope(signed, key)
    if m.site != site or (last and last.site != site):
        raise ManifestError(f"the manifest is for site {m.site}, this is {site}; pull {site}'s own")
    latest = max(m.issued_at, last.issued_at) if last else m.issued_at
    if now + SKEW < latest:
        raise ManifestError(
            f"the manifest was issued at {latest:{MINUTE}} UTC, but this clock says {now:{MINUTE}}; "
            "set the clock, then verify again"
        )
    if now >= m.expires_at:
        raise ManifestError(
            f"the manifest expired at {m.expires_at:{MINUTE}} UTC, this clock says {now:{MINUTE}}; pull again"
        )
    if last:
        _refuse_replay(m, last)
    return m


def acceptance_of(manifest: ReleaseManifest) -> Accepted:
    """Returns what the site stores of a manifest that it accepted."""
    content = hashlib.sha256(_canonical(manifest.model_dump(mode="json", exclude=TIMES))).hexdigest()
    return Accepted(
        site=manifest.site, counter=manifest.counter, content=content, issued_at=manifest.issued_at
    )


def _refuse_replay(m: ReleaseManifest, last: Accepted) -> None:
    if m.counter < last.counter:
        raise ManifestError(
            f"the manifest is replayed: release {m.counter}, but {last.counter} was accepted before; "
            "pull again"
        )
    if m.counter > last.counter or acceptance_of(m).content == last.content:
        return
    if m.counter > 0:
        raise ManifestError(
            f"two different releases have the counter {m.counter}; "
            "see `palisade audit verify` where they are issued"
        )
    if m.issued_at < last.issued_at:  # the champion source model may have changed, but not back
        raise ManifestError(
            f"the manifest is replayed: issued at {m.issued_at:{MINUTE}} UTC, a later one was accepted; "
            "pull again"
        )


def _signed(content: object, signature: str, key: Ed25519PublicKey) -> bool:
    try:
        raw = base64.b64decode(signature, validate=True)
        key.verify(raw, _canonical(content))
    except (InvalidSignature, binascii.Error):
        return False
    return base64.b64encode(raw).decode() == signature  # the last letter has bits that decode to nothing


def _canonical(content: object) -> bytes:
    """Returns the bytes that are signed."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _is_envelope(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict) and set(cast("dict[object, object]", value)) == {
        "manifest",
        "signature",
        "key",
    }
