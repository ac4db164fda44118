"""The registry of models: sizes, official files, sampling presets and prefix lengths. It loads no torch.

Outside packages add rows through the entry point group ``fastmem.models``. Each entry point names a
:class:`ModelEntry` or a callable that returns a list of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from fastmem.errors import UsageError
from fastmem.home import home
from fastmem.models.hub import find_in_hub_cache

ENTRY_POINTS = "fastmem.models"
# the models that help texts name
SMALL_EXAMPLE, LARGE_EXAMPLE = "rar-tiny", "rar-xxl"
# prefix lengths of the published extraction in tokens: for RAR out of 256, for VAR, where they are none to four scales,
# out of 680 (arXiv 2502.02514)
PREFIX_LADDER = (0, 1, 5, 14, 30)


@dataclass(frozen=True)
class Preset:
    """How a model samples; each row of the registry has its published settings.

    Attributes:
        temperature: divides the logits.
        guidance: classifier-free guidance scale, off at 1 for RAR and at 0 for VAR.
        guidance_power: exponent of the cosine along which RAR's guidance rises; None for VAR.
        top_k: how many of the likeliest tokens VAR draws from; None for all.
        top_p: the mass of the likeliest tokens that VAR draws from; None for all.
    """

    temperature: float = 1.0
    guidance: float = 1.0
    guidance_power: float | None = None
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class OfficialFile:
    """A weight file, from ``repository`` on Hugging Face, or shipped inside the package where that is None."""

    name: str
    repository: str | None = None

    @property
    def path(self) -> Path:
        """Where the file lies, in ``own_path`` or the cache of Hugging Face's hub, or else ``own_path``."""
        own = self.own_path
        if self.repository is None or os.path.isfile(own):
            return own
        return find_in_hub_cache(self.repository, self.name) or own

    @property
    def own_path(self) -> Path:
        """Where fastmem keeps the file: in the package, or in ``FASTMEM_HOME``."""
        if self.repository is None:
            return Path(__file__).parent.parent / "demo" / self.name
        return home() / "weights" / self.name


@dataclass(frozen=True)
class ModelEntry:
    """One row of the registry.

    Attributes:
        name: the name that ``load_model`` takes.
        module: the module that offers ``model_class`` and ``build(generator, tokenizer, shapes)``.
        generator: sizes of the generator, where they differ from the defaults of its config.
        tokenizer: sizes of the tokenizer, where they differ from the defaults of its config.
        generator_file: the generator's official weights.
        tokenizer_file: the tokenizer's official weights.
        parameters: the generator's number of parameters, for people to read.
        preset: how it samples.
        published_fid: FID that its authors report, None where they report none.
        prefixes: default prefix lengths in tokens, None for the published ladder at the same shares of the tokens.
        embedded: its weights and the images that it was trained on ship with the package.
    """

    name: str
    module: str
    generator: Mapping[str, int | tuple[int, ...]]
    tokenizer: Mapping[str, int | tuple[int, ...]]
    generator_file: OfficialFile
    tokenizer_file: OfficialFile
    parameters: str
    preset: Preset
    published_fid: float | None = None
    prefixes: tuple[int, ...] | None = None
    embedded: bool = False


_MASKGIT_FILE = OfficialFile("maskgit-vqgan-imagenet-f16-256.bin", "fun-research/TiTok")


def _rar(name: str, hidden: int, layers: int, units: int, parameters: str, preset: Preset, fid: float) -> ModelEntry:
    return ModelEntry(
        name=name,
        module="fastmem.models.rar",
        generator={"hidden_size": hidden, "num_layers": layers, "intermediate_size": units},
        tokenizer={},
        generator_file=OfficialFile(name.replace("-", "_") + ".bin", "yucornetto/RAR"),
        tokenizer_file=_MASKGIT_FILE,
        parameters=parameters,
        preset=preset,
        published_fid=fid,
        prefixes=PREFIX_LADDER,
    )


_VQVAE_FILE = OfficialFile("vae_ch160v4096z32.pth", "FoundationVision/var")


