"""The gates before the base model: PSNR through the VAE, and what a linear probe reads."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from small_world.probe import fit_probe, labels_of, main, psnr, read_by_probe
from small_world.score import make_cases
from small_world.world import ATTRIBUTES, BODIES, unseen_kinds


class Shifted:
    """A VAE that draws everything a tenth too bright."""

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents + 0.1)


def test_psnr_is_that_of_levels_in_two_units() -> None:
    assert psnr(Shifted(), torch.zeros(3, 3, 4, 4)) == pytest.approx(26.02, abs=0.01)


def test_psnr_looks_at_what_is_seen() -> None:
    """Brighter than white is white."""
    assert psnr(Shifted(), torch.full((2, 3, 4, 4), 0.999)) > 59


def test_the_probe_reads_what_features_tell_and_leaves_out_what_has_no_name() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 8, generator=generator)
    labels = torch.full((400, len(ATTRIBUTES)), -1)
    labels[:, 0] = (features[:, 0] > 0).long()  # as told by one of them
    labels[:200, 1] = (features[:200, 1] > 0).long()  # named in half of them
    probe = fit_probe(features, labels)
    body, pattern = (probe[name](features).argmax(1) for name in ("body", "pattern"))
    assert (body == labels[:, 0]).float().mean() > 0.97
    assert (pattern == (features[:, 1] > 0)).float().mean() > 0.97


def test_of_new_kinds_the_new_kind_is_counted_on_its_own() -> None:
    """Of features that tell bodies alone, new bodies are read, other new kinds guessed."""
    cases = make_cases(300, "new kinds", seed=0)
    bodies = torch.nn.functional.one_hot(labels_of(cases)[:, 0], len(BODIES)).float()
    scores = read_by_probe(bodies, labels_of(cases), bodies, cases)
    new = [unseen_kinds(case.critter)[0] for case in cases]
    assert scores["body"]["accuracy"] == 1 and scores["new kind"]["total"] == 300
    assert new.count("body") <= scores["new kind"]["right"] < 300


def test_the_command_writes_a_table_and_its_numbers(tmp_path) -> None:
    main(["--output_dir", str(tmp_path), "--fitted", "30", "--samples", "8"])
    numbers = json.loads((tmp_path / "probe.json").read_text())
    kinds = "image encoder, held out", "w0, held out", "image encoder, new kinds", "w0, new kinds"
    assert tuple(numbers["rows"]) == kinds
    for name, row in numbers["rows"].items():
        assert list(row) == [*ATTRIBUTES, "new kind"]
        assert row["scene"]["total"] == 8
        assert row["new kind"]["total"] == (8 if "new" in name else 0)
    head, _, *rows, _, vae = (tmp_path / "probe.md").read_text().splitlines()
    assert head.startswith("| % read by a probe | body |") and len(rows) == 4
    assert vae == f"VAE: {numbers['psnr']:.1f} dB."
