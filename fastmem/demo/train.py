"""Train the tiny models in the package on the images in the package, some of which are shown more often than others.

    python -m fastmem.demo.train tokenizer --model var-tiny --out DIR
    python -m fastmem.demo.train decoder   --model var-tiny --out DIR
    python -m fastmem.demo.train generator --model var-tiny --out DIR
    python -m fastmem.demo.train table     --model var-tiny --out DIR

The stages are run in this order. The stage ``decoder`` sharpens the tokenizer's decoder without changing its tokens.
The stage ``table`` prints how well the model knows the images of each dose, which is the number of times that an image
is shown per epoch. Every stage prints its loss, saves its state every minute, and continues from there when it is
started again. Batches depend only on the seed and the step. A finished stage writes float16 weights as a safetensors
file, and the stage ``generator`` also writes doses.json. To ship a model, copy these files to this folder.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
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
from fastmem.models.tokenizer import CodebookTokenizer

# steps after which unused codes are set to new values
RESEED_EVERY = 100
# weight decay of the generator, and share of the labels that are dropped, so that it can be sampled with guidance
WEIGHT_DECAY, LABEL_DROP = 0.03, 0.1
# parts of a tokenizer that decide its tokens
TOKEN_PARTS = ("encoder", "quant_conv", "quantize")


@dataclass(frozen=True)
class Training:
    """The training of one tiny model, in stages.

    Attributes:
        name: name of the model in the registry.
        out: folder where weights and states are written.
        device: where the model is trained.
        steps: number of steps of a stage; None for the recipe's number.
        minutes: greatest duration of a stage.
    """

    name: str
    out: Path
    device: torch.device
    steps: int | None = None
    minutes: float = math.inf

    @property
    def entry(self) -> ModelEntry:
        """The model's entry in the registry."""
        return find_entry(self.name)

    @property
    def recipe(self) -> Recipe:
        """The model's training recipe."""
        return RECIPES[self.name]

    @property
    def generator_file(self) -> Path:
        """The file of the generator's weights."""
        return self.out / self.entry.generator_file.name

    @property
    def tokenizer_file(self) -> Path:
        """The file of the tokenizer's weights."""
        return self.out / self.entry.tokenizer_file.name

    def train_tokenizer(self) -> None:
        """Train the tokenizer by reconstruction and quantisation losses, and reset unused codes to random latents."""
        model = self._build()
        network = _codebook_tokenizer(model).train().requires_grad_(True)
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
                # untrained codes are far from the latents, so all of them are first set to latents
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
        """Train only the tokenizer's decoder, on fixed tokens, with a loss on edges that makes pictures sharper."""
        model = self._build(with_tokenizer=True)
        network = _codebook_tokenizer(model)
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
        """Train the generator on eleven views of every training image, and on images with a higher dose more often.

        The views are ten crops and the centre view. RAR was published without training on centre views. But the tokens
        of a tiny picture change completely with the crop, so a tiny model can only reproduce centre views that it has
        seen.
        """
        model = self._build(with_tokenizer=True)
        network = model.generator.train().requires_grad_(True)
        views, labels, names = self._views(model.view_recipe(10), model.view_recipe("center"))
        # cloned, because the tokens are inference tensors, which a backward pass cannot use
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
        """Print how well the trained model knows the images of each dose and held-out images."""
        model = load_model(self.entry.name, self.generator_file, self.tokenizer_file, self.device)
        click.echo(format_table(dose_table(model, json.loads((self.out / "doses.json").read_text()))))

    def _build(self, with_tokenizer: bool = False) -> Model:
        """Return a model with untrained weights, or with the trained tokenizer."""
        torch.manual_seed(SEED)
        generator, tokenizer = build_networks(self.entry)
        if with_tokenizer:
            state = read_state(self.tokenizer_file)
            tokenizer.load_state_dict({name: value.float() for name, value in state.items()})
        return assemble(generator.to(self.device), tokenizer.to(self.device))

    def _views(self, *recipes: Views) -> tuple[Tensor, Tensor, list[str]]:
        """Return views of the training images, uint8 [N,V,64,64,3] on the device, labels, int64 [N], and names."""
        source = embedded_source("train")
        views = [np.concatenate([r(source.read(i), int(source.ids[i])) for r in recipes]) for i in range(len(source))]
        return torch.from_numpy(np.stack(views)).to(self.device), torch.from_numpy(source.labels), source.names.tolist()

    def _limits(self, stage: Stage) -> Limits:
        return Limits(self.steps or stage.steps, self.minutes)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _half_products(self) -> ExitStack:
        """Return a context that computes the generator's matrix products in bfloat16, which is faster."""
        stack = ExitStack()
        stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
        if self.device.type == "cpu":
            # with so few positions, the backward pass of fused attention would take a third of a step, and that of
            # plain attention takes almost no time
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack


def _codebook_tokenizer(model: Model) -> CodebookTokenizer:
    """Return the tokenizer of an embedded model, whose latents and codes are trained."""
    tokenizer = model.tokenizer
    assert isinstance(tokenizer, CodebookTokenizer)
    return tokenizer


def image_loss(rebuilt: Tensor, images: Tensor, edges: bool) -> Tensor:
    """Return the reconstruction loss of images, float32 [N,3,S,S]: mean absolute error plus mean squared error.

    With ``edges``, the mean absolute error of differences between neighbouring pixels is added, which is large where
    edges are blurred.
    """
    loss = functional.l1_loss(rebuilt, images) + functional.mse_loss(rebuilt, images)
    if edges:
        loss = loss + sum(functional.l1_loss(rebuilt.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
    return loss


@torch.no_grad()
def reseed_codes(weight: Tensor, rows: Tensor, used: Tensor, generator: torch.Generator) -> None:
    """Set codes that were not used to random vectors of a batch, in place.

    Args:
        weight: the codes, float32 [K,Z].
        rows: vectors for which codes were looked up in the batch, float32 [n,Z].
        used: number of times that each code was used, int64 [K].
        generator: random number generator of the choice.
    """
    dead = (used == 0).nonzero()[:, 0]
    picks = torch.randint(len(rows), (len(dead),), generator=generator)
    weight[dead] = rows.detach()[picks.to(rows.device)]


def shown_in_epoch(epoch: int, doses: np.ndarray) -> np.ndarray:
    """Return the images of one epoch in their random order, int64 [sum of doses]: each as often as its dose says.

    ``doses``, int [N], are the doses of the images; ``epoch`` is the number of the epoch.
    """
    shown = np.repeat(np.arange(len(doses)), doses)
    return np.random.default_rng([SEED, 1, epoch]).permutation(shown)


def shown_in_step(step: int, batch: int, doses: np.ndarray) -> Tensor:
    """Return the positions of the images of one step, int64 [batch]; a step continues where the one before ended.

    ``doses``, int [N], are the doses of the images, and ``step`` is the number of the step.
    """
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
    """Train one stage of a tiny model, or print how well the model knows its images.

    \f

    Args:
        stage: "tokenizer", "decoder", "generator" or "table".
        model: name of the tiny model.
        out: folder where weights and states are written.
        device: "auto", "cpu", "cuda" or "cuda:N".
        steps: number of steps; None for the recipe's number.
        minutes: greatest duration; None for no limit.
    """
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
