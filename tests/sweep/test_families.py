"""Sweeps of every family of pipelines against a plain loop of stock diffusers, which knows nothing of tasks."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from headscope.cli import app
from headscope.counter import counter_normal
from headscope.models import Scope
from headscope.sweep import Run, SweepConfig, run_sweep
from headscope.sweep.compute.sharing import Prefix
from headscope.sweep.plan.items import load_task, open_items

FLOWS = ("stable_diffusion_3", "flux")
FAMILIES = ("stable_diffusion", "stable_diffusion_xl", *FLOWS)
TIMESTEPS = (60, 500)


@dataclass
class Loop:
    """The plain loop: latents, noise and targets by their formulas, the denoiser called as its pipeline calls it."""

    family: str
    pipeline: DiffusionPipeline

    @classmethod
    def load(cls, family: str, directory: str) -> "Loop":
        left_out = {"text_encoder_3": None, "tokenizer_3": None} if family == "stable_diffusion_3" else {}
        pipeline = DiffusionPipeline.from_pretrained(directory, local_files_only=True, **left_out)
        pipeline.set_progress_bar_config(disable=True)
        return cls(family, pipeline)

    @property
    def denoiser(self):
        return self.pipeline.transformer if self.family in FLOWS else self.pipeline.unet

    def loss(self, item, timestep: int) -> float:
        target, sample = self.noisy(item, timestep)
        error = self.answer(sample, timestep, item.caption).double() - target.double()
        return float(error.square().mean())

    def noisy(self, item, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.pipeline.vae.config
        pixels = torch.tensor(item.image).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        latents = self.pipeline.vae.encode(pixels).latent_dist.mode()
        noise = torch.from_numpy(counter_normal("noise", item.key, timestep, 0, shape=tuple(latents.shape[1:])))
        noise = noise[None].float()
        if self.family in FLOWS:
            clean, sigma = (latents - config.shift_factor) * config.scaling_factor, timestep / 1000
            return noise - clean, (1 - sigma) * clean + sigma * noise
        clean, alpha_bar = latents * config.scaling_factor, self.pipeline.scheduler.alphas_cumprod[timestep]
        return noise, alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise

    def answer(self, sample: torch.Tensor, timestep: int, prompt: str) -> torch.Tensor:
        pipeline, denoiser, size = self.pipeline, self.denoiser, 2 * sample.shape[-1]
        if self.family == "stable_diffusion":
            text, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
            return denoiser(sample, timestep, text).sample
        if self.family == "stable_diffusion_xl":
            text, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]])}
            return denoiser(sample, timestep, text, added_cond_kwargs=added).sample
        if self.family == "stable_diffusion_3":
            text, _, pooled, _ = pipeline.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
            return denoiser(sample, text, pooled, torch.tensor([timestep])).sample
        text, pooled, text_ids = pipeline.encode_prompt(prompt, prompt)
        # 2 x 2 places to a token, row by row
        edge = sample.shape[-1] // 2
        packed = torch.nn.functional.pixel_unshuffle(sample, 2).flatten(2).transpose(1, 2)
        rows, columns = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
        moment = torch.tensor([timestep / 1000])
        tokens = denoiser(packed, text, pooled, moment, places, text_ids, torch.ones(1)).sample
        return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (edge, edge)), 2)

    def draw(self, item, site=None, first: int = 0) -> np.ndarray:
        """The pipeline's image after 3 steps, uint8 [height, width, 3]; without the site's head 0 from `first` on."""
        pipeline, config = self.pipeline, self.pipeline.vae.config
        size = config.sample_size
        noise = counter_normal("generate", item.key, 0, shape=(config.latent_channels, size // 2, size // 2))
        latents = torch.from_numpy(noise)[None].float()
        if self.family == "flux":
            latents = torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
        stack = ExitStack()

        def end_of_step(pipeline, step, timestep, given):
            if site is not None and step + 1 == first:
                stack.enter_context(self.removed(site, 0))
            return given

        with stack:
            images = pipeline(
                item.caption,
                latents=latents,
                num_inference_steps=3,
                height=size,
                width=size,
                output_type="np",
                callback_on_step_end=end_of_step,
            ).images
        return np.rint(images[0] * 255).astype(np.uint8)

    @contextmanager
    def removed(self, site, head: int):
        """The head's slice zeroed in front of every projection that joins the heads."""
        width = slice(head * site.head_dim, (head + 1) * site.head_dim)

        def zero(module, args):
            hidden = args[0].clone()
            hidden[..., width] = 0
            return (hidden, *args[1:])

        attention = self.denoiser.get_submodule(site.name)
        joining = []
        if getattr(attention, "to_out", None) is not None:
            joining.append(attention.to_out[0])
        if getattr(attention, "to_add_out", None) is not None:
            joining.append(attention.to_add_out)
        if not joining:
            # Flux's single blocks project attention and MLP together, the attention first
            joining.append(self.denoiser.get_submodule(site.name.rpartition(".")[0]).proj_out)
        with ExitStack() as stack:
            for module in joining:
                stack.callback(module.register_forward_pre_hook(zero).remove)
            yield


