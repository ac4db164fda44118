"""The training loop of the tiny models: seeded by step, limited in steps and time, saved every minute and resumable."""

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
# steps over which the learning rate rises to its peak
WARM_UP = 100
# steps between two printed losses
PRINT_EVERY = 50


@dataclass(frozen=True)
class Limits:
    """When training ends: after ``steps`` or after ``minutes``, whichever comes first.

    The learning rate falls with the larger of the shares of steps and minutes that are over, so it always ends near
    zero. Only without a limit in minutes does it depend on the step alone.
    """

    steps: int
    minutes: float = math.inf

    def reached(self, step: int, seconds: float) -> bool:
        """Return whether training ends before ``step``, when ``seconds`` are over."""
        return step >= self.steps or seconds >= 60 * self.minutes

    def share(self, step: int, seconds: float) -> float:
        """Return which share, 0 to 1, of the training after the warm-up is over before ``step``, after ``seconds``."""
        of_steps = max(0, step - WARM_UP) / max(1, self.steps - WARM_UP)
        return min(1.0, max(of_steps, seconds / (60 * self.minutes)))


def cosine_rate(step: int, share: float) -> float:
    """Return the learning rate of a step as a share of its peak: a linear warm-up, then a half cosine down to zero.

    ``share``, 0 to 1, is the share of the training that is over.
    """
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))


def step_generator(step: int) -> torch.Generator:
    """Return the random number generator of one step; it is on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(SEED * 1_000_003 + step)


@dataclass
class Loop:
    """The training of one network, from its saved state, if there is one, to its limits.

    Attributes:
        network: the network to train.
        optimizer: the optimizer of its parameters.
        rate: peak learning rate.
        limits: when training ends.
        state_file: where the state of the training is saved.
        step_loss: gives the loss of a step for its number.
        counters: tensors, other than weights, that steps change in place and that are saved with the state.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    rate: float
    limits: Limits
    state_file: Path
    step_loss: Callable[[int], Tensor]
    counters: Mapping[str, Tensor] = field(default_factory=dict)

    def run(self) -> None:
        """Train to the limits; continue from the state file where it exists, save to it, and print the loss."""
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
            # not read in every step, because that would make a GPU wait
            running = loss.detach().clone() if running is None else running.lerp_(loss.detach(), 0.02)
            step += 1
            if step % PRINT_EVERY == 0 or step in (first + 1, self.limits.steps):
                click.echo(f"step {step}/{self.limits.steps}  loss {running.item():.4f}  {seconds:.0f} s", err=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save(step, before + time.monotonic() - started)
                saved = time.monotonic()
        self._save(step, seconds)

    def _restore(self) -> tuple[int, float]:
        """Load the saved state, if there is one, and return its step and the seconds spent so far."""
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
    """Write the weights of a network to a safetensors file, with floating-point weights as float16."""
    state = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in network.state_dict().items()
    }
    save_file(state, path)
    click.echo(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", err=True)
