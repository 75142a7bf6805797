"""Shows the result of ``palisade guard simulate``: both sides in a table, each differing site as a line."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from jobs.terminal import percent, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from jobs.terminal import Terminal

SHOWN = 40  # sites
CYCLES = 32  # of a site, the newest
MARKS = {"pass": "·", "hold": "h", "fail": "F", None: "?", True: "!", False: "·"}
LEGEND = (
    "one mark a cycle: · passed, h held, F failed; "
    "truth: ! over the ceiling by sealed labels, · under it, ? not known"
)


def show(terminal: Terminal, result: Mapping[str, object]) -> None:
    """Shows a line per side, a line per site that differs, and the summary."""
    sites = cast("Sequence[Mapping[str, object]]", result["sites"])
    if not result["verdicts"]:
        terminal.result(result, "no verdict is on record; run `palisade cycle` first")
        return
    shown: list[Table | str] = [_sides(result)]
    if sites:
        rows = [
            [
                s["site"],
                *(_line(s[k]) for k in ("recorded", "policy", "over")),
                _lag(s, "recorded"),
                _lag(s, "policy"),
                s["reason"],
            ]
            for s in sites[:SHOWN]
        ]
        columns = [
            "site",
            "recorded",
            "policy",
            "truth",
            "late now",
            "late then",
            "why the policy keeps it back",
        ]
        shown += [table("sites that differ, or were over the ceiling", columns, rows), LEGEND]
    if len(sites) > SHOWN:
        shown.append(f"and {len(sites) - SHOWN} more; --out writes all")
    terminal.result(result, *shown, _summary(result))


def _sides(result: Mapping[str, object]) -> Table:
    changed = cast("Mapping[str, Sequence[object]]", result["changed"])
    title = ", ".join(f"{k} {a} → {b}" for k, (a, b) in changed.items()) or "the policy is the present one"
    rows: list[list[object]] = []
    for side in ("recorded", "policy"):
        t = cast("Mapping[str, object]", result[side])
        late = cast("Mapping[str, float | None]", t["median_lag"])
        when = (
            "-"
            if late["cycles"] is None
            else f"{late['cycles']:g} / {late['samples']:.0f} / {late['hours']:.1f}"
        )
        rows.append(
            [
                side,
                t["pass"],
                t["hold"],
                t["fail"],
                _share(t["passed_over"]),
                _share(t["false_stops"]),
                _share(t["false_holds"]),
                when,
                f"{t['sites_never_stopped']} of {t['sites_over']}",
            ]
        )
    columns = [
        "",
        "passed",
        "held",
        "failed",
        "passed though over [95 %]",
        "failed though fine [95 %]",
        "held though fine [95 %]",
        "late: cycles / samples / hours",
        "sites never stopped",
    ]
    return table(title, columns, rows)


def _share(value: object) -> str:
    s = cast("Mapping[str, float]", value)
    interval = f" [{percent(s['low'])}, {percent(s['high'])}] %" if s["n"] else ""
    return f"{s['k']} of {s['n']}{interval}"


def _line(values: object) -> str:
    marks = [MARKS[v] for v in cast("Sequence[str | bool | None]", values)]
    return ("…" if len(marks) > CYCLES else "") + "".join(marks[-CYCLES:])


def _lag(site: Mapping[str, object], side: str) -> str:
    lag = cast("Mapping[str, float | None] | None", site[f"{side}_lag"])
    if lag is None:
        return "-"
    return (
        "never"
        if lag["cycles"] is None
        else f"{lag['cycles']} cycle{'s' * (lag['cycles'] != 1)}, {lag['hours']:.1f} h"
    )


def _summary(result: Mapping[str, object]) -> str:
    sites = cast("Sequence[Mapping[str, object]]", result["sites"])
    differ = sum(1 for s in sites if s["differ"])
    loose = len(cast("Sequence[str]", result["looser"]))
    return (
        f"{result['verdicts']} verdicts judged again; {differ} sites differ; "
        f"the policy would have passed {loose} candidates that were stopped or held"
    )