def _var(depth: int, parameters: str, fid: float) -> ModelEntry:
    return ModelEntry(
        name=f"var-d{depth}",
        module="fastmem.models.var",
        generator={"depth": depth},
        tokenizer={},
        generator_file=OfficialFile(f"var_d{depth}.pth", "FoundationVision/var"),
        tokenizer_file=_VQVAE_FILE,
        parameters=parameters,
        preset=Preset(1.0, 1.5, top_k=900, top_p=0.96),
        published_fid=fid,
        prefixes=PREFIX_LADDER,
    )


_TINY_PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8)
_ROWS = (
    _rar("rar-b", 768, 24, 3072, "261 M", Preset(1.0, 16.0, 2.75), 1.95),
    _rar("rar-l", 1024, 24, 4096, "461 M", Preset(1.02, 15.5, 2.5), 1.70),
    _rar("rar-xl", 1280, 32, 5120, "955 M", Preset(1.02, 6.9, 1.5), 1.50),
    _rar("rar-xxl", 1408, 40, 6144, "1.5 B", Preset(1.02, 8.0, 1.2), 1.48),
    _var(16, "310 M", 3.55),
    _var(20, "600 M", 2.95),
    _var(24, "1.0 B", 2.33),
    _var(30, "2.0 B", 1.97),
    ModelEntry(
        name="rar-tiny",
        module="fastmem.models.rar",
        generator={
            "hidden_size": 192,
            "num_layers": 8,
            "num_heads": 6,
            "intermediate_size": 768,
            "image_seq_len": 64,
            "codebook_size": 512,
            "num_classes": 41,
        },
        tokenizer={
            "hidden_channels": 32,
            "channel_mult": (1, 1, 2, 4),
            "num_res_blocks": 1,
            "z_channels": 32,
            "codebook_size": 512,
            "resolution": 64,
        },
        generator_file=OfficialFile("rar_tiny.safetensors"),
        tokenizer_file=OfficialFile("maskgit_vqgan_tiny.safetensors"),
        parameters="6 M",
        preset=Preset(1.0, 4.0, 2.75),
        embedded=True,
    ),
    ModelEntry(
        name="var-tiny",
        module="fastmem.models.var",
        generator={
            "depth": 8,
            "patch_nums": _TINY_PATCH_NUMS,
            "codebook_size": 512,
            "latent_channels": 16,
            "num_classes": 41,
            "hidden_size": 192,
            "num_heads": 6,
        },
        tokenizer={
            "channels": 32,
            "patch_nums": _TINY_PATCH_NUMS,
            "codebook_size": 512,
            "latent_channels": 16,
            "channel_mult": (1, 1, 2, 3),
            "num_res_blocks": 1,
        },
        generator_file=OfficialFile("var_tiny.safetensors"),
        tokenizer_file=OfficialFile("vqvae_tiny.safetensors"),
        parameters="6 M",
        preset=Preset(1.0, 1.5, top_k=450, top_p=0.96),
        # none to three scales; at the published shares of its 155 tokens the ladder would end with two
        prefixes=PREFIX_LADDER[:-1],
        embedded=True,
    ),
)


@cache
def entries() -> dict[str, ModelEntry]:
    """Every known model by name, those of outside packages last.

    Raises:
        UsageError: an outside package adds a name that is taken.
    """
    known = {row.name: row for row in _ROWS}
    for point in metadata.entry_points(group=ENTRY_POINTS):
        found = point.load()
        for row in [found] if isinstance(found, ModelEntry) else found():
            if row.name in known:
                raise UsageError(f"expected a new model name from {point.value}, got {row.name}, which is taken")
            known[row.name] = row
    return known


def model_names() -> list[str]:
    """Names that ``load_model`` takes."""
    return list(entries())


def find_entry(name: str) -> ModelEntry:
    """The row of a model.

    Raises:
        UsageError: the name is unknown.
    """
    known = entries()
    if name not in known:
        raise UsageError(f"expected a model out of {', '.join(known)}, got {name!r}")
    return known[name]
