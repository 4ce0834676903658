"""Weights of a checkpoint as the beginning of a network with other classes and attributes."""

from argparse import Namespace

import pytest
import torch
from user_errors import error_of

from ddpm.attributes import AttributeSpec
from ddpm.BiFlowNet import BiFlowNet
from ddpm.transfer import parse_class_map, transfer

AGE, SEX = AttributeSpec("age", (0.0, 100.0)), AttributeSpec("sex", categories=("F", "M"))
ROWS = {
    "age": {"name": "age", "range": [0.0, 100.0], "categories": [], "source": "t.csv", "column": None},
    "sex": {"name": "sex", "range": None, "categories": ["F", "M"], "source": "t.csv", "column": None},
}


def network(classes: int, null_label: bool = False, attributes: tuple[AttributeSpec, ...] = (), dim: int = 24):
    return BiFlowNet(
        dim=dim, cond_classes=classes, dim_mults=(1, 2), use_sparse_linear_attn=(0, 0), channels=4, patch_size=2,
        resnet_groups=8, DiT_num_heads=4, attn_heads=2, null_label=null_label, attributes=attributes,
    )  # fmt: skip


def file_of(model: BiFlowNet, attributes: tuple[str, ...] = (), **args) -> dict:
    """A checkpoint whose averaged weights are the model's, and whose others are not."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [ROWS[name] for name in attributes]
    args = Namespace(**{"num_classes": model.cond_classes, "attributes": rows, **args})
    return {"model": {name: value * 0 for name, value in weights.items()}, "ema": weights, "args": args}


def test_classes_begin_as_the_map_says():
    torch.manual_seed(0)
    file = file_of(network(3, null_label=True))
    old = file["ema"]["cond_emb.weight"]
    model = network(4, null_label=True)
    notes = transfer(model, "a.pt", file, parse_class_map(["0=2", "1=new", "3=new:1"]))
    rows = model.cond_emb.weight.detach()
    expected = torch.stack([old[2], old[:3].mean(0), old[2], old[1], old[3]])
    assert torch.equal(rows, expected)
    assert notes == [
        "class 1 is new and begins as the mean of all classes",
        "class 3 is new and begins as class 1",
        "not taken over: class 0, 1 of the checkpoint",
    ]
    for name, value in model.state_dict().items():
        assert name == "cond_emb.weight" or torch.equal(value, file["ema"][name]), name


@pytest.mark.parametrize(
    ("had", "has", "notes"),
    [
        (False, True, ["the null label is new and begins as the mean of all classes"]),
        (True, False, ["not taken over: the null label, as label_dropout is 0"]),
    ],
)
def test_the_null_label_comes_and_goes(had, has, notes):
    file = file_of(network(2, null_label=had))
    model = network(2, null_label=has)
    assert transfer(model, "a.pt", file) == notes
    assert torch.equal(model.cond_emb.weight[:2], file["ema"]["cond_emb.weight"][:2])


def test_an_official_file_says_nothing_of_its_classes():
    file = file_of(network(3))
    file["args"] = Namespace()
    model = network(2)
    assert transfer(model, "a.pt", file) == ["not taken over: class 2 of the checkpoint"]
    assert torch.equal(model.cond_emb.weight, file["ema"]["cond_emb.weight"][:2])


def test_attributes_are_taken_over_where_they_mean_the_same():
    file = file_of(network(2, attributes=(AGE, SEX)), ("age", "sex"))
    model = network(2, attributes=(SEX, AttributeSpec("age", (0.0, 50.0)), AttributeSpec("size_x", (1.0, 9.0))))
    assert transfer(model, "a.pt", file) == [
        "attribute age begins anew, as its values were (0.0, 100.0) before",
        "attribute size_x begins anew",
    ]
    sex = "attribute_emb.of.sex.table.weight"
    assert torch.equal(model.state_dict()[sex], file["ema"][sex])
    assert not model.attribute_emb(torch.tensor([[torch.nan, 0.3, 0.2]])).allclose(torch.zeros(96))  # sex, unknown
    model.attribute_emb.of["sex"].reset_to_zero()
    assert not model.attribute_emb(torch.tensor([[0.0, 0.3, 0.2]])).any()
    assert "not taken over: attribute age" in transfer(network(2), "a.pt", file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0:3"], "classes are given as 0=3 1=new 2=new:4, got '0:3'"),
        (["0=1", "0=new"], "class 0 is given twice"),
        (["2=0"], "there is no class 2, num_classes is 2"),
        (["1=new:3"], "class 1: a.pt has no class 3, only 0 to 1"),
    ],
)
def test_class_maps_that_name_no_class(words, message):
    file = file_of(network(2))
    assert message in error_of(lambda: transfer(network(2), "a.pt", file, parse_class_map(words)))


def test_another_network_or_file_is_refused():
    wide = file_of(network(2, dim=48))
    found = error_of(transfer, network(2), "a", wide)
    assert "only its classes and attributes may be others: pos_embed has shape" in found
    adapter = {"model": {}, "ema": {"downs.0.0.mlp.1.lora_A.weight": torch.ones(1)}}
    assert "an adapter, expected a BiFlowNet checkpoint" in error_of(transfer, network(2), "a", adapter)
