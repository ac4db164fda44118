"""The training loop of all stages: seeded by step, bounded in steps and time, saved once a minute, resumable."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SEED = 0
SAVE_SECONDS = 60.0
WARM_UP = 100
PRINT_EVERY = 50


@dataclass(frozen=True)
class Limits:
    """When training ends: after ``steps``, or where ``minutes`` are given after these, whichever comes first.

    The learning rate falls with the larger share of the two, so it ends near zero either way; only without ``minutes``
    does it depend on the step alone.
    """

    steps: int
    minutes: float = math.inf

    def reached(self, step: int, seconds: float) -> bool:
        """Whether training ends before ``step``, after ``seconds``."""
        return step >= self.steps or seconds >= 60 * self.minutes

    def share(self, step: int, seconds: float) -> float:
        """Share of the time after the warm-up that is behind, 0..1, before ``step`` and after ``seconds``."""
        of_steps = max(0, step - WARM_UP) / max(1, self.steps - WARM_UP)
        return min(1.0, max(of_steps, seconds / (60 * self.minutes)))


def cosine_rate(step: int, share: float) -> float:
    """Share of the peak learning rate: linear warm-up over the first steps, then half a cosine down to zero."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))


def step_generator(step: int) -> torch.Generator:
    """Random numbers of one step, on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(SEED * 1_000_003 + step)


@dataclass
class Loop:
    """One stage's training: ``run`` goes from the saved state, if there is one, to the limits.

    step_loss: the loss of a step by its number; counters: tensors beside the weights that a step changes in place.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    rate: float
    limits: Limits
    state_file: Path
    step_loss: Callable[[int], Tensor]
    counters: Mapping[str, Tensor] = field(default_factory=dict)

    def run(self) -> None:
        """Train, saving and resuming through ``state_file``; prints the loss."""
        step, before = self._restore()
        first, started = step, time.monotonic()
        saved, running = started, None
        while not self.limits.reached(step, seconds := before + time.monotonic() - started):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * cosine_rate(step, self.limits.share(step, seconds))
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.step_loss(step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            # kept on the device: reading it every step would make a GPU wait
            running = loss.detach().clone() if running is None else running.lerp_(loss.detach(), 0.02)
            step += 1
            if step % PRINT_EVERY == 0 or step in (first + 1, self.limits.steps):
                click.echo(f"step {step}/{self.limits.steps}  loss {running.item():.4f}  {seconds:.0f} s", err=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save(step, before + time.monotonic() - started)
                saved = time.monotonic()
        self._save(step, seconds)

    def _restore(self) -> tuple[int, float]:
        """Step and seconds from which to go on."""
        if not self.state_file.exists():
            return 0, 0.0
        state = torch.load(self.state_file, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, counter in self.counters.items():
            counter.copy_(state["counters"][name])
        click.echo(f"continues at step {state['step']} from {self.state_file}", err=True)
        return state["step"], state["seconds"]

    def _save(self, step: int, seconds: float) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counters": dict(self.counters),
            "step": step,
            "seconds": seconds,
        }
        torch.save(state, self.state_file.with_suffix(".partial"))
        os.replace(self.state_file.with_suffix(".partial"), self.state_file)


def save_half(network: nn.Module, path: Path) -> None:
    """Write weights as safetensors, floating ones as float16."""
    state = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in network.state_dict().items()
    }
    save_file(state, path)
    click.echo(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", err=True)
