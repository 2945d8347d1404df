"""The verdict, from what the stages wrote: what was wrong, how fast it is, what to do next."""

import json
from pathlib import Path
from typing import Any

from card.supervise import STAGES

MOST_LINES = 30


def show(out: Path, ends: dict[str, str]) -> str:
    """The summary of a folder's gpu-STAGE.json; `ends` says how stages ended, where they were run."""
    records = {name: read(out / f"gpu-{name}.json") for name in STAGES}
    lines = ["", "== summary"]
    for name in STAGES:
        state = ends.get(name) or (records[name] or {}).get("state") or "not run"
        lines.append(f"{name:9} {state}" + compiled(records[name]))
    wrong = [text for name, record in records.items() if record for text in wrong_of(name, record["rows"])]
    lines.append(f"wrong: {len(wrong) or 'nothing that was looked at'}")
    lines += [f"  {text}" for text in wrong[:MOST_LINES]]
    unknown = [text for name, record in records.items() if record for text in unknown_of(name, record["rows"])]
    lines += [f"not known: {len(unknown)}", *(f"  {text}" for text in unknown[:MOST_LINES])] if unknown else []
    fast = [text for name, record in records.items() if record for text in speeds_of(name, record["rows"])]
    lines += ["fast:", *(f"  {text}" for text in fast)] if fast else []
    lines.append(f"next: {next_step(wrong, ends, records)}")
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def compiled(record: dict[str, Any] | None) -> str:
    """The cost of compiling, and the kernels that weren't foreseen."""
    facts = (record or {}).get("compiled_ahead")
    if not facts:
        return ""
    late = (record or {}).get("compiled_while_measured", 0)
    text = f" (compiled {facts['kernels']} kernels in {facts['seconds']} s"
    return text + (f", {late} more while it measured)" if late else ")")


def wrong_of(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row that says so: not right, not sound, past its bound."""
    found = []
    for row in latest(rows):
        past = {key: round(value, 2) for key, value in (row.get("error_over_bound") or {}).items() if not value <= 1}
        if row.get("right") is False or row.get("sound") is False or past:
            found.append(line_of(name, row, str(past or "")))
    return found


def unknown_of(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row without an answer: begun and not ended, or not possible."""
    found = []
    for row in latest(rows):
        judged = {"right", "sound"} & row.keys()
        if row.get("right", True) is None or ("error" in row and not judged):
            found.append(line_of(name, row))
    return found


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A test that was run again has two rows."""
    return list({row.get("test", index): row for index, row in enumerate(rows)}.values())


def line_of(name: str, row: dict[str, Any], why: str = "") -> str:
    what = next((row[key] for key in ("check", "test", "call", "way", "part") if key in row), "")
    what = f"candidate {row['candidate']}" if "candidate" in row else what
    why = why or next((str(row[key]) for key in ("error", "reason", "output") if row.get(key)), "")
    return " ".join(f"{name}: {row.get('shape', '')} {what}: {why}".split())[:230]


def speeds_of(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """The lines that a reader looks for first."""
    found = []
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        # beside FlexAttention it was measured once more
        ours = row.get("call", "").endswith("entropy + gate") and row.get("part") != "flex"
        if name in ("speed", "rest") and ours and "milliseconds" in row:
            default, over_best = row["speed_over_default_stock"], row["speed_over_best_stock"]
            found.append(
                f"{row['part']:8} {row['shape']:24} {row['tflops_per_second']:4.0f} TF,"
                f" {default[1]:.2f} ({default[0]:.2f} to {default[2]:.2f}) of SDPA,"
                f" {over_best[1]:.2f} of {row['best_stock']}, host {row['host_microseconds']:.0f} us"
            )
        elif row.get("candidate") and row.get("sound"):
            other = best.get(row["shape"])
            if other is None or row["speed_over_the_rule"] > other["speed_over_the_rule"]:
                best[row["shape"]] = row
        elif name == "model" and "time_over_stock" in row:
            over = row["time_over_stock"]
            found.append(f"a step, {row['way']}: {over[1]:.2f} ({over[0]:.2f} to {over[2]:.2f}) of stock's time")
        elif name == "sweep" and "times_the_loop" in row:
            found.append(f"a sweep, {row['contender']}: {row['times_the_loop']['p50']:.2f} times the loop's speed")
    for shape, row in best.items():
        over, stock = row["speed_over_the_rule"], row["speed_over_best_stock"][1]
        found.append(f"candidate {shape}: {row['candidate']}, {over:.2f} of the rule's, {stock:.2f} of stock's best")
    return found


def next_step(wrong: list[str], ends: dict[str, str], records: dict[str, Any]) -> str:
    # a candidate that isn't sound is only not chosen
    first = next((text for text in wrong if " candidate " not in text), None)
    if first:
        return f"the first wrong result, before any speed is believed: {first}"
    broken = [f"{name} ({end})" for name, end in ends.items() if end.startswith(("failed", "cut off"))]
    if broken:
        return f"why these stages ended: {', '.join(broken)}"
    rows = [row for row in (records["speed"] or {"rows": []})["rows"] if row.get("speed_over_the_rule", 0) > 1.02]
    if rows:
        shapes = len({row["shape"] for row in rows})
        return f"take choices.json into the kernels: candidates are faster than the rule's choice on {shapes} shapes"
    skipped = [name for name, end in ends.items() if end.startswith("skipped")]
    if skipped:
        return f"again with --stages {','.join(skipped)}"
    return "write the figures into bench/NOTES.md"
