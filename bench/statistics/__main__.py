"""Do the study's intervals cover, and do its tests keep their size? By simulation, on one core.

    python bench/statistics [--trials N] [--draws N] [--out bench/results/statistics/simulation.json]

Every interval and p-value is that of `headscope.study.inference`, with --draws draws. What others would do stands
beside it. Prints the tables in Markdown and what is outside the aims, and writes all numbers, with their binomial
standard errors, the date and the versions. (A folder, as a file of this name would hide Python's own module statistics
from the scripts beside it.)
"""

import argparse
import time
import zlib
from pathlib import Path

import intervals
import rejections
import worlds
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from headscope.bench import records
from headscope.study.inference import settings

SOURCES = (20, 40, 100)
EFFECTS = (0.25, 0.5, 0.75, 1.0, 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000, help="of every cell; families take a quarter, powers less")
    parser.add_argument("--draws", type=int, default=999, help="of every bootstrap and permutation")
    parser.add_argument("--out", type=Path, default=Path("bench/results/statistics/simulation.json"))
    arguments = parser.parse_args()
    settings.RESAMPLES = arguments.draws
    started = time.perf_counter()
    members, sizes, powers = worlds.worlds(), rejections.sizes(), rejections.powers()
    columns = (
        TextColumn("{task.description}", table_column=None),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    result: dict = {"coverage": {}, "size": {}, "power": {}}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = len(members) * len(SOURCES) + sum(share for _, share in sizes.values())
        total += sum(share for _, share in powers.values()) * len(EFFECTS)
        task = progress.add_task("", total=total * arguments.trials)

        def advance(count: int) -> None:
            progress.advance(task, count)

        for row in members:
            name = row[0].name
            progress.update(task, description=name)
            result["coverage"][name] = {
                str(count): intervals.coverage(row, count, arguments.trials, _seed(name), advance) for count in SOURCES
            } | {"heavy": row[0].heavy}
        for name, (test, share) in sizes.items():
            progress.update(task, description=name)
            trials = max(1, round(share * arguments.trials))
            result["size"][name] = rejections.rejected(test, trials, _seed(name), advance)
        for name, (planted, share) in powers.items():
            progress.update(task, description=name)
            trials = max(1, round(share * arguments.trials))
            result["power"][name] = {
                str(effect): rejections.rejected(planted(effect), trials, _seed(name), advance) for effect in EFFECTS
            }
    print(coverage_table(result["coverage"]), size_table(result["size"]), power_table(result["power"]), sep="\n\n")
    print("\noutside the aims:", *outside(result), sep="\n- ")
    record = {
        **records.machine("cpu"),
        "trials": arguments.trials,
        "draws": arguments.draws,
        "seconds": round(time.perf_counter() - started),
        **result,
    }
    print("\nwritten:", records.write(arguments.out, record))


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def coverage_table(found: dict) -> str:
    """Covered, in percent; the width is over that of Student's t."""
    lines = [
        f"| 95 % intervals, n = 20 / 40 / 100 | headscope | its width | {' | '.join(intervals.METHODS[1:])} |",
        "|---" * (len(intervals.METHODS) + 2) + "|",
    ]
    for name, row in found.items():
        cells = []
        for method in intervals.METHODS:
            known = [row[str(count)][method] for count in SOURCES if method in row[str(count)]]
            cells.append(" / ".join(f"{100 * cell['covered']:.1f}" for cell in known))
        cells.insert(1, " / ".join(f"{row[str(count)]['headscope']['width']:.2f}" for count in SOURCES))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def outside(result: dict) -> list[str]:
    """Rows whose coverage is outside 93 to 97 % (98.5 % with heavy tails) or whose size is above 6 %."""
    found = []
    for name, row in result["coverage"].items():
        for count in SOURCES:
            cell = row[str(count)]["headscope"]
            if not 0.93 <= cell["covered"] <= (0.985 if row["heavy"] else 0.97):
                found.append(f"{name}, n = {count}: covered {100 * cell['covered']:.1f} ± {100 * cell['error']:.1f}")
    for name, row in result["size"].items():
        cell = row["headscope"]
        if cell["rejected"] > 0.06:
            found.append(f"{name}: rejected {100 * cell['rejected']:.1f} ± {100 * cell['error']:.1f}")
    return found


def size_table(found: dict) -> str:
    lines = ["| rejected at 5 %, hypothesis true | headscope | others |", "|---|---|---|"]
    for name, row in found.items():
        others = ", ".join(f"{other} {_percent(cell)}" for other, cell in row.items() if other != "headscope")
        lines.append(f"| {name} | {_percent(row['headscope'])} ± {100 * row['headscope']['error']:.1f} | {others} |")
    return "\n".join(lines)


def power_table(found: dict) -> str:
    lines = [
        "| found, effect in standard deviations of a source | "
        + " | ".join(f"{effect:g}" for effect in EFFECTS)
        + " |",
        "|---" * (len(EFFECTS) + 1) + "|",
    ]
    for name, row in found.items():
        for test in row[str(EFFECTS[0])]:
            cells = [_percent(row[str(effect)][test]) for effect in EFFECTS]
            lines.append(f"| {name}{'' if test == 'headscope' else ': ' + test} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(cell: dict[str, float]) -> str:
    return f"{100 * cell['rejected']:.1f}"


if __name__ == "__main__":
    main()
