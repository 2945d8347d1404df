"""First contact with a GPU: which results are right, how fast they are, and what to do next, in one command.

    python bench/gpu.py --budget 540 --out DIR [--stages smoke,speed,contract,model,sweep,rest]
    python bench/gpu.py --needs         the packages that the last stages need
    python bench/gpu.py --rehearse      every line of every stage, on a machine without a GPU

Stages run in order of value, each in a separate process, and write gpu-STAGE.json into DIR after every result: a run
that is cut off at any moment has written all that it knew. A stage that the rest of the budget won't hold is skipped;
one that fails, hangs or loses the card ends alone. `speed` also writes choices.json, from which configurations are
chosen. Its kernels are compiled ahead, by as many processes as there are cores. At the end: what was wrong, how fast,
what next. Peers: torch's SDPA and each of its kernels, FlexAttention, the materialised matrix, and float64 for errors.

smoke, speed and contract need torch, Triton, NumPy, pytest and pytest-xdist only.
"""

from card.supervise import main

if __name__ == "__main__":
    main(__doc__ or "")
