"""The contract of a surgery, as a test suite. ``surgery_setup.py`` has its settings and helpers."""

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
    """The tests that every surgery passes. A subclass sets ``config``.

    The other attributes state how a surgery differs from the default. No test is skipped for them: each checks what the
    attribute states. A surgery that makes tokens (`Surgery.makes_tokens`) is merged together with a tokenizer, which
    then puts the tokens before each text; its models are compared on texts, which needs transformers.

    Attributes:
        config: The surgery's config, for a model with tables `INPUT` and, untied, `OUTPUT` of `ROWS` rows.
        dtypes: The dtypes of bases that the surgery supports.
        ties: Whether to test bases with tied tables, untied ones, or both.
        starts_as_base: Whether a fresh adapter changes nothing; otherwise it must change something.
        keeps_ties: Whether tied tables stay tied by a merge; otherwise they must be untied, and tied again by its undo.
        bake: The `BakeConfig` of a surgery that makes tokens, or None.
    """

    def test_fresh_adapter_is_a_no_op(self, tied: bool) -> None:
        """A fresh adapter changes no logits, attached or merged. Without ``starts_as_base``, it changes both alike."""
        model = self.make_model(tied=tied)
        before, state = self.logits(model).detach(), state_bits(model)
        attachment = es.attach(model, self.make_config(model))
        live = self.logits(model).detach()
        assert state_bits(model) == state
        adapter = attachment.adapter()
        attachment.detach()
        merged = self.merged_logits(self.merge_copy(model, adapter)).detach()
        if self.starts_as_base:
            torch.testing.assert_close(live, before, rtol=0, atol=1e-6)
            torch.testing.assert_close(merged, before, rtol=0, atol=1e-6)
        else:
            torch.testing.assert_close(live, merged, rtol=1e-5, atol=1e-5)
            same = torch.allclose(live, before, rtol=0, atol=1e-6)
            assert not same, "a fresh adapter changes nothing, but starts_as_base is False"

    def test_gradients_match_the_merged_model(self, tied: bool) -> None:
        """Gradients along random directions equal finite differences of the merged model, in fp64."""
        model = self.make_model(tied=tied, dtype="F64")
        dense = copy.deepcopy(model)
        attachment = es.attach(model, self.make_config(model))
        self.randomize(attachment)
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(self.logits(dense).shape, generator=generator, dtype=torch.float64)
        torch.autograd.backward((self.logits(model) * weights).sum())

        def loss() -> float:
            with torch.no_grad():
                return float((self.merged_logits(self.merge_copy(dense, attachment.adapter())) * weights).sum())

        for parameter in attachment.parameters():
            assert parameter.grad is not None, "a trainable tensor has no gradient"
            # In fp32 a small step would be lost in the rounding of the parameter.
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

    def test_training_lowers_the_loss_and_keeps_the_base(self, tied: bool) -> None:
        """An optimizer over `attachment.parameters()` lowers the loss and changes no tensor of the base."""
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

    def test_attached_equals_merged(self, tied: bool, dtype: str) -> None:
        """Attached and merged models give the same logits up to one rounding; both ways to merge give the same bits.

        A surgery that makes tokens cannot be merged by its attachment, which has no tokenizer: it must refuse.
        """
        model = self.make_model(tied=tied, dtype=dtype)
        before, state = self.logits(model).detach(), state_bits(model)
        dense = copy.deepcopy(model)
        attachment = es.attach(model, self.make_config(model))
        self.randomize(attachment)
        live = self.logits(model).detach()
        merged = self.merge_copy(dense, attachment.adapter())
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
    def test_merged_on_disk_equals_merged_in_memory(self, tied: bool, dtype: str, shards: bool, tmp_path: Path) -> None:
        """A merge on disk gives the same bits, keeps every other byte, and its undo restores the whole directory.

        With a surgery that makes tokens, tokenizer and config change too, and texts give the same ids.
        """
        model = self.make_model(tied=tied, dtype=dtype)
        base = self.write(model, tmp_path / "base", shards=shards)
        adapter = self.make_adapter(model)
        es.merge_checkpoint(base, adapter, tmp_path / "merged", bake=self.bake)
        merged = self.merge_copy(model, adapter)
        expected = state_bits(merged.model)
        weights = [path for path in sorted((tmp_path / "merged").glob("*.safetensors"))]
        found = {name: bits(value) for path in weights for name, value in load_file(path).items()}
        assert found.keys() <= expected.keys()
        assert {name: expected[name] for name in found} == found
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
        """`unmerge` restores every bit of the model, and the tokenizer; so does the attachment's own `unmerge`."""
        model = self.make_model(tied=tied, dtype=dtype)
        before, logits, ties = state_bits(model), self.logits(model).detach(), shared_memory(model)
        adapter = self.make_adapter(model)
        merged = self.merge(model, adapter)
        assert state_bits(model) != before
        es.unmerge(model, merged.undo)
        assert (state_bits(model), shared_memory(model)) == (before, ties)
        assert bits(self.logits(model)) == bits(logits)
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
            assert bits(self.logits(model)) == bits(logits)
        attachment.detach()
        assert bits(self.logits(model)) == bits(logits)

    def test_merge_keeps_ties(self, tied: bool) -> None:
        """After a merge the same parameters share memory as before; without ``keeps_ties``, none do."""
        model = self.make_model(tied=tied)
        owners = {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)}
        groups = shared_memory(model)
        merged = self.merge(model, self.make_adapter(model))
        if self.keeps_ties or not tied:
            assert shared_memory(model) == groups
        else:
            assert all(len(group) == 1 for group in shared_memory(model)), (
                "parameters are still tied, but keeps_ties is False"
            )
        if merged.tokenizer is None:
            assert {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)} == owners

    def test_save_and_load(self, tied: bool, dtype: str, tmp_path: Path) -> None:
        """A loaded adapter has the same manifest and tensors, merges to the same bits, and saves the same files."""
        model = self.make_model(tied=tied, dtype=dtype)
        adapter = self.make_adapter(model)
        adapter.save(tmp_path / "adapter")
        loaded = es.load(tmp_path / "adapter")
        assert loaded.manifest == adapter.manifest
        assert dict(loaded.raw) == dict(adapter.raw)
        loaded.save(tmp_path / "again")
        assert contents(tmp_path / "again") == contents(tmp_path / "adapter")
        assert state_bits(self.merge_copy(model, loaded).model) == state_bits(self.merge_copy(model, adapter).model)

    def test_loaded_adapter_can_be_trained(self, tied: bool, tmp_path: Path) -> None:
        """A loaded adapter, attached again, gives the same logits, and its tensors get gradients."""
        model = self.make_model(tied=tied)
        attachment = es.attach(model, self.make_config(model))
        self.randomize(attachment)
        before = self.logits(model).detach()
        attachment.save(tmp_path / "adapter")
        attachment.detach()
        attachment = es.attach(model, es.load(tmp_path / "adapter"))
        assert bits(self.logits(model)) == bits(before)
        torch.autograd.backward(self.logits(model).square().mean())
        assert all(parameter.grad is not None for parameter in attachment.parameters())

    def test_deepcopy_is_independent(self, tied: bool) -> None:
        """A deep copy of a model has an attachment of its own: changing it does not change the original."""
        model = self.make_model(tied=tied)
        attachment = es.attach(model, self.make_config(model))
        self.randomize(attachment)
        before = self.logits(model).detach()
        other = copy.deepcopy(model)
        assert bits(self.logits(other)) == bits(before)
        copied = es.get_attachment(other)
        assert copied is not None
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert bits(self.logits(other)) != bits(before)
        assert bits(self.logits(model)) == bits(before)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # huggingface_hub uses deprecated calls of its libraries
    def test_hub_round_trip(self, tied: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        """An adapter that was pushed and pulled is the same adapter, and merges to the same bits.

        If the project has a fixture ``embedsurgery_hub``, the id of a repository that this process may push to, the
        adapter goes through that Hub. Otherwise it is loaded from the layout of the Hub cache: links to blobs.
        """
        model = self.make_model(tied=tied)
        adapter = self.make_adapter(model)
        try:
            repo = request.getfixturevalue("embedsurgery_hub")
        except pytest.FixtureLookupError:
            loaded = es.load(self.save_as_cached(adapter, tmp_path))
        else:
            sha = es.push(adapter, repo).sha
            loaded = es.pull(repo)
            assert loaded.source == f"{repo}@{sha}"
        assert (loaded.manifest, dict(loaded.raw)) == (adapter.manifest, dict(adapter.raw))
        assert state_bits(self.merge_copy(model, loaded).model) == state_bits(self.merge_copy(model, adapter).model)

    def test_other_base_is_refused(self, tied: bool, tmp_path: Path) -> None:
        """`merge`, `attach` and `merge_checkpoint` refuse another base, and change and write nothing."""
        adapter = self.make_adapter(self.make_model(tied=tied))
        other = self.make_model(tied=tied, seed=1)
        base = self.write(other, tmp_path / "base")
        before, files = state_bits(other), contents(base)
        for function in (
            lambda: self.merge(other, adapter),
            lambda: es.attach(other, adapter),
            lambda: es.merge_checkpoint(base, adapter, tmp_path / "merged", bake=self.bake),
        ):
            with pytest.raises(BaseMismatchError):
                function()
        assert state_bits(other) == before
        assert es.get_attachment(other) is None
        assert contents(base) == files
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
