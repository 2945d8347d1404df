"""First contact with a GPU: everything that a card can tell in nine minutes, in order of value.

Reading order: supervise (the command: budget, order, processes), stage (a stage's own process and what it tells),
device (the card), rehearsal (what stands in for it), workers (processes that may hang or die), ahead (kernels
compiled before the card is asked), calls (what is timed), then the stages: smoke, speed and candidates, contract and
told, model, sweep, rest; needs (packages), summary (the verdict).
"""
