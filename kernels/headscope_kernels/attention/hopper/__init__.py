"""Schedules of the forward for Hopper: what each serves (schedules), Triton's own (specialised), ours (pingpong)."""
