"""One step of Stable Diffusion 1.5's UNet, random weights, 512 px, 8 images, float16: what headscope adds to it.

Stock, with every head's entropy recorded, with a head removed at every site, and with the attention matrix stored;
as it is, compiled, and from CUDA graphs. Steps are interleaved round by round. The profiler says how many kernels a
step launches, and what share of it the device waits for the host.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from card.ahead import binaries, compile_ahead
from card.device import Card, Replay, interleaved, percentiles, quartiles
from card.stage import Report
from headscope.ops import HeadEdit, attention
from peers import Shape

DTYPE = torch.float16
IMAGES = 8
# of the UNet's attention: 8 heads, queries and keys of every site
SITES = [
    Shape(IMAGES, 8, tokens, keys or tokens, dim, "SD1.5 512 px")
    for tokens, dim in ((4096, 40), (1024, 80), (256, 160), (64, 160))
    for keys in (0, 77)
]


def run(report: Report, device: Card) -> None:
    compile_ahead(report, device, [(site, (shape, what)) for shape in SITES for what in ("entropy", "gate")])
    denoiser = build(device)
    from headscope.bench import ways as known

    ways = known.ways_of(denoiser)
    chosen = {name: ways[name] for name in (known.STOCK, known.RECORDING, known.REMOVING, known.MATERIALISING)}
    # first calls: kernels loaded, libraries' choices made
    for way in chosen.values():
        with way.around():
            denoiser.step()
    compiled = _compiled(report, device, denoiser, chosen)
    device.synchronise()
    report.wait_for_turn()
    before = binaries()
    report.facts["description"] = denoiser.description
    plain = {name: _step(denoiser.step, way.around) for name, way in chosen.items()}
    measure(report, device, "as it is", plain, plain)
    graph = device.graph(denoiser.step)
    for name in (known.RECORDING, known.REMOVING):
        try:
            # a graph reads tensors of the context
            with chosen[name].around():
                denoiser.step()
                device.synchronise()
                own = device.graph(denoiser.step)
                graphs = {f"{known.STOCK}, a CUDA graph": graph, f"{name}, a CUDA graph": own}
                measure(report, device, "graphs", graphs, {})
        except Exception as error:
            _failed(report, f"{name}, a CUDA graph", error)
    measure(report, device, "compiled", {known.STOCK: plain[known.STOCK], **compiled}, compiled)
    report.facts["compiled_while_measured"] = binaries() - before


def site(shape: Shape, what: str) -> None:
    """A site's call as the recorder makes it, or the editor."""
    from card.speed import empty

    tensors = empty(shape)
    if what == "entropy":
        attention(*tensors, statistics=["entropy"], backend="triton")
    else:
        attention(*tensors, edit=HeadEdit(torch.ones(shape.batch, shape.heads)), backend="triton")


def build(device: Card) -> Any:
    """The UNet in the place of its pipeline: nothing else runs."""
    from headscope.bench import configurations
    from headscope.bench.denoisers import Denoiser

    torch.manual_seed(0)
    # where it will be: a CPU takes a quarter of a minute for its random weights
    with torch.device(device.torch_device):
        built = configurations.sd15(device.model_size)
        images = IMAGES if device.model_size == configurations.FULL else 1
        inputs = built.inputs(images)
    dtype = DTYPE if device.torch_device == "cuda" else torch.float32
    unet = built.model.to(dtype).eval().requires_grad_(False)
    arguments = {name: value.to(dtype) for name, value in inputs.items()} | {"return_dict": False}

    def step() -> object:
        with torch.inference_mode():
            return unet(**arguments)

    count = sum(parameter.numel() for parameter in unet.parameters())
    sample = tuple(next(iter(inputs.values())).shape)
    description = f"{count / 1e6:.1f} M parameters, input {sample}, {dtype}"
    return Denoiser(unet, arguments, step, unet, step, images, 1, description)


def _step(step: Callable[[], object], around: Callable[[], Any]) -> Callable[[], object]:
    def run() -> object:
        with around():
            return step()

    return run


def _compiled(report: Report, device: Card, denoiser: Any, ways: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Ways through a compiled UNet, those that could be compiled."""
    from headscope.bench import ways as known

    model = device.compile(denoiser.model)

    def step() -> object:
        with torch.inference_mode():
            return model(**denoiser.arguments)

    found = {}
    for name in (known.STOCK, known.RECORDING):
        run = _step(step, ways[name].around)
        try:
            seconds = device.wall(run)
            report.tell(f"{name}, compiled: {seconds:.0f} s for the first step")
            found[f"{name}, compiled"] = run
        except Exception as error:
            _failed(report, f"{name}, compiled", error)
    return found


def _failed(report: Report, name: str, error: Exception) -> None:
    message = f"{type(error).__name__}: {str(error)[:300]}"
    report.tell(f"{name}: {message}", way=name, error=message)


def measure(
    report: Report,
    device: Card,
    how: str,
    steps: dict[str, Callable[[], object]],
    profiled: dict[str, Callable[[], object]],
) -> None:
    """A row for each way; the first is what the others are compared with."""
    replays = {
        name: Replay(lambda step=step: device.seconds(step), device.host(step), [step]) for name, step in steps.items()
    }
    times = interleaved(replays, device.rounds)
    stock = next(iter(times.values()))
    for name, seconds in times.items():
        row: dict[str, Any] = {"how": how, "way": name, "milliseconds": percentiles(seconds)}
        row["time_over_stock"] = quartiles(seconds / stock)
        row["host_milliseconds"] = replays[name].host_seconds * 1e3
        text = f"{name:42} {np.median(seconds) * 1e3:7.1f} ms, {row['time_over_stock'][1]:.2f} of stock's"
        text += f", host {row['host_milliseconds']:.1f} ms"
        if name in profiled:
            row["peak_mebibytes"] = device.peak_bytes(steps[name]) / 2**20
            row |= device.profile(steps[name])
            text += f", {row['peak_mebibytes']:.0f} MiB, {row['kernels']} kernels, idle {row['idle_share']:.0%}"
        report.tell(text, **row)
