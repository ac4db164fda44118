"""Small models and images that several rooms' tests use; everything is seeded and made here."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# without a GPU Triton's kernels run in its interpreter, which has to be said before anything imports triton
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# one of several processes that share the cores; threads of their own would wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# a shell ignores Ctrl-C for what it starts in the background, and children inherit that: tests of interrupts need it
signal.signal(signal.SIGINT, signal.default_int_handler)

from fastmem import ArraySource, assemble
from fastmem.cli import main
from fastmem.errors import FastmemError
from fastmem.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from fastmem.models.model import Model
from fastmem.models.rar import RAR, Modulation, RARConfig
from fastmem.models.var import VAR, VARConfig
from fastmem.models.vqvae import MultiScaleVQVAE, MultiScaleVQVAEConfig
from fastmem.runs.progress import LOG_NAME
from fastmem.runs.ranks import current_ranks

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))

import recipe  # it lies beside the golden files

# entries that the parity cases keep as they were built
AS_BUILT = ("attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


def build_case(case: str) -> Model:
    """The model of a parity case, filled by the recipe."""
    sizes = json.loads((GOLDEN / f"{case}.json").read_text())
    if sizes["family"] == "var":
        networks = _build_var(sizes["model"])
    else:
        networks = _build_rar(sizes["generator"], sizes["tokenizer"])
    for network in networks:
        network.load_state_dict(recipe.fill(network.state_dict(), AS_BUILT))
    return assemble(*networks)


def _build_rar(g: dict[str, int], t: dict[str, int]) -> tuple[RAR, MaskGITVQGAN]:
    config = MaskGITVQGANConfig(
        t["hidden_channels"], z_channels=t["z"], codebook_size=t["codebook"], resolution=t["res"]
    )
    sizes = RARConfig(g["hidden"], g["layers"], g["heads"], g["inter"], g["seq"], g["codebook"], g["ncls"])
    return RAR(sizes), MaskGITVQGAN(config)


def _build_var(m: dict[str, int]) -> tuple[VAR, MultiScaleVQVAE]:
    patch_nums = tuple(m["patch_nums"])
    return (
        VAR(VARConfig(m["depth"], patch_nums, m["V"], m["Cvae"], m["ncls"])),
        MultiScaleVQVAE(MultiScaleVQVAEConfig(m["ch"], patch_nums, m["V"], m["Cvae"])),
    )


def case_images(case: str) -> torch.Tensor:
    """The images of a parity case, float32 [N,3,S,S] in [0,1]."""
    sizes = json.loads((GOLDEN / f"{case}.json").read_text())
    pixels = recipe.images(case, sizes["n_images"], sizes["image_size"])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def int64(array: np.ndarray) -> torch.Tensor:
    """Golden tokens or labels as the models take them."""
    return torch.from_numpy(array.astype(np.int64))


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches of the tests' runs lie apart from the user's, and so do weights that happen to be there."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("FASTMEM_HOME", str(home))
        patch.setenv("HF_HUB_CACHE", str(home / "hub"))
        yield


@pytest.fixture(scope="session")
def small_model() -> Model:
    """The model of the case rar-small: 64 px, 16 tokens, 3 blocks of 160 units, 10 classes."""
    return build_case("rar-small")


@pytest.fixture(scope="session")
def small_var() -> Model:
    """The model of the case var-small: 64 px, 30 tokens in 4 scales, 2 blocks of 512 units, 10 classes."""
    return build_case("var-small")


def make_toy_model() -> Model:
    """A RAR of 16 px and 4 tokens that scores thousands of views a second: 2 blocks of 24 units, 5 classes."""
    torch.manual_seed(0)
    generator = RAR(RARConfig(32, 2, 2, 24, 4, 16, 5))
    for module in generator.modules():
        if isinstance(module, Modulation):
            torch.nn.init.normal_(module[1].weight, std=0.2)
    tokenizer = MaskGITVQGAN(MaskGITVQGANConfig(32, (1, 1, 1, 1), 1, 8, 16, 16))
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    return assemble(generator, tokenizer)


@pytest.fixture(scope="session")
def toy_model() -> Model:
    return make_toy_model()


def random_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 [count,size,size,3] of coarse random blocks, so that views and tokens differ between images."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return blocks.repeat(size // 4, 1).repeat(size // 4, 2)


def write_folder(folder: Path, images: np.ndarray, classes: int = 2, first: int = 0) -> Path:
    """Write images uint8 [n,size,size,3], numbered from ``first``, as ``folder/class-C/II.png``; return the folder.

    The images go to the classes in turn: C is the number modulo ``classes``.
    """
    for i, pixels in enumerate(images, first):
        place = folder / f"class-{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i:02d}.png")
    return folder


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its path from there, but for the log, which says when and who."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != LOG_NAME]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="session")
def toy_source() -> ArraySource:
    """23 images of 16 px in 3 of the toy model's 5 classes, of sizes 11, 1 and 11."""
    labels = np.array([0] * 11 + [1] + [3] * 11)
    return ArraySource(random_images(23, 16), labels)


class FakeEmbedder:
    """An embedder without a model: a fixed random projection of the mean colours of 4x4 fields."""

    def __init__(self, name: str = "fake-32", size: int = 32, batch_size: int = 3) -> None:
        self.name, self.size, self.batch_size = name, size, batch_size
        self.digest = "f" * 64
        self.seen = 0
        self._projection = np.random.default_rng(7).standard_normal((48, 512))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.seen += len(pixels)
        fields = pixels.reshape(len(pixels), 4, self.size // 4, 4, self.size // 4, 3).mean((2, 4)).reshape(-1, 48)
        # one row at a time, so that no batch changes a bit
        vectors = np.stack([row @ self._projection for row in fields - 127.0])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def exit_code(*arguments: object) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process and return its exit code, stdout and stderr."""
    code = exit_code(*arguments)
    return code, *capsys.readouterr()


def start_python(code: str, *arguments: object, stdin: int | None = None) -> subprocess.Popen:
    """Start a process that runs ``code`` with ``arguments`` and can import what this one can."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=stdin, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of rar-tiny over 8 pictures of 2 classes in the folder train beside it, with as many held out.

    Every module of tests has its own, to write into.
    """
    folder = tmp_path_factory.mktemp("tiny")
    train, heldout = (
        write_folder(folder / split, random_images(8, 64, seed)) for seed, split in enumerate(("train", "heldout"))
    )
    options = ("--model", "rar-tiny", "--views", "center", "--no-class-check", "--out", folder / "run")
    assert exit_code("score", *options, "--data", train, "--heldout", heldout) == 0
    return folder / "run"


def run_ranks(size: int, work: Callable[[int], object]) -> list[int]:
    """Exit codes of ``size`` processes that call ``work`` with their rank, all of one job; a killed one's is negative.

    One process is no job.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def run_rank(rank: int) -> None:
        # threads of the parent's torch do not exist here
        torch.set_num_threads(1)
        if size > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = 0
        try:
            work(rank)
        except FastmemError as error:
            print(error, file=sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt:
            code = 130
        joined = current_ranks()
        if joined is not None:
            joined.leave()
        sys.exit(code)

    processes = [multiprocessing.get_context("fork").Process(target=run_rank, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(25)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in processes]
