"""The model seam: nothing outside models/ knows a family, and a third family is one file and one registry row."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastmem
from fastmem.backends import plain
from fastmem.backends.select import Backend
from fastmem.models import registry
from fastmem.models.checkpoints import build_networks
from tests.conftest import random_images, run, write_folder

PACKAGE = Path(fastmem.__file__).parent
# models/ holds the families; the demo trains the embedded ones
OWN_ROOMS = ("models", "demo")
FAMILY_MODULES = {entry.module for entry in registry.entries().values()} | {
    "fastmem.models.maskgit_vqgan",
    "fastmem.models.vqvae",
}
FAMILIES = {module.rsplit(".", 1)[1] for module in FAMILY_MODULES}
OUTSIDE = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in OWN_ROOMS)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def docstrings(tree: ast.AST) -> set[int]:
    """Identities of the string nodes that only describe."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.add(id(node.value))
    return found


def named_families(tree: ast.AST) -> Iterator[str]:
    """Family or model names in code: identifiers, attributes and strings other than docstrings."""
    described = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
            words = node.value.replace("_", " ").replace("-", " ").lower().split()
        elif isinstance(node, ast.Name):
            words = [node.id.lower(), node.id.lower().removesuffix("model")]
        elif isinstance(node, ast.Attribute):
            words = [node.attr.lower()]
        else:
            continue
        # "var" also abbreviates variance, and so is judged as a word of strings and class names only
        families = (
            FAMILIES if isinstance(node, ast.Constant) or getattr(node, "id", "").isupper() else FAMILIES - {"var"}
        )
        yield from (word for word in words if word in families)


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_outside_models_imports_or_names_a_family(path):
    tree = ast.parse(path.read_text())
    assert not FAMILY_MODULES & set(imported_modules(tree))
    assert not list(named_families(tree))


def test_the_search_finds_what_it_looks_for():
    bad = "from fastmem.models.rar import RAR\nif model.name == 'var-d16' or isinstance(model, RAR):\n    pass"
    tree = ast.parse(bad)
    assert "fastmem.models.rar" in set(imported_modules(tree))
    assert set(named_families(tree)) == {"rar", "var"}


# a whole family as an outside package would write it: one pixel-colour token for each quarter of a picture, and a
# generator that mixes the tokens before a position with the class
FAMILY = """
from torch import nn
import torch
from fastmem.data.views import CenterCrop
from fastmem.models.model import Model, Observation, Segment
from fastmem.models.registry import ModelEntry, OfficialFile, Preset


class Quarters(nn.Module):
    def __init__(self):
        super().__init__()
        self.levels = nn.Parameter(torch.linspace(0, 1, 8))

    def encode(self, images):
        means = nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)
        return (means[..., None] - self.levels).abs().argmin(-1)

    def decode(self, tokens):
        quarters = self.levels[tokens].view(-1, 1, 2, 2).expand(-1, 3, -1, -1)
        return nn.functional.interpolate(quarters, scale_factor=8)


class Mixer(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.classes, self.tokens = nn.Embedding(classes, 6), nn.Embedding(8, 6)
        self.fc1, self.head = nn.Linear(6, 10), nn.Linear(10, 8)

    def inputs(self, tokens, labels):
        seen = nn.functional.pad(self.tokens(tokens).cumsum(1)[:, :-1], (0, 0, 1, 0))
        return seen + self.classes(labels)[:, None]

    def forward(self, tokens, labels):
        return self.head(self.fc1(self.inputs(tokens, labels)).relu()).float()


class MixerModel(Model):
    generator_class, tokenizer_class = Mixer, Quarters
    image_size, num_tokens, num_layers, num_units, vocabulary = 16, 4, 1, 10, 8
    all_segments = (Segment("first", 0, 1, class_only=True), Segment("middle", 1, 2), Segment("later", 2, 4))
    segments = ("first", "middle", "later")
    candidate_positions = (2, 4)

    def __init__(self, generator, tokenizer, preset, prefixes=None):
        self.num_classes = generator.classes.num_embeddings
        super().__init__(generator, tokenizer, preset, prefixes)

    @property
    def fc1_layers(self):
        return (self.generator.fc1,)

    def view_recipe(self, views):
        return CenterCrop(self.image_size)

    def scaled_prefixes(self):
        return (0, 2)

    def _observe(self, tokens, labels, spans, fc1_response, with_logits):
        x, fc1 = self.generator.inputs(tokens, labels), self.generator.fc1
        return Observation(fc1_response(x, fc1.weight, fc1.bias, spans, "none")[1][:, None])

    def _generate(self, labels, tokens, lengths, sampling):
        for step in range(int(lengths.min()), self.num_tokens):
            chosen = self.generator(tokens, labels)[:, step].argmax(-1)
            tokens[:, step] = torch.where(step < lengths, tokens[:, step], chosen)
        return tokens


def build(generator, tokenizer, shapes):
    classes = (shapes or {}).get("classes.weight", (generator["classes"],))[0]
    return Mixer(classes), Quarters()


model_class = MixerModel
ROW = ModelEntry(
    "mixer-1", __name__, {"classes": 3}, {}, OfficialFile("mixer.safetensors", "someone/mixer"),
    OfficialFile("quarters.safetensors", "someone/mixer"), "0 M", Preset(),
)
"""


