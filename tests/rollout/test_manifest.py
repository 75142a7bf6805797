"""Signed release manifests: what a site accepts, and that it accepts nothing else."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rollout.manifest import (
    Accepted,
    BadKey,
    ManifestError,
    ReleaseManifest,
    acceptance_of,
    new_key,
    open_envelope,
    private_key,
    public_key,
    sign,
    verify,
)

T0 = datetime(2026, 3, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECRET, PUBLIC = new_key()
KEY, OPEN = private_key(SECRET, "k"), public_key(PUBLIC, "k.pub")


def release(counter=7, **changes) -> ReleaseManifest:
    values = {
        "site": "gate-a",
        "counter": counter,
        "source_version": 1,
        "source_digest": "a" * 64,
        "trunk_digest": "b" * 64,
        "state": "s1",
        "state_sha256": "c" * 64,
        "rollout": "release-00001",
        "plan_hash": "d" * 64,
        "verdict": "s1",
        "issued_at": T0,
        "expires_at": T0 + 168 * HOUR,
        "files": {"states/x.safetensors": "c" * 64},
    }
    return ReleaseManifest.model_validate(values | changes)


SIGNED = sign(release(), KEY)


def check(signed=SIGNED, *, key=OPEN, site="gate-a", last: Accepted | None = None, now=T0 + HOUR):
    return verify(signed, key, site=site, last=last, now=now)


def test_what_was_signed_is_what_is_read():
    assert check() == release()
    assert check(last=acceptance_of(release())) == release(), "the same one may be verified again"
    assert check(sign(release(8), KEY), last=acceptance_of(release())).counter == 8


@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(at, flip):
    changed = bytearray(SIGNED)
    changed[at] ^= flip
    with pytest.raises(ManifestError):
        open_envelope(bytes(changed), OPEN)


def test_every_byte_is_covered():
    for at in range(len(SIGNED)):
        for flip in (1, 2, 4, 32):
            changed = bytearray(SIGNED)
            changed[at] ^= flip
            with pytest.raises(ManifestError):
                open_envelope(bytes(changed), OPEN)


@given(st.integers(0, len(SIGNED)), st.binary(min_size=1, max_size=4))
def test_no_byte_is_added_or_cut(at, more):
    for changed in (SIGNED[:at] + more + SIGNED[at:], SIGNED[:at] if at < len(SIGNED) else b""):
        with pytest.raises(ManifestError):
            open_envelope(changed, OPEN)


@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode) | st.just(b"[" * 100_000))
def test_garbage_is_refused_in_one_line(junk):
    with pytest.raises(ManifestError) as e:
        open_envelope(junk, OPEN)
    assert "\n" not in str(e.value)


def test_bits_that_base64_does_not_use_are_covered():
    envelope = json.loads(SIGNED)
    text = envelope["signature"]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = text[:-3] + letters[letters.index(text[-3]) ^ 1] + "=="
    assert base64.b64decode(other) == base64.b64decode(text)
    with pytest.raises(ManifestError, match="signature"):
        open_envelope(SIGNED.replace(text.encode(), other.encode()), OPEN)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"key": public_key(new_key()[1], "")}, "was signed with key .*, not with"),
        ({"site": "gate-b"}, "for site gate-a, this is gate-b"),
        ({"last": acceptance_of(release(1, site="gate-b"))}, "for site gate-a"),
        ({"now": T0 + 168 * HOUR}, "expired at 2026-03-08 00:00 UTC"),
        ({"now": T0 - HOUR}, "issued at 2026-03-01 00:00 UTC, but this clock says 2026-02-28 23:00"),
        ({"last": acceptance_of(release(7, issued_at=T0 + 2 * HOUR))}, "but this clock says"),
        ({"last": acceptance_of(release(8))}, "replayed: release 7, but 8 was accepted before"),
        ({"last": acceptance_of(release(7, state="other"))}, "two different releases have the counter 7"),
    ],
)
def test_what_is_refused_says_why(changes, said):
    with pytest.raises(ManifestError, match=said) as e:
        check(**changes)
    assert "\n" not in str(e.value)


def test_a_forger_cannot_pass_off_another_key_as_the_deployments():
    other = private_key(new_key()[0], "")
    forged = json.loads(sign(release(99), other))
    forged["key"] = json.loads(SIGNED)["key"]
    with pytest.raises(ManifestError, match="signature does not hold"):
        open_envelope(json.dumps(forged, sort_keys=True, separators=(",", ":")).encode(), OPEN)


def test_the_same_release_may_be_issued_anew():
    later = release(issued_at=T0 + HOUR, expires_at=T0 + 500 * HOUR)
    assert check(sign(later, KEY), last=acceptance_of(release())) == later
    assert check(last=acceptance_of(release())) == release()


def test_what_was_never_released_to_follows_the_champion_but_not_back():
    first, second = release(0), release(0, source_version=2, issued_at=T0 + HOUR)
    assert check(sign(second, KEY), last=acceptance_of(first)) == second
    with pytest.raises(ManifestError, match="replayed: issued at"):
        check(sign(first, KEY), last=acceptance_of(second))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(-400, 400), st.integers(-400, 400))
def test_it_is_accepted_exactly_when_newer_or_the_same_in_time(old, new, issued, now):
    last = acceptance_of(release(old))
    m = release(new, state=f"s{new}", issued_at=T0 + issued * HOUR, expires_at=T0 + (issued + 168) * HOUR)
    last = last.model_copy(update={"content": acceptance_of(release(old, state=f"s{old}")).content})
    fresh = max(issued, 0) <= now < issued + 168
    newer = new >= old
    try:
        found = verify(sign(m, KEY), OPEN, site="gate-a", last=last, now=T0 + now * HOUR)
    except ManifestError:
        assert not (fresh and newer)
    else:
        assert found == m and fresh and newer


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../b", "states/", "a//b", ".hidden", "A", "x\\y", "a b"]
)
def test_a_file_outside_the_folder_cannot_be_named(name):
    with pytest.raises(ValueError, match="inside the folder"):
        release(files={name: "a" * 64})


@pytest.mark.parametrize("pem", [b"", b"junk", PUBLIC, SECRET[:60]], ids=["empty", "junk", "public", "torn"])
def test_what_is_no_private_key_is_named(pem):
    with pytest.raises(BadKey, match="site.key: not an ed25519 private key"):
        private_key(pem, "site.key")


def test_what_is_no_public_key_is_named():
    with pytest.raises(BadKey, match="site.pub: not an ed25519 public key"):
        public_key(SECRET, "site.pub")
