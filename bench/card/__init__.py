"""First contact with a GPU: everything that it can show in nine minutes, in order of value.

Reading order: supervise (the command: budget, order, processes), stage (a stage's process and its report),
device (the card), rehearsal (its stand-in on a CPU), workers (processes that may hang or die), ahead (kernels
compiled before the card is used), calls (the calls that are timed), then the stages: smoke, speed and candidates,
contract and pytest_lines, model, sweep, rest; needs (packages), summary (the verdict). Timing, memory and records are
those of headscope.bench.
"""
