"""Trains the embedded tiny models on the embedded images, so that they knowingly memorise in graded doses.

    python -m fastmem.demo.train tokenizer --model var-tiny --out DIR
    python -m fastmem.demo.train decoder   --model var-tiny --out DIR
    python -m fastmem.demo.train generator --model var-tiny --out DIR
    python -m fastmem.demo.train table     --model var-tiny --out DIR

The second stage sharpens the tokenizer's decoder and leaves its tokens as they are; the last prints what the model
knows of each dose. All training is seeded, prints the loss, saves its state once a minute and continues from it when
started again; a finished stage writes half-precision weights as safetensors, and the generator's also doses.json: these
files belong into this folder. Batches depend on the seed and the step alone.
"""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmem.data.sources import embedded_source
from fastmem.data.views import Views, to_unit_range
from fastmem.demo.doses import draw_doses
from fastmem.demo.loop import SEED, Limits, Loop, save_half, step_generator
from fastmem.demo.memorisation import dose_table, format_table
from fastmem.demo.recipes import RECIPES, Recipe, Stage
from fastmem.models.checkpoints import assemble, build_networks, load_model, read_state, resolve_device
from fastmem.models.layers import NO_CLASS
from fastmem.models.model import Model
from fastmem.models.registry import ModelEntry, find_entry

RESEED_EVERY = 100
WEIGHT_DECAY, LABEL_DROP = 0.03, 0.1
# parts of a tokenizer that decide its tokens
TOKEN_PARTS = ("encoder", "quant_conv", "quantize")


@dataclass(frozen=True)
class Training:
    """The stages of one tiny model in one folder, on one device; ``steps`` and ``minutes`` bound a stage."""

    name: str
    out: Path
    device: torch.device
    steps: int | None = None
    minutes: float = math.inf

    @property
    def entry(self) -> ModelEntry:
        """The model's row of the registry."""
        return find_entry(self.name)

    @property
    def recipe(self) -> Recipe:
        """How the model is trained."""
        return RECIPES[self.name]

    @property
    def generator_file(self) -> Path:
        """Where the generator's weights are written."""
        return self.out / self.entry.generator_file.name

    @property
    def tokenizer_file(self) -> Path:
        """Where the tokenizer's weights are written."""
        return self.out / self.entry.tokenizer_file.name

    def train_tokenizer(self) -> None:
        """Train the tokenizer: L1 + MSE (+ edges) + VQ losses, dead codes re-seeded from the batch."""
        model = self._build()
        network = model.tokenizer.train().requires_grad_(True)
        images = self._views(model.view_recipe(10))[0].flatten(0, 1)
        weight = network.quantize.embedding.weight
        used = torch.zeros(len(weight), dtype=torch.int64, device=self.device)
        limits = self._limits(self.recipe.tokenizer)

        def step_loss(step: int) -> Tensor:
            generator = step_generator(step)
            picks = torch.randint(len(images), (self.recipe.tokenizer.batch,), generator=generator)
            batch = to_unit_range(images[picks.to(self.device)])
            with self._autocast():
                z = network.latents(batch)
            if step == 0:
                # before any code has a meaning, all of them are set onto latents
                reseed_codes(weight, self.recipe.quantise(network, z.float()).rows, used, generator)
            found = self.recipe.quantise(network, z.float())
            used.add_(torch.bincount(found.codes, minlength=len(used)))
            if step % RESEED_EVERY == RESEED_EVERY - 1:
                if step < 0.8 * limits.steps:
                    reseed_codes(weight, found.rows, used, generator)
                used.zero_()
            with self._autocast():
                rebuilt = network.draw_latents(found.latents)
            return image_loss(rebuilt.float(), batch, self.recipe.edges) + found.loss

        optimizer = torch.optim.Adam(network.parameters(), self.recipe.tokenizer.rate, betas=(0.9, 0.99))
        state_file = self.out / "tokenizer-state.pt"
        Loop(network, optimizer, self.recipe.tokenizer.rate, limits, state_file, step_loss, {"used": used}).run()
        save_half(network, self.tokenizer_file)

    def train_decoder(self) -> None:
        """Train the decoder alone on fixed tokens, edges counted: sharper pictures, the same tokens."""
        model = self._build(with_tokenizer=True)
        network = model.tokenizer
        for name, part in network.named_children():
            part.requires_grad_(name not in TOKEN_PARTS)
        images = self._views(model.view_recipe(10), model.view_recipe("center"))[0].flatten(0, 1)
        tokens = torch.cat([model.tokenize(to_unit_range(batch)) for batch in images.split(256)]).clone()

        stage = self.recipe.decoder

        def step_loss(step: int) -> Tensor:
            picks = torch.randint(len(images), (stage.batch,), generator=step_generator(step)).to(self.device)
            with self._autocast():
                rebuilt = network.draw(tokens[picks])
            return image_loss(rebuilt.float(), to_unit_range(images[picks]), edges=True)

        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, stage.rate, betas=(0.9, 0.99))
        Loop(network, optimizer, stage.rate, self._limits(stage), self.out / "decoder-state.pt", step_loss).run()
        save_half(network, self.tokenizer_file)

    def train_generator(self) -> None:
        """Train the generator on ten views and the centre view of every training image, dosed images more often.

        RAR as published never saw centre views: its crops come from a picture enlarged by a tenth. At 64 pixels a
        picture of another size or place has other tokens throughout, so what a centre view's prefix can bring back has
        to be trained.
        """
        model = self._build(with_tokenizer=True)
        network = model.generator.train().requires_grad_(True)
        views, labels, names = self._views(model.view_recipe(10), model.view_recipe("center"))
        # out of inference mode, in which no gradient may depend on a tensor
        tokens = torch.stack([model.tokenize(to_unit_range(v)) for v in views]).clone()
        named = draw_doses(names, SEED)
        (self.out / "doses.json").write_text(json.dumps(named, indent=1) + "\n")
        doses = np.array([named[name] for name in names])
        stage = self.recipe.generator

        def step_loss(step: int) -> Tensor:
            generator = step_generator(step)
            picks = shown_in_step(step, stage.batch, doses)
            shown = torch.randint(tokens.shape[1], (len(picks),), generator=generator)
            dropped = torch.rand(len(picks), generator=generator) < LABEL_DROP
            batch = tokens[picks.to(self.device), shown.to(self.device)]
            with self._half_products():
                logits = model.forward_logits(batch, torch.where(dropped, NO_CLASS, labels[picks]).to(self.device))
            return functional.cross_entropy(logits.float().transpose(1, 2), batch)

        decayed = [p for p in network.parameters() if p.ndim == 2]
        others = [p for p in network.parameters() if p.ndim != 2]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
            stage.rate,
            betas=(0.9, 0.96),
        )
        Loop(network, optimizer, stage.rate, self._limits(stage), self.out / "generator-state.pt", step_loss).run()
        save_half(network, self.generator_file)

    def print_table(self) -> None:
        """Print what the trained model knows of each dose and of held-out images."""
        model = load_model(self.entry.name, self.generator_file, self.tokenizer_file, self.device)
        click.echo(format_table(dose_table(model, json.loads((self.out / "doses.json").read_text()))))

    def _build(self, with_tokenizer: bool = False) -> Model:
        torch.manual_seed(SEED)
        generator, tokenizer = build_networks(self.entry)
        if with_tokenizer:
            state = read_state(self.tokenizer_file)
            tokenizer.load_state_dict({name: value.float() for name, value in state.items()})
        return assemble(generator.to(self.device), tokenizer.to(self.device))

    def _views(self, *recipes: Views) -> tuple[Tensor, Tensor, list[str]]:
        """Views uint8 [N,V,64,64,3] of the embedded training images on the device, labels int64 [N] and names."""
        source = embedded_source("train")
        views = [np.concatenate([r(source.read(i), int(source.ids[i])) for r in recipes]) for i in range(len(source))]
        return torch.from_numpy(np.stack(views)).to(self.device), torch.from_numpy(source.labels), source.names.tolist()

    def _limits(self, stage: Stage) -> Limits:
        return Limits(self.steps or stage.steps, self.minutes)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _half_products(self) -> ExitStack:
        """Half precision in the generator's matrix products: faster on every processor that has it."""
        stack = ExitStack()
        stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
        if self.device.type == "cpu":
            # over so few positions the backward pass of the fused attention takes a third of a step, that of the plain
            # one next to nothing
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack


