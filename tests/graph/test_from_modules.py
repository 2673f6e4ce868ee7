"""The walker on module trees with hand-made memory layouts, and on models with misleading shapes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import embedsurgery as es
from embedsurgery.errors import OverlapError, TableError
from tests.support.errors import raises
from tests.support.modules import Conv1D, D, Plain, V, tied, transposed_linear


def two_parameters() -> Plain:
    model = Plain()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    return model


def lookup_of_transposed_memory() -> Plain:
    model = Plain(Conv1D())
    model.embed.weight = nn.Parameter(model.head.weight.detach().t())
    return model


@pytest.mark.parametrize("make", [tied, two_parameters, transposed_linear, lookup_of_transposed_memory])
def test_shared_memory_is_one_table_with_aliases(make: type[nn.Module]) -> None:
    graph = es.walk(make())
    table = graph.table("embed.weight")
    assert (table.name, table.aliases) == ("embed.weight", ("head.weight",))
    assert (table.shape, table.dtype, table.kind, table.roles) == ((V, D), "F32", "vocabulary", ("input", "output"))
    assert graph.table("head.weight") is table
    assert [t.name for t in graph.tables] == ["embed.weight", "position.weight"]
    lookup, projection = table.sites
    assert (lookup.module, lookup.padding_idx) == ("embed", 2)
    assert (projection.module, projection.bias) == ("head", "head.bias")


@pytest.mark.parametrize(
    ("make", "marked"),
    [(tied, set()), (transposed_linear, {"head.weight"}), (lookup_of_transposed_memory, {"head.weight"})],
)
def test_a_transpose_is_marked(make: type[nn.Module], marked: set[str]) -> None:
    table = es.walk(make()).table("embed.weight")
    assert table.transposed == marked
    assert table.sites[1].transposed == bool(marked)


def test_an_untied_plain_model_has_no_vocabulary() -> None:
    graph = es.walk(Plain())
    kinds = {t.name: (t.kind, t.roles) for t in graph.tables}
    assert kinds == {
        "embed.weight": ("unknown", ("input",)),
        "position.weight": ("unknown", ("input",)),
        "head.weight": ("unknown", ("output",)),
    }
    assert graph.input is None
    with raises(TableError, expected=None, found="embed.weight [11, 4] (unknown)", hint="target_modules"):
        es.attach(Plain(), es.TrainableTokensConfig([1]))


def test_an_unknown_table_is_edited_if_it_is_named() -> None:
    model = Plain()
    attachment = es.attach(model, es.TrainableTokensConfig([1], target_modules=["position"]))
    assert attachment.adapter().manifest.tables[0].name == "position.weight"


@pytest.mark.parametrize(
    "part", [lambda w: w[:3], lambda w: w[3:], lambda w: w.view(-1), lambda w: w[:, :2], lambda w: w[::2]]
)
def test_partly_shared_memory_is_an_error_that_names_both(part: object) -> None:
    model = Plain()
    model.other = nn.Module()
    model.other.piece = nn.Parameter(part(model.embed.weight.detach()))
    with raises(OverlapError, what="other.piece", where="embed.weight"):
        es.walk(model)


def test_adjacent_tables_in_one_storage_do_not_overlap() -> None:
    model = Plain()
    both = torch.randn(2 * V, D)
    model.embed.weight, model.head.weight = nn.Parameter(both[:V]), nn.Parameter(both[V:])
    columns = torch.randn(5, 2 * D)
    model.position.weight = nn.Parameter(columns[:, :D])
    model.second = nn.Embedding(5, D)
    model.second.weight = nn.Parameter(columns[:, D:])
    names = {t.name for t in es.walk(model).tables}
    assert names == {"embed.weight", "position.weight", "head.weight", "second.weight"}


def test_on_the_meta_device_the_parameter_object_decides() -> None:
    with torch.device("meta"):
        apart, together = Plain(), Plain()
        together.head.weight = together.embed.weight
    assert es.walk(apart).table("embed.weight").aliases == ()
    assert es.walk(together).table("embed.weight").aliases == ("head.weight",)


def test_a_module_under_two_names_is_one_table_with_both() -> None:
    model = Plain()
    model.again = model.embed
    table = es.walk(model).table("again.weight")
    assert table.names == ("embed.weight", "again.weight")
    assert [s.module for s in table.sites] == ["embed", "again"]


def test_the_scale_of_a_subclass_is_read() -> None:
    class Scaled(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(V, D)
            self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    model = tied()
    weight = model.embed.weight
    model.embed = Scaled()
    model.embed.weight = weight
    lookup, projection = es.walk(model).table("embed.weight").sites
    assert lookup.scale == 3.0
    assert projection.scale is None


def test_a_deep_copy_has_an_equal_graph() -> None:
    model = tied()
    assert es.walk(copy.deepcopy(model)) == es.walk(model)


def test_vocabularies_group_tables_with_their_vectors() -> None:
    model = tied()
    (vocabulary,) = es.walk(model).vocabularies
    assert (vocabulary.name, vocabulary.tables, vocabulary.vectors, vocabulary.size) == (
        "embed.weight",
        ("embed.weight",),
        ("head.bias",),
        V,
    )


SIZES: dict[str, dict[str, int]] = {
    "Llama": {"intermediate_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Bert": {"intermediate_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "GPT2": {"n_inner": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "T5": {"d_ff": 64, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8},
}


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize("name", SIZES)
def test_a_projection_to_as_many_features_as_tokens_is_not_a_head(name: str, kind: str) -> None:
    config = getattr(transformers, f"{name}Config")(vocab_size=64, pad_token_id=0, **SIZES[name])
    graph = es.walk(getattr(transformers, f"{name}{kind}")(config))
    (vocabulary,) = graph.vocabularies
    assert vocabulary.tables == (graph.input,)
    assert [site for table in graph.tables for site in table.sites if site.role == "output"] == []


def test_heads_in_a_module_list_are_found() -> None:
    model = Plain()
    model.head = nn.ModuleList(nn.Linear(D, V) for _ in range(2))
    assert [t.name for t in es.walk(model).tables if "output" in t.roles] == ["head.0.weight", "head.1.weight"]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_dtypes_are_safetensors_strings(dtype: str) -> None:
    from embedsurgery.tensors.convert import DTYPES

    assert es.walk(tied().to(DTYPES[dtype])).tables[0].dtype == dtype


def test_dtensors_are_compared_by_their_local_tensor(tmp_path: object) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = tied()
        weight = distribute_tensor(model.embed.weight.detach(), mesh, [Shard(0)])
        model.embed.weight, model.head.weight = nn.Parameter(weight), nn.Parameter(weight)
        table = es.walk(model).table("embed.weight")
        assert (table.aliases, table.shape) == (("head.weight",), (V, D))
    finally:
        dist.destroy_process_group()


def test_select_accepts_names_and_patterns_as_peft_does() -> None:
    graph = es.walk(nn.ModuleDict({"a": Plain(), "b": Plain()}))
    assert [t.name for t in graph.select(["a.embed"])] == ["a.embed.weight"]
    assert [t.name for t in graph.select(["embed"])] == ["a.embed.weight", "b.embed.weight"]
    assert {t.name for t in graph.select(r".*\.(embed|head)")} == {
        "a.embed.weight",
        "a.head.weight",
        "b.embed.weight",
        "b.head.weight",
    }
    with raises(TableError, expected="'nothing'"):
        graph.select(["embed", "nothing"])
    with raises(TableError, expected="'bed'"):
        graph.select(["bed"])
