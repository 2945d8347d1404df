"""The timesteps at which two runs are compared, and what their models predict."""

import math
from collections.abc import Mapping, Sequence

import polars as pl

from headscope.study.compare.sides import Differing, Side, listing
from headscope.study.noise import log_snr_of, noising_of

# two timesteps of different schedules are one band where their log-SNRs differ by no more, in nats
TOLERANCE = 0.05


def matched_timesteps(first: Side, second: Side, differing: list[Differing]) -> pl.DataFrame:
    """The pairs of timesteps, of the same noise: the same timesteps of one schedule, else bands in order.

    Raises:
        ValueError: there is none, or bands of two schedules whose log-SNRs differ by more than `TOLERANCE`.
    """
    steps = [list(side.manifest["timesteps"]) for side in (first, second)]
    ratios = [log_snr_of(side.manifest) for side in (first, second)]
    if _one_schedule(first, second, ratios):
        pairs = [(step, step) for step in steps[0] if step in steps[1]]
        if not pairs:
            raise ValueError(
                f"second: the runs have no timestep in common: {listing(steps[0])} against {listing(steps[1])}"
            )
        if len(pairs) < max(map(len, steps)):
            shared = listing([one for one, _ in pairs])
            differing.append(Differing("timesteps", listing(steps[0]), listing(steps[1]), f"compared at {shared}"))
    else:
        known = [ratio for ratio in ratios if ratio is not None]
        if len(known) < len(ratios):
            raise ValueError("second: the noise schedules differ, and that of one is unknown, so no timesteps match")
        ordered = [
            sorted(((ratio[step], step) for step in one), reverse=True) for one, ratio in zip(steps, known, strict=True)
        ]
        text = [", ".join(f"{step} ({ratio:.2f})" for ratio, step in one) for one in ordered]
        pairs = [(a, b) for (_, a), (_, b) in zip(*ordered, strict=False)]
        apart = [abs(a - b) for (a, _), (b, _) in zip(*ordered, strict=False)]
        if len(steps[0]) != len(steps[1]) or not max(apart, default=0.0) <= TOLERANCE:
            raise ValueError(
                f"second: the noise schedules differ and their timesteps (log-SNR in nats) are no pairs within"
                f" {TOLERANCE}: {text[0]} against {text[1]}"
            )
        differing.append(
            Differing(
                "noise schedule, timesteps (log-SNR)",
                text[0],
                text[1],
                f"matched by band: log-SNRs at most {max(apart):.3f} nats apart; the noise itself is not the same",
            )
        )
    of_first = ratios[0] or {}
    rows = [(one, two, of_first.get(one)) for one, two in pairs]
    return pl.DataFrame(rows, schema={"first": pl.Int64, "second": pl.Int64, "log_snr": pl.Float64}, orient="row").sort(
        "first"
    )


def _one_schedule(first: Side, second: Side, ratios: Sequence[Mapping[int, float] | None]) -> bool:
    one, two = (side.manifest["identity"].get("scheduler") for side in (first, second))
    if one == two:
        return True
    if ratios[0] is None or ratios[1] is None:
        return False
    schedules = [noising_of(side.manifest) for side in (first, second)]
    if type(schedules[0]) is not type(schedules[1]) or schedules[0].timesteps != schedules[1].timesteps:
        return False
    every = {*ratios[0], *ratios[1]}
    return all(math.isclose(*(one.log_snr(step) for one in schedules), abs_tol=1e-6) for step in every)


def target_of(side: Side) -> str:
    """What the model predicts."""
    name, settings = side.manifest["identity"].get("scheduler") or ("unknown", {})
    return settings.get("prediction_type", "velocity of the flow" if "Flow" in name else "epsilon")
