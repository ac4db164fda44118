"""Trains the embedded tiny models on the embedded images, so that they knowingly memorise in graded doses.

    python -m fastmem.demo.train tokenizer --out DIR
    python -m fastmem.demo.train decoder --out DIR
    python -m fastmem.demo.train rar --out DIR
    python -m fastmem.demo.train table --out DIR

The second stage sharpens the tokenizer's decoder and leaves its tokens as they are. All training is seeded, prints the
loss, saves its state once a minute and continues from it when started again; a finished stage writes half-precision
weights as safetensors. Batches depend on the seed and the step alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmem.data.sources import embedded_source
from fastmem.data.views import CenterCrop, TenCrop, Views
from fastmem.demo.doses import draw_doses
from fastmem.demo.memorisation import dose_table, format_table
from fastmem.models.checkpoints import assemble, build_networks, load_model, read_state
from fastmem.models.maskgit_vqgan import MaskGITVQGAN
from fastmem.models.model import to_unit_range
from fastmem.models.rar import NO_CLASS
from fastmem.models.registry import find_entry

SEED = 0
TOKENIZER_STEPS, TOKENIZER_BATCH, TOKENIZER_RATE = 3500, 16, 6e-4
RESEED_EVERY = 100
DECODER_STEPS, DECODER_RATE = 2500, 6e-4
GENERATOR_STEPS, GENERATOR_BATCH, GENERATOR_RATE = 1100, 64, 1e-3
WEIGHT_DECAY, LABEL_DROP = 0.03, 0.1
SAVE_SECONDS = 60.0


def training_views(*recipes: Views) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Views uint8 [N,V,64,64,3] by every recipe, labels int64 [N] and names of the embedded training images."""
    source = embedded_source("train")
    views = [
        np.concatenate([recipe(source.read(i), int(source.ids[i])) for recipe in recipes]) for i in range(len(source))
    ]
    return np.stack(views), source.labels, source.names.tolist()


def both_recipes(size: int) -> tuple[Views, Views]:
    """Ten crops, and the centre view that extraction starts from."""
    return TenCrop(size), CenterCrop(size)


