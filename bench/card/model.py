"""The stage `model`: a step of Stable Diffusion 1.5's UNet, 512 px, 8 images, float16, without and with headscope.

Stock, with every head's entropy recorded, with a head removed at every site, and with the attention matrix stored;
as it is, compiled, and from CUDA graphs. Steps are interleaved round by round. The profiler says how many kernels a
step launches, and what share of it the device waits for the host.
"""

from collections.abc import Callable
from typing import Any

import torch

from card.ahead import binaries, compile_ahead
from card.calls import DTYPE, empty
from card.device import Card, Replay, interleaved, open_device
from card.stage import Report
from card.workers import Worker
from headscope.bench import configurations, ways
from headscope.bench.denoisers import Denoiser
from headscope.bench.timing import percentiles, ratio
from headscope.bench.ways import MATERIALISING, RECORDING, REMOVING, STOCK, Way
from headscope.ops import HeadEdit, attention
from peers import Shape

IMAGES = 8
# of the UNet's attention: 8 heads, queries and keys of every site
SITES = [
    Shape(IMAGES, 8, tokens, keys or tokens, dim, "SD1.5 512 px")
    for tokens, dim in ((4096, 40), (1024, 80), (256, 160), (64, 160))
    for keys in (0, 77)
]


def run(report: Report, device: Card) -> None:
    compile_ahead(report, device, [(site, (shape, what)) for shape in SITES for what in ("entropy", "gate")])
    # a process of its own: torch.compile takes a minute or more, and may outlast the stage
    compiler = Worker({"TORCHINDUCTOR_COMPILE_THREADS": "8"})
    compiler.send(compile_ways, report.mode)
    denoiser = build(device)
    chosen = ways_of(denoiser)
    # first calls: kernels loaded, libraries' choices made
    for way in chosen.values():
        with way.around():
            denoiser.step()
    device.synchronise()
    report.wait_for_turn()
    before = binaries()
    report.facts["description"] = denoiser.description
    plain = {name: _step(denoiser.step, way.around) for name, way in chosen.items()}
    tell(report, measured(device, "as it is", plain, profile=True))
    for name in (RECORDING, REMOVING):
        try:
            graph = device.graph(denoiser.step)
            # a graph reads tensors of the context
            with chosen[name].around():
                denoiser.step()
                device.synchronise()
                graphs = {f"{STOCK}, a CUDA graph": graph, f"{name}, a CUDA graph": device.graph(denoiser.step)}
                tell(report, measured(device, "graphs", graphs, profile=False))
        except Exception as error:
            _failed(report, f"{name}, a CUDA graph", f"{type(error).__name__}: {str(error)[:300]}")
    report.facts["compiled_while_measured"] = binaries() - before
    for function in (compile_ways, measure_compiled):
        if function is measure_compiled:
            compiler.send(function, report.mode)
        answer = compiler.answer(report.left())
        if answer.error:
            return _failed(report, "compiled", answer.error)
        tell(report, answer.result)
    compiler.end()


def site(shape: Shape, what: str) -> None:
    """A site's call as the recorder makes it, or the editor."""
    tensors = empty(shape)
    if what == "entropy":
        attention(*tensors, statistics=["entropy"], backend="triton")
    else:
        attention(*tensors, edit=HeadEdit(torch.ones(shape.batch, shape.heads)), backend="triton")


def build(device: Card) -> Denoiser:
    """The UNet in the place of its pipeline: nothing else runs."""
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


def ways_of(denoiser: Denoiser) -> dict[str, Way]:
    found = ways.ways_of(denoiser)
    return {name: found[name] for name in (STOCK, RECORDING, REMOVING, MATERIALISING)}


def _step(step: Callable[[], object], around: Callable[[], Any]) -> Callable[[], object]:
    def run() -> object:
        with around():
            return step()

    return run


# the process's that compiles: its steps by name
_compiled: dict[str, Callable[[], object]] = {}


def compile_ways(mode: str) -> list[dict[str, Any]]:
    """Steps through a compiled UNet, and what the first of them took."""
    device = open_device(mode)
    denoiser = build(device)
    chosen, model = ways_of(denoiser), device.compile(denoiser.model)

    def step() -> object:
        with torch.inference_mode():
            return model(**denoiser.arguments)

    _compiled[STOCK] = denoiser.step
    rows = []
    for name in (STOCK, RECORDING):
        run = _step(step, chosen[name].around)
        rows.append({"how": "compiled", "way": f"{name}, compiled", "seconds_of_first": device.wall(run)})
        _compiled[f"{name}, compiled"] = run
    return rows


def measure_compiled(mode: str) -> list[dict[str, Any]]:
    return measured(open_device(mode), "compiled", _compiled, profile=True)


def _failed(report: Report, name: str, message: str) -> None:
    report.tell(f"{name}: {message}", way=name, error=message)


def measured(device: Card, how: str, steps: dict[str, Callable[[], object]], *, profile: bool) -> list[dict[str, Any]]:
    """A row for each way; the first is what the others are compared with."""
    replays = {
        name: Replay(lambda step=step: device.seconds(step), device.host(step), [step]) for name, step in steps.items()
    }
    times = interleaved(replays, device.rounds)
    stock = next(iter(times.values()))
    rows = []
    for name, seconds in times.items():
        row: dict[str, Any] = {"how": how, "way": name, "milliseconds": percentiles(1e3 * seconds)}
        row["time_over_stock"] = ratio(seconds, stock)
        row["host_milliseconds"] = replays[name].host_seconds * 1e3
        if profile:
            row["peak_mebibytes"] = device.peak_bytes(steps[name]) / 2**20
            row |= device.profile(steps[name])
        rows.append(row)
    return rows


def tell(report: Report, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "seconds_of_first" in row:
            text = f"{row['way']}: {row['seconds_of_first']:.0f} s for the first step"
        else:
            text = f"{row['way']:42} {row['milliseconds'][1]:7.1f} ms, {row['time_over_stock'][1]:.2f} of stock's"
            text += f", host {row['host_milliseconds']:.1f} ms"
        if "kernels" in row:
            text += f", {row['peak_mebibytes']:.0f} MiB, {row['kernels']} kernels, idle {row['idle_share']:.0%}"
        report.tell(text, **row)