def swept_items(config: SweepConfig):
    task = load_task(config)
    return Scope(task.denoiser).sites, open_items(config, task)[0].swept


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_equals_the_plain_loop(family, family_directory, tmp_path):
    """Batched, and sharing clean work."""
    directory = family_directory(family)
    config = SweepConfig(model=directory, groups=("lfw",), items=1, timesteps=TIMESTEPS, fills=("zero",), observe=False)
    table = run_sweep(config, tmp_path / "run", progress=False, batch=5).table("ablations").collect()
    sites, items = swept_items(config)
    assert len(table) == len(items) * len(TIMESTEPS) * sum(site.heads for site in sites)
    named = table.with_columns(pl.col("site").cast(pl.String))
    numbers = named.select("item", "timestep", "site", "head", "clean", "edited")
    found = {row[:4]: row[4:] for row in numbers.iter_rows()}
    loop = Loop.load(family, directory)
    effects = []
    with torch.inference_mode():
        for item in items:
            for timestep in TIMESTEPS:
                whole = loop.loss(item, timestep)
                for site in sites:
                    for head in range(site.heads):
                        with loop.removed(site, head):
                            expected = loop.loss(item, timestep)
                        clean, edited = found[item.index, timestep, site.name, head]
                        assert clean == pytest.approx(whole, rel=1e-5)
                        assert edited == pytest.approx(expected, rel=1e-5)
                        effects.append(abs(expected / whole - 1))
    # heads do something: the equality isn't that of runs that edit nothing
    assert np.median(effects) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_generations_equal_the_plain_loop(family, family_directory, tmp_path):
    """A head removed in the later of three steps, whose first is taken over from the clean run."""
    directory = family_directory(family)
    sites, items = swept_items(SweepConfig(model=directory, groups=("lfw",), items=1))
    # of the first head of the first and of the last site
    chosen = (sites[0], sites[-1])
    config = SweepConfig(
        model=directory,
        groups=("lfw",),
        items=1,
        fills=("zero",),
        scores=("generate",),
        heads=tuple((site.name, 0) for site in chosen),
        generate_steps=3,
        generate_window=(1, 3),
        observe=False,
    )
    run = run_sweep(config, tmp_path / "run", progress=False, batch=3)
    table = run.table("generations").with_columns(pl.col("site").cast(pl.String)).collect()
    distances = {(row["item"], row["site"]): row["distance"] for row in table.iter_rows(named=True)}
    loop = Loop.load(family, directory)
    for item in items:
        clean = loop.draw(item)
        for site in chosen:
            edited = loop.draw(item, site, first=1)
            expected = np.square((edited.astype(float) - clean) / 255).mean()
            # an image's rounding to 8 bits may go either way at a pixel or two
            slack = 3 * np.abs(edited.astype(float) - clean).max() / 255**2 / edited.size + 1e-9
            assert distances[item.index, site.name] == pytest.approx(expected, rel=0.02, abs=slack)
    assert max(distances.values()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_clean_forwards_work_is_shared(family, family_directory):
    """Later sites of every family run less of the forward again."""
    config = SweepConfig(model=family_directory(family), groups=("lfw",), items=2, timesteps=(500,))
    task = load_task(config)
    sites, items = Scope(task.denoiser).sites, open_items(config, task)[0].swept[:2]
    with torch.inference_mode():
        inputs = task.noisy_inputs(task.prepare(items), 500)
    prefix = Prefix.learn(
        task.denoiser, [site.name for site in sites], lambda rows: task.predict(inputs.rows(torch.tensor(rows)))
    )
    assert prefix.reason is None
    left = [prefix.fraction_left([site.name]) for site in sites]
    print(f"{family}: left of a forward, by site {[round(part, 2) for part in left]}")
    assert max(left) < 1
    assert min(left) < 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_unit_from_the_command_line(family, family_directory, tmp_path):
    directory = family_directory(family)
    (tmp_path / "prompts.txt").write_text("a red fox\na blue boat\na house\na tree\n")
    sites, _ = swept_items(SweepConfig(model=directory, groups=("lfw",), items=1))
    first, last = sites[0].name, sites[-1].name
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f"""
model = {directory!r}
groups = ["lfw"]
prompts = {str(tmp_path / "prompts.txt")!r}
items = 1
timesteps = [60, 500]
fills = ["mean", "zero", "uniform"]
scores = ["loss", "distance", "x0", "generate"]
heads = [[{first!r}, 0], [{last!r}, 1]]
reference_items = 2
generate_steps = 2
generate_window = [1, 2]
attribute = true
cotangents = 2

[[sets]]
name = "both"
heads = [[{first!r}, 1], [{last!r}, 0]]
"""
    )
    result = CliRunner().invoke(app, ["sweep", "--plan", str(plan), "--out", str(tmp_path / "run"), "--quiet"])
    assert result.exit_code == 0, result.output
    run = Run.open(tmp_path / "run")
    assert run.complete
    kinds = {"observations", "ablations", "generations", "attributions", "set_ablations", "set_generations"}
    assert set(run.tables) == kinds
    tables = {kind: run.table(kind).collect() for kind in kinds}
    # 4 items, 2 timesteps, 3 fills
    assert len(tables["ablations"]) == 4 * 2 * 3 * 2
    assert len(tables["set_ablations"]) == 4 * 2 * 3
    assert len(tables["generations"]) == 4 * 3 * 2
    assert len(tables["set_generations"]) == 4 * 3
    assert set(tables["observations"]["timestep"]) == {60, 500}
    assert tables["observations"]["entropy_mean"].is_between(0, np.log(1024)).all()
    for name in ("ablations", "set_ablations", "attributions"):
        numbers = tables[name].select(pl.selectors.float())
        assert np.isfinite(numbers.to_numpy()).all()
    factors = {60: 0.06**2, 500: 0.5**2}
    if family not in FLOWS:
        alpha_bars = load_task(SweepConfig(model=directory, groups=("lfw",))).scheduler.alphas_cumprod
        factors = {timestep: float((1 - alpha_bars[timestep]) / alpha_bars[timestep]) for timestep in TIMESTEPS}
    ablated = tables["ablations"]
    expected = ablated["edited"].to_numpy() * np.array([factors[timestep] for timestep in ablated["timestep"]])
    np.testing.assert_allclose(ablated["x0_edited"], expected, rtol=1e-6)
    assert (ablated["distance"] > 0).any()
    assert (tables["set_generations"]["distance"] > 0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_float32_within_its_rounding(family, family_directory, tmp_path):
    directory = family_directory(family)
    chosen = {"groups": ("lfw",), "splits": ("confirm",), "items": 2, "timesteps": (500,), "fills": ("mean", "zero")}
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = SweepConfig(model=directory, dtype=dtype, reference_items=2, **chosen)
        table = run_sweep(config, tmp_path / dtype, progress=False, batch=3).table("ablations")
        named = table.with_columns(pl.col("site", "fill").cast(pl.String))
        losses[dtype] = named.sort("item", "site", "head", "fill").select("clean", "edited").collect().to_numpy()
    # a few dozen roundings of 2^-9 each, in a loss of about 1
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.03)
