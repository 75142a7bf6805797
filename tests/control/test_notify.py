"""Notices reach every sink once; a sink that fails is a remark and is tried again."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs.__main__ import main
from pipeline.config import load
from pipeline.control.notify import notify
from pipeline.ledger import Ledger
from pipeline.ledger.notices import CLAIM
from tests.support.ledgers import T0

SECOND = timedelta(seconds=1)


class Hook(ThreadingHTTPServer):
    """A webhook on this machine."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict] = []
        self.status = 200
        self.stalled = threading.Event()
        self.stalled.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/secret-token"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.stalled.wait(10)
        self.send_response(self.server.status)
        self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hook():
    server = Hook()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.stalled.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def tell(tmp_path, hook):
    """notify() with both sinks; ``after`` seconds."""
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    base = [
        f"notify.webhook={hook.url}",
        f"notify.file={tmp_path}/deep/notices.jsonl",
        f"ledger.url=sqlite:///{tmp_path}/ledger.db",
    ]

    def call(text="wave 1 holds", *, key="release-1", severity="warning", after=0.0, over=(), context=None):
        config = load(None, [*base, *over])
        return notify(
            config,
            ledger,
            key=key,
            severity=severity,
            text=text,
            now=T0 + after * SECOND,
            context=context or {},
        )

    call.base, call.ledger, call.file = base, ledger, tmp_path / "deep" / "notices.jsonl"
    yield call
    ledger.close()


def lines(tell):
    return [json.loads(line) for line in tell.file.read_text().splitlines()] if tell.file.exists() else []


def test_every_sink_gets_it_once(tell, hook):
    for after in (0, 1, 2):
        assert tell(after=after, context={"site": "gate-a", "limit": 0.07}) == []
    expected = {
        "key": "release-1",
        "severity": "warning",
        "text": "wave 1 holds",
        "at": T0.isoformat(),
        "context": {"site": "gate-a", "limit": 0.07},
    }
    assert hook.bodies == lines(tell) == [expected]
    assert tell("wave 2 holds", after=3) == []
    assert [b["text"] for b in hook.bodies] == ["wave 1 holds", "wave 2 holds"]
    assert tell("wave 2 holds", after=3 + 3600) == []
    assert len(hook.bodies) == 3


def test_what_is_less_severe_is_not_said(tell, hook):
    tell(severity="info", over=["notify.min_severity=warning"])
    tell(severity="warning", over=["notify.min_severity=critical"])
    assert hook.bodies == [] and tell.ledger.notices.latest() == []
    tell(severity="critical", over=["notify.min_severity=critical"])
    assert len(hook.bodies) == 1


def test_a_webhook_that_refuses_is_a_remark_and_is_tried_again_by_the_next_call(tell, hook):
    hook.status = 503
    remarks = tell(context={"site": "gate-a"})
    assert remarks == ["notify.webhook: it answered 503; it is tried again with the next notice"]
    assert tell.ledger.notices.latest()[0].sent_at is None
    hook.status = 200
    assert tell("all is well", key="release-2", severity="info", after=CLAIM.total_seconds()) == []
    assert [(b["key"], b["text"]) for b in hook.bodies] == [
        ("release-1", "wave 1 holds"),
        ("release-2", "all is well"),
        ("release-1", "wave 1 holds"),
    ]
    assert all(n.sent_at for n in tell.ledger.notices.latest())


def test_a_redirect_is_not_followed(tell, hook):
    hook.status = 302
    assert "answered 302" in tell()[0]


def test_a_webhook_that_does_not_answer_costs_its_timeout_and_no_secret_is_told(tell, hook):
    hook.stalled.clear()
    (remark,) = tell(over=["notify.timeout_seconds=0.2"])
    assert "Timeout" in remark and "secret" not in remark and "127.0.0.1" not in remark
    (remark,) = tell("b", over=["notify.webhook=http://127.0.0.1:9/secret-token"])
    assert "ConnectionError" in remark and "secret" not in remark
    assert [line["text"] for line in lines(tell)] == ["wave 1 holds", "b"], "the other sink took it"


def test_the_url_may_stand_in_the_environment(tell, hook, monkeypatch):
    over = ["notify.webhook=$PALISADE_TEST_HOOK"]
    assert tell(over=over) == [
        "notify.webhook: the environment has no PALISADE_TEST_HOOK; it is tried again with the next notice"
    ]
    monkeypatch.setenv("PALISADE_TEST_HOOK", hook.url)
    assert tell("b", over=over) == [] and len(hook.bodies) == 1


def test_a_file_that_cannot_be_written_is_a_remark(tell, hook, tmp_path):
    (tmp_path / "taken").write_text("")
    (remark,) = tell(over=[f"notify.file={tmp_path}/taken/x"])
    assert remark.startswith("notify.file") and len(hook.bodies) == 1


def test_without_a_sink_it_is_on_record_and_waits_for_nobody(tell):
    over = ["notify.webhook=null", "notify.file=null"]
    assert tell(over=over) == []
    assert tell.ledger.notices.latest()[0].sent_at == T0


def test_lines_of_two_drivers_do_not_mix(tell):
    def drive(k):
        for i in range(20):
            tell("x" * 5000, key=f"{k}-{i}", over=["notify.webhook=null"])

    threads = [threading.Thread(target=drive, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({line["key"] for line in lines(tell)}) == len(lines(tell)) == 80


def test_the_command_lists_and_sends(tell, hook, capsys):
    assert main(["notify", *tell.base, "--test"]) == 0
    assert "palisade notify --test" in hook.bodies[0]["text"]
    capsys.readouterr()
    assert main(["notify", "--json", *tell.base]) == 0
    (row,) = json.loads(capsys.readouterr().out)["notices"]
    assert (row["key"], row["severity"], row["count"]) == ("test", "critical", 1) and row["sent_at"]
    hook.status = 500
    assert main(["notify", *tell.base, "--test"]) == 5
    assert main(["notify", tell.base[2], "--test"]) == 2
