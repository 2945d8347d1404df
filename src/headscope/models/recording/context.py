"""What `scope.record(...)` asks for, and the context in which it is recorded."""

from collections.abc import Iterable, Sequence

from headscope.models.hooks.caches import Missing, Reused
from headscope.models.hooks.contexts import Context
from headscope.models.hooks.forwards import Forward
from headscope.models.recording.recording import Recording
from headscope.models.recording.regions import CounterpartMass, Queries, QueryClasses
from headscope.models.recording.tensors import QUANTITIES, Reduce
from headscope.ops import Statistic
from headscope.ops.statistics import requested_statistics


def requested_recording(
    statistics: Sequence[str | Statistic],
    reduce: Reduce,
    into: Recording | None = None,
    queries: Queries | None = None,
) -> Recording:
    """A new recording of some statistics and quantities, or the earlier one to go on with; see `Scope.record`."""
    if not statistics:
        raise ValueError("statistics: got none, expected at least one name to record")
    if reduce not in ("mean", None):
        raise ValueError(f'reduce: got {reduce!r}, expected "mean" or None')
    quantities = tuple(name for name in QUANTITIES if name in statistics)
    requested = requested_statistics([name for name in statistics if name not in QUANTITIES], QUANTITIES)
    classes = None if queries is None else QueryClasses(queries)
    for one in requested:
        if isinstance(one, CounterpartMass) and (classes is None or classes.regions is not one.regions):
            raise ValueError(
                f"queries: got {type(queries).__name__}, expected the regions of {one.name!r}, per which it is reduced"
            )
    if classes is not None and all(one.sums_over_queries for one in requested):
        names = [*quantities, *(one.name for one in requested)]
        raise ValueError(f"queries: got some beside {', '.join(names)}, expected a statistic of each query to reduce")
    recording = Recording(requested, quantities, reduce, classes)
    if into is None:
        return recording
    if not isinstance(into, Recording):
        raise TypeError(f"into: got {type(into).__name__}, expected an earlier Recording")
    into.go_on(recording)
    return into


class RecordingContext(Context):
    """An open context that records into a recording.

    Args:
        all_sites: the sites are all that there are: attention outside of them is an error then.
    """

    def __init__(self, recording: Recording, sites: Iterable[str], all_sites: bool) -> None:
        super().__init__(sites)
        self.recording = recording
        self.forbids_other_attention = all_sites

    def enter(self, first_forward: int) -> None:
        super().enter(first_forward)
        self.recording.enter(first_forward)

    def leave(self) -> None:
        self.recording.leave()

    def step_of(self, forward: Forward) -> int:
        return self.recording.step_of(forward)

    def check_met(self) -> None:
        super().check_met()
        self.recording.check_met()

    def begin_forward(self, forward: Forward) -> None:
        self.recording.begin_forward(forward)

    def end_forward(self, forward: Forward, completed: bool) -> None:
        if completed:
            self.recording.end_forward(forward)
        else:
            self.recording.drop(forward)

    def note_missing(self, missing: Missing, forward: Forward) -> None:
        if missing.site in self.sites:
            self.recording.reused.append(Reused(missing.site, self.step_of(forward), missing.branch))