@pytest.fixture
def outside_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package with a family of its own, its weights in place, and a folder of images."""
    site = tmp_path / "site"
    (site / "mixer_family-1.0.dist-info").mkdir(parents=True)
    (site / "mixer_family.py").write_text(FAMILY)
    (site / "mixer_family-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mixer-family\nVersion: 1.0\n"
    )
    (site / "mixer_family-1.0.dist-info" / "entry_points.txt").write_text(
        "[fastmem.models]\nmixer = mixer_family:ROW\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    registry.entries.cache_clear()
    entry = registry.find_entry("mixer-1")
    torch.manual_seed(0)
    entry.generator_file.path.parent.mkdir(parents=True)
    for network, file in zip(build_networks(entry), (entry.generator_file, entry.tokenizer_file), strict=True):
        save_file(network.state_dict(), file.path)
    write_folder(tmp_path / "data", random_images(9, 16), classes=3)
    yield tmp_path
    registry.entries.cache_clear()


def test_a_third_family_is_one_file_and_one_row(outside_package, capsys):
    arguments = ("--data", outside_package / "data", "--out", outside_package / "run", "--no-class-check", "--json")
    code, out, err = run(capsys, "score", "--model", "mixer-1", *arguments)
    assert code == 0, err
    document = json.loads(out)
    assert (document["model"], document["images"], document["layers"], document["units"]) == ("mixer-1", 9, 1, 10)
    assert document["segments"] == ["first", "middle", "later"]
    names = ["unitmem-by-block.png", "top-images.png", "unitmem-by-segment.png"]
    assert [Path(picture).name for picture in document["pictures"]] == names
    stats = fastmem.UnitStats.load(outside_package / "run" / "train.safetensors")
    assert stats.class_only == ("first",)
    assert float(stats.unitmem()[:, 1].max()) > 0
    model = fastmem.load_model("mixer-1", device="cpu")
    assert model.prefixes == (0, 2)
    tokens = model.generate(torch.tensor([0, 2]), torch.zeros(2, 1, dtype=torch.int64))
    assert torch.equal(model.tokenize(model.decode(tokens)), tokens)
    assert fastmem.assemble(model.generator, model.tokenizer).num_classes == 3
    tokens, labels = torch.arange(16).remainder(8).view(4, 4), torch.tensor([0, 2, 1, 1])
    # its pass gives no logits, so they come from a pass of their own
    found, outcomes = model.responses_and_outcomes(tokens, labels)
    assert torch.equal(found, model.responses(tokens, labels))
    assert torch.equal(outcomes.loss, model.outcomes(tokens, labels).loss)


@pytest.mark.parametrize(
    ("model", "segment", "alone", "with_logits"),
    # positions of fc1's input in every block; a scale's pass ends with that scale
    [("small_model", "last", [18, 18, 1], [18, 18, 18]), ("small_var", "scale2", [5, 4], [30, 30])],
    ids=["rar", "var"],
)
def test_the_pass_runs_fc1_only_where_a_segment_or_the_logits_need_it(
    model, segment, alone, with_logits, request, monkeypatch
):
    model, seen = request.getfixturevalue(model), []

    def recorded(x, *arguments, **options):
        seen.append(tuple(x.shape[:2]))
        return plain.fc1_response(x, *arguments, **options)

    tokens, labels = torch.zeros(3, model.num_tokens, dtype=torch.int64), torch.tensor([0, 4, 4])
    backend = Backend("recorded", recorded)
    model.responses(tokens, labels, [segment], backend)
    assert seen == [(3, positions) for positions in alone]
    seen.clear()
    # logits of two images may be held at once
    monkeypatch.setattr("fastmem.models.model.LOGITS", 2 * model.num_tokens * model.vocabulary)
    model.responses_and_outcomes(tokens, labels, [segment], backend)
    assert seen == [(rows, positions) for rows in (2, 1) for positions in with_logits]
