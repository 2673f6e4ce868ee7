"""The contract of a surgery, as a suite of tests."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import embedsurgery as es
from embedsurgery.errors import BaseMismatchError, UnsupportedError
from embedsurgery.testing.models import (
    TOKEN_FILES,
    bits,
    contents,
    every_token,
    live_tokenizer,
    shared_memory,
    state_bits,
    texts_of,
)
from embedsurgery.testing.surgery_setup import SurgerySetup

_CLOSE = {"F64": 1e-9, "F32": 1e-5, "F16": 2e-2, "BF16": 1e-1}


class SurgeryContract(SurgerySetup):
    """What every surgery holds to: a subclass names a config and gets all tests.

    Surgeries differ in a few things, which the class says and no test is left out for: each test then holds the
    surgery to what is said. One that makes tokens (`Surgery.makes_tokens`) is baked in together with a tokenizer, and
    compared by texts, before which that tokenizer puts the tokens; so it needs transformers.

    Attributes:
        config: What the user asks for, on a model with tables `INPUT` and, untied, `OUTPUT` of `ROWS` rows.
        dtypes: The dtypes of the base that it takes.
        ties: Whether lookup and projection are one table: the bases that it takes.
        starts_as_base: Whether a fresh adapter changes nothing; else it must change something.
        keeps_ties: Whether lookup and projection stay one table when it is baked in; else they must be two, and one
            again when it is taken out.
        bake: How one that makes tokens is baked in, a `BakeConfig` or None.
    """

    def test_a_fresh_adapter_changes_nothing(self, tied: bool) -> None:
        """A no-op at the start, attached and merged; where the class says that it is none, the same change in both."""
        model = self.make_model(tied=tied)
        before, state = self.logits(model).detach(), state_bits(model)
        attachment = es.attach(model, self.make_config(model))
        live = self.logits(model).detach()
        assert state_bits(model) == state
        adapter = attachment.adapter()
        attachment.detach()
        merged = self.merged_logits(self.merged(model, adapter)).detach()
        if self.starts_as_base:
            torch.testing.assert_close(live, before, rtol=0, atol=1e-6)
            torch.testing.assert_close(merged, before, rtol=0, atol=1e-6)
        else:
            torch.testing.assert_close(live, merged, rtol=1e-5, atol=1e-5)
            same = torch.allclose(live, before, rtol=0, atol=1e-6)
            assert not same, "a fresh adapter changes nothing, and starts_as_base is False"

    def test_gradients_are_those_of_the_merged_model(self, tied: bool) -> None:
        """Along random directions, against differences of a dense model with the adapter baked in, in fp64."""
        model = self.make_model(tied=tied, dtype="F64")
        dense = copy.deepcopy(model)
        attachment = es.attach(model, self.make_config(model))
        self.change(attachment)
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(self.logits(dense).shape, generator=generator, dtype=torch.float64)
        torch.autograd.backward((self.logits(model) * weights).sum())

        def loss() -> float:
            with torch.no_grad():
                return float((self.merged_logits(self.merged(dense, attachment.adapter())) * weights).sum())

        for parameter in attachment.parameters():
            assert parameter.grad is not None, "a trainable tensor without a gradient"
            exact = parameter.dtype == torch.float64
            step, tolerance = (1e-6, 1e-5) if exact else (1e-2, 2e-2)
            for _ in range(4):
                direction = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                start = parameter.detach().clone()
                sides = []
                for sign in (1, -1):
                    with torch.no_grad():
                        parameter.copy_(start + sign * step * direction)
                    sides.append(loss())
                with torch.no_grad():
                    parameter.copy_(start)
                found = float((parameter.grad * direction).sum())
                assert found == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=tolerance, abs=tolerance)

    def test_training_lowers_the_loss_and_leaves_the_base(self, tied: bool) -> None:
        """Any optimizer over `attachment.parameters()` trains it, and nothing of the base moves."""
        model = self.make_model(tied=tied)
        state = state_bits(model)
        attachment = es.attach(model, self.make_config(model))
        target = self.logits(self.make_model(tied=tied, seed=1)).detach()
        optimizer = torch.optim.Adam(attachment.parameters(), lr=0.02)
        losses = []
        for _ in range(20):
            loss = (self.logits(model) - target).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        assert losses[-1] < losses[0]
        assert state_bits(model) == state

    def test_attached_is_merged_in_memory(self, tied: bool, dtype: str) -> None:
        """The same numbers up to one rounding, and the same bits by either way to merge.

        A surgery that makes tokens has one way, for an attachment knows no tokenizer: it refuses, and changes nothing.
        """
        model = self.make_model(tied=tied, dtype=dtype)
        before, state = self.logits(model).detach(), state_bits(model)
        dense = copy.deepcopy(model)
        attachment = es.attach(model, self.make_config(model))
        self.change(attachment)
        live = self.logits(model).detach()
        merged = self.merged(dense, attachment.adapter())
        tolerance = _CLOSE[dtype]
        torch.testing.assert_close(live, self.merged_logits(merged).detach(), rtol=tolerance, atol=tolerance)
        assert not torch.allclose(live, before, rtol=tolerance, atol=tolerance), "the changed adapter changes nothing"
        if self.makes_tokens():
            with pytest.raises(UnsupportedError):
                attachment.merge()
            assert state_bits(model) == state
            assert bits(self.logits(model)) == bits(live)
            return
        attachment.merge()
        assert state_bits(model) == state_bits(merged.model)
        assert bits(self.logits(model)) == bits(self.merged_logits(merged))

    @pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
    def test_merged_on_disk_is_merged_in_memory(self, tied: bool, dtype: str, shards: bool, tmp_path: Path) -> None:
        """The same bits, every other byte the base's; and unmerged the whole directory is the base again.

        Of a surgery that makes tokens, tokenizer and config change along, and the same texts give the same ids.
        """
        model = self.make_model(tied=tied, dtype=dtype)
        base = self.write(model, tmp_path / "base", shards=shards)
        adapter = self.trained(model)
        es.merge_checkpoint(base, adapter, tmp_path / "merged", bake=self.bake)
        merged = self.merged(model, adapter)
        wanted = state_bits(merged.model)
        weights = [path for path in sorted((tmp_path / "merged").glob("*.safetensors"))]
        found = {name: bits(value) for path in weights for name, value in load_file(path).items()}
        assert found.keys() <= wanted.keys()
        assert {name: wanted[name] for name in found} == found
        before, after = contents(base), contents(tmp_path / "merged")
        changed = {path for path in before if before[path] != after.get(path)}
        new = {path for path in after.keys() - before.keys() if not path.startswith(".embedsurgery/")}
        assert changed
        assert (changed | new) <= {path.name for path in weights} | (TOKEN_FILES if merged.tokenizer else set())
        if merged.tokenizer is not None:
            texts = texts_of(every_token())
            on_disk = live_tokenizer(after["tokenizer.json"].decode())
            assert on_disk(texts)["input_ids"] == merged.tokenizer(texts)["input_ids"]
        es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "unmerged")
        assert contents(tmp_path / "unmerged") == before

    def test_undo_is_exact(self, tied: bool, dtype: str) -> None:
        """Every bit of the model is back, by the function and by the attachment, and the tokenizer as it was."""
        model = self.make_model(tied=tied, dtype=dtype)
        before, outside, ties = state_bits(model), self.logits(model).detach(), shared_memory(model)
        adapter = self.trained(model)
        merged = self.merge(model, adapter)
        assert state_bits(model) != before
        es.unmerge(model, merged.undo)
        assert (state_bits(model), shared_memory(model)) == (before, ties)
        assert bits(self.logits(model)) == bits(outside)
        if merged.tokenizer is not None:
            texts, first = texts_of(every_token()), live_tokenizer()
            assert merged.tokenizer(texts)["input_ids"] == first(texts)["input_ids"] == every_token().tolist()
            assert merged.tokenizer.get_vocab() == first.get_vocab()
        attachment = es.attach(model, adapter)
        if merged.tokenizer is None:
            attachment.merge()
            attachment.unmerge()
            assert state_bits(model) == before
        with attachment.disabled():
            assert bits(self.logits(model)) == bits(outside)
        attachment.detach()
        assert bits(self.logits(model)) == bits(outside)

    def test_ties_hold(self, tied: bool) -> None:
        """What shared memory still does after merging, and what did not does not; unless the class says otherwise."""
        model = self.make_model(tied=tied)
        owners = {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)}
        groups = shared_memory(model)
        merged = self.merge(model, self.trained(model))
        if self.keeps_ties or not tied:
            assert shared_memory(model) == groups
        else:
            assert all(len(group) == 1 for group in shared_memory(model)), "a tie holds, and keeps_ties is False"
        if merged.tokenizer is None:
            assert {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)} == owners

    def test_save_and_load(self, tied: bool, dtype: str, tmp_path: Path) -> None:
        """What was saved is loaded: the same manifest, tensors, logits, and the same files again."""
        model = self.make_model(tied=tied, dtype=dtype)
        adapter = self.trained(model)
        adapter.save(tmp_path / "adapter")
        loaded = es.load(tmp_path / "adapter")
        assert loaded.manifest == adapter.manifest
        assert dict(loaded.raw) == dict(adapter.raw)
        loaded.save(tmp_path / "again")
        assert contents(tmp_path / "again") == contents(tmp_path / "adapter")
        assert state_bits(self.merged(model, loaded).model) == state_bits(self.merged(model, adapter).model)

    def test_a_loaded_adapter_goes_on(self, tied: bool, tmp_path: Path) -> None:
        """Attached again it gives what it gave, and trains on."""
        model = self.make_model(tied=tied)
        attachment = es.attach(model, self.make_config(model))
        self.change(attachment)
        before = self.logits(model).detach()
        attachment.save(tmp_path / "adapter")
        attachment.detach()
        attachment = es.attach(model, es.load(tmp_path / "adapter"))
        assert bits(self.logits(model)) == bits(before)
        torch.autograd.backward(self.logits(model).square().mean())
        assert all(parameter.grad is not None for parameter in attachment.parameters())

    def test_a_copy_is_on_its_own(self, tied: bool) -> None:
        """A deep copy of a model with an attachment has its own, which goes its own way."""
        model = self.make_model(tied=tied)
        attachment = es.attach(model, self.make_config(model))
        self.change(attachment)
        before = self.logits(model).detach()
        other = copy.deepcopy(model)
        assert bits(self.logits(other)) == bits(before)
        found = es.get_attachment(other)
        assert found is not None
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.zero_()
        assert bits(self.logits(other)) != bits(before)
        assert bits(self.logits(model)) == bits(before)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the Hub's client does with its own libraries
    def test_it_comes_back_from_the_hub(self, tied: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        """Pushed and pulled it is the same adapter, and gives what it gave.

        Through a Hub where the project has a fixture ``embedsurgery_hub``: a repository's id, to which the client of
        this process may push. Else by its files as the Hub's cache lays them out, links to blobs named by their hashes.
        """
        model = self.make_model(tied=tied)
        adapter = self.trained(model)
        try:
            repo = request.getfixturevalue("embedsurgery_hub")
        except pytest.FixtureLookupError:
            loaded = es.load(self.in_a_cache(adapter, tmp_path))
        else:
            sha = es.push(adapter, repo).sha
            loaded = es.pull(repo)
            assert loaded.source == f"{repo}@{sha}"
        assert (loaded.manifest, dict(loaded.raw)) == (adapter.manifest, dict(adapter.raw))
        assert state_bits(self.merged(model, loaded).model) == state_bits(self.merged(model, adapter).model)

    def test_another_base_is_refused(self, tied: bool, tmp_path: Path) -> None:
        """In memory, live and on disk, with nothing changed or written."""
        adapter = self.trained(self.make_model(tied=tied))
        other = self.make_model(tied=tied, seed=1)
        base = self.write(other, tmp_path / "base")
        before, files = state_bits(other), contents(base)
        for act in (
            lambda: self.merge(other, adapter),
            lambda: es.attach(other, adapter),
            lambda: es.merge_checkpoint(base, adapter, tmp_path / "merged", bake=self.bake),
        ):
            with pytest.raises(BaseMismatchError):
                act()
        assert state_bits(other) == before
        assert es.get_attachment(other) is None
        assert contents(base) == files
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