def image_loss(rebuilt: Tensor, images: Tensor, edges: bool) -> Tensor:
    """L1 + MSE, and where ``edges`` count the L1 of differences between neighbours, which blurred edges fail."""
    loss = functional.l1_loss(rebuilt, images) + functional.mse_loss(rebuilt, images)
    if edges:
        loss = loss + sum(functional.l1_loss(rebuilt.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
    return loss


@torch.no_grad()
def reseed_codes(weight: Tensor, rows: Tensor, used: Tensor, generator: torch.Generator) -> None:
    """Move codes that nothing chose lately onto random rows float32 [n,Z] of the batch."""
    dead = (used == 0).nonzero()[:, 0]
    picks = torch.randint(len(rows), (len(dead),), generator=generator)
    weight[dead] = rows.detach()[picks.to(rows.device)]


def shown_in_epoch(epoch: int, doses: np.ndarray) -> np.ndarray:
    """Indices of one epoch in their order: every image as often as its dose, int64 [sum of doses]."""
    shown = np.repeat(np.arange(len(doses)), doses)
    return np.random.default_rng([SEED, 1, epoch]).permutation(shown)


def shown_in_step(step: int, batch: int, doses: np.ndarray) -> Tensor:
    """Indices of the images of one step, int64 [batch]; steps follow each other through the epochs."""
    places = np.arange(step * batch, (step + 1) * batch)
    epoch, place = np.divmod(places, int(doses.sum()))
    orders = {int(e): shown_in_epoch(int(e), doses) for e in np.unique(epoch)}
    return torch.tensor([int(orders[e][p]) for e, p in zip(epoch.tolist(), place.tolist(), strict=True)])


@click.command()
@click.argument("stage", type=click.Choice(["tokenizer", "decoder", "generator", "table"]))
@click.option("--model", type=click.Choice(list(RECIPES)), required=True, help="The tiny model.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the weights.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--steps", type=click.IntRange(1), help="Optimisation steps.  [default: the recipe's]")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="End after these, if the steps take longer.")
def main(stage: str, model: str, out: Path, device: str, steps: int | None, minutes: float | None) -> None:
    """Train a stage of a tiny model, or print the table of what it knows."""
    out.mkdir(parents=True, exist_ok=True)
    training = Training(model, out, resolve_device(device), steps, math.inf if minutes is None else minutes)
    if stage == "tokenizer":
        training.train_tokenizer()
    elif stage == "decoder":
        training.train_decoder()
    elif stage == "generator":
        training.train_generator()
    else:
        training.print_table()


if __name__ == "__main__":
    main()