def cosine_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_loop(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    steps: int,
    state_file: Path,
    step_loss: Callable[[int], Tensor],
) -> None:
    """Run ``steps`` optimisation steps of ``step_loss(step)``, saving and resuming through ``state_file``."""
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        click.echo(f"continues at step {first} from {state_file}", err=True)

    def save(step: int) -> None:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, state_file.with_suffix(".partial"))
        os.replace(state_file.with_suffix(".partial"), state_file)

    saved = started = time.monotonic()
    running = None
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine_rate(step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss = step_loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 49 or step + 1 == steps:
            seconds = time.monotonic() - started
            left = seconds / (step + 1 - first) * (steps - step - 1)
            click.echo(f"step {step + 1}/{steps}  loss {running:.4f}  {seconds:.0f} s, {left:.0f} s left", err=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            save(step + 1)
            saved = time.monotonic()
    save(steps)


def save_half(network: nn.Module, path: Path) -> None:
    """Write weights as float16 safetensors."""
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, path)
    click.echo(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", err=True)


def quantize_straight_through(network: MaskGITVQGAN, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest codes of latents [N,Z,G,G] with the straight-through gradient; also the VQ loss and the code indices."""
    indices = network.quantize(z)
    codes = network.quantize.embedding(indices).view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
    loss = functional.mse_loss(codes, z.detach()) + 0.25 * functional.mse_loss(z, codes.detach())
    return z + (codes - z).detach(), loss, indices


@torch.no_grad()
def reseed_codes(network: MaskGITVQGAN, z: Tensor, used: Tensor, generator: torch.Generator) -> None:
    """Move codes that no latent chose lately onto random latents of the batch."""
    dead = (used == 0).nonzero()[:, 0]
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    picks = torch.randint(len(rows), (len(dead),), generator=generator)
    network.quantize.embedding.weight[dead] = rows[picks]


def train_tokenizer(out: Path, steps: int) -> None:
    """Train the tiny MaskGIT-VQGAN: L1 + MSE + VQ losses, dead codes re-seeded from the batch."""
    torch.manual_seed(SEED)
    _, network = build_networks(find_entry("rar-tiny"))
    network = network.to(memory_format=torch.channels_last).train()
    views = training_views(TenCrop(network.config.resolution))[0]
    views = views.reshape(-1, *views.shape[2:])
    used = torch.zeros(network.config.codebook_size, dtype=torch.int64)

    def step_loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        picks = torch.randint(len(views), (TOKENIZER_BATCH,), generator=generator)
        images = torch.from_numpy(views[picks.numpy()]).permute(0, 3, 1, 2).float() / 255
        z = network.encoder(images)
        if step == 0:
            reseed_codes(network, z, used, generator)
        codes, vq_loss, indices = quantize_straight_through(network, z)
        used.add_(torch.bincount(indices.flatten(), minlength=len(used)))
        if step % RESEED_EVERY == RESEED_EVERY - 1:
            if step < 0.8 * steps:
                reseed_codes(network, z, used, generator)
            used.zero_()
        rebuilt = network.decoder(codes)
        return functional.l1_loss(rebuilt, images) + functional.mse_loss(rebuilt, images) + vq_loss

    optimizer = torch.optim.Adam(network.parameters(), lr=TOKENIZER_RATE, betas=(0.9, 0.99))
    train_loop(network, optimizer, TOKENIZER_RATE, steps, out / "tokenizer-state.pt", step_loss)
    save_half(network, out / find_entry("rar-tiny").tokenizer_file.name)


def edge_loss(rebuilt: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels, which blurred edges fail."""
    return sum(functional.l1_loss(rebuilt.diff(dim=d), images.diff(dim=d)) for d in (2, 3))


def train_decoder(out: Path, steps: int) -> None:
    """Train the decoder alone on fixed tokens, edges counted: sharper pictures, the same tokens."""
    entry = find_entry("rar-tiny")
    path = out / entry.tokenizer_file.name
    _, network = build_networks(entry)
    network.load_state_dict({name: value.float() for name, value in read_state(path).items()})
    network = network.to(memory_format=torch.channels_last).requires_grad_(False)
    network.decoder.requires_grad_(True)
    views = training_views(*both_recipes(network.config.resolution))[0]
    views = torch.from_numpy(views.reshape(-1, *views.shape[2:]))
    tokens = torch.cat([network.encode(to_unit_range(batch)) for batch in views.split(128)])

    def step_loss(step: int) -> Tensor:
        picks = torch.randint(len(views), (TOKENIZER_BATCH,), generator=torch.Generator().manual_seed(step))
        images, grid = to_unit_range(views[picks]), network.config.grid
        codes = network.quantize.embedding(tokens[picks]).view(len(picks), grid, grid, -1).permute(0, 3, 1, 2)
        rebuilt = network.decoder(codes)
        return functional.l1_loss(rebuilt, images) + functional.mse_loss(rebuilt, images) + edge_loss(rebuilt, images)

    optimizer = torch.optim.Adam(network.decoder.parameters(), lr=DECODER_RATE, betas=(0.9, 0.99))
    train_loop(network, optimizer, DECODER_RATE, steps, out / "decoder-state.pt", step_loss)
    save_half(network, path)


def shown_in_epoch(epoch: int, doses: np.ndarray) -> np.ndarray:
    """Indices of one epoch in their order: every image as often as its dose, int64 [sum of doses]."""
    shown = np.repeat(np.arange(len(doses)), doses)
    return np.random.default_rng([SEED, 1, epoch]).permutation(shown)


def train_rar(out: Path, steps: int) -> None:
    """Train the tiny RAR on the ten crops and the centre view of every training image, dosed images more often.

    The published RAR never saw centre views: its crops come from a picture enlarged by 1.1. At 64 tokens a picture of
    another size has other tokens throughout, so what a centre view's prefix can bring back has to be trained.
    """
    entry = find_entry("rar-tiny")
    torch.manual_seed(SEED)
    network, tokenizer = build_networks(entry)
    tokenizer.load_state_dict({k: v.float() for k, v in read_state(out / entry.tokenizer_file.name).items()})
    model = assemble(network, tokenizer)
    network.train().requires_grad_(True)
    views, labels, names = training_views(*both_recipes(model.image_size))
    tokens = torch.stack([model.tokenize(to_unit_range(torch.from_numpy(v))) for v in views])
    named = draw_doses(names, SEED)
    (out / "doses.json").write_text(json.dumps(named, indent=1) + "\n")
    doses = np.array([named[name] for name in names])
    per_epoch, classes = int(doses.sum()), torch.from_numpy(labels)

    def step_loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        places = np.arange(step * GENERATOR_BATCH, (step + 1) * GENERATOR_BATCH)
        epochs = {int(e): shown_in_epoch(int(e), doses) for e in np.unique(places // per_epoch)}
        picks = torch.tensor([int(epochs[p // per_epoch][p % per_epoch]) for p in places.tolist()])
        views_shown = torch.randint(tokens.shape[1], (len(picks),), generator=generator)
        dropped = torch.rand(len(picks), generator=generator) < LABEL_DROP
        batch = tokens[picks, views_shown]
        # half precision in the matrix products: faster on processors that have it; at 65 positions the backward pass
        # of the fused attention takes a third of a step, that of the plain one next to nothing
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = network(batch, torch.where(dropped, NO_CLASS, classes[picks]))
        return functional.cross_entropy(logits.float().transpose(1, 2), batch)

    decayed = [p for p in network.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=GENERATOR_RATE,
        betas=(0.9, 0.96),
    )
    train_loop(network, optimizer, GENERATOR_RATE, steps, out / "rar-state.pt", step_loss)
    save_half(network, out / entry.generator_file.name)


def print_table(out: Path) -> None:
    """Print what the trained model knows of each dose and of held-out images."""
    entry = find_entry("rar-tiny")
    model = load_model("rar-tiny", out / entry.generator_file.name, out / entry.tokenizer_file.name)
    click.echo(format_table(dose_table(model, json.loads((out / "doses.json").read_text()))))


@click.command()
@click.argument("stage", type=click.Choice(["tokenizer", "decoder", "rar", "table"]))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the weights.")
def main(stage: str, out: Path) -> None:
    """Train a stage of the tiny model, or print the table of what it knows."""
    out.mkdir(parents=True, exist_ok=True)
    if stage == "tokenizer":
        train_tokenizer(out, TOKENIZER_STEPS)
    elif stage == "decoder":
        train_decoder(out, DECODER_STEPS)
    elif stage == "rar":
        train_rar(out, GENERATOR_STEPS)
    else:
        print_table(out)


if __name__ == "__main__":
    main()
