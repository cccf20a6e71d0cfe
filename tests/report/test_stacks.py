"""How weights of different families fall into the rows and columns of a grid."""

import pytest

from quantlib.report import WeightRow, words
from quantlib.report.stacks import stacks


def weight(name, block=None):
    return WeightRow(name, "c", block, "linear", (4, 4), "w4", 4.0, 32, 8)


def in_blocks(prefix, count, paths):
    return [
        weight(f"{prefix}.{index}.{path}.weight", f"{prefix}.{index}")
        for index in range(count)
        for path in paths
    ]


def test_blocks_are_rows_and_paths_are_columns():
    (stack,) = stacks(in_blocks("model.layers", 3, ["self_attn.q_proj", "mlp.down_proj"]))
    assert stack.blocks == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert stack.labels == ["q", "down"]
    assert len(stack.cells) == 6
    assert stack.cells[2, 1][0].name == "model.layers.2.mlp.down_proj.weight"


def test_weights_outside_blocks_stand_where_the_model_has_them():
    vision = in_blocks("vision.layers", 2, ["attn.qkv"])
    language = in_blocks("model.layers", 2, ["mlp.up_proj"])
    patch, projector, embed, head = map(weight, ("vision.patch", "projector.1", "embed", "head"))
    first, second = stacks([patch, *vision, projector, embed, *language, head])
    assert (first.before, first.after) == ([patch], [])
    assert (second.before, second.after) == ([projector, embed], [head])


def test_a_stack_shows_every_weight_once():
    rows = [weight("embed"), *in_blocks("layers", 4, ["a.q", "b.q"]), weight("head")]
    (stack,) = stacks(rows)
    assert sorted(row.name for row in stack.weights) == sorted(row.name for row in rows)


def test_columns_with_the_same_end_are_told_apart():
    (stack,) = stacks(in_blocks("decoder", 2, ["self_attn.q_proj", "cross_attn.q_proj"]))
    assert stack.labels == ["self_attn.q", "cross_attn.q"]


def test_experts_of_a_layer_share_a_cell():
    (stack,) = stacks(in_blocks("layers", 2, [f"mlp.experts.{e}.w1" for e in range(8)]))
    assert stack.labels == ["w1"]
    assert len(stack.cells[1, 0]) == 8


def test_blocks_that_differ_leave_holes():
    dense = in_blocks("layers", 1, ["mlp.up"])
    sparse = [weight("layers.1.experts.up", "layers.1")]
    (stack,) = stacks([*dense, *sparse])
    assert set(stack.cells) == {(0, 0), (1, 1)}


def test_levels_of_a_decoder_share_a_grid_and_keep_both_numbers():
    levels = [row for n in range(2) for row in in_blocks(f"decoder.up.{n}.block", 2, ["conv1"])]
    middle = [weight(f"decoder.mid.block_{n}.conv1", f"decoder.mid.block_{n}") for n in (1, 2)]
    first, second = stacks([*middle, *levels])
    assert (first.prefix, first.numbers) == ("decoder.mid.block_*", ["1", "2"])
    assert (second.prefix, second.numbers) == ("decoder.up.*.block", ["0.0", "0.1", "1.0", "1.1"])
    (layers,) = stacks(in_blocks("model.layers", 2, ["q"]))
    assert (layers.prefix, layers.numbers) == ("model.layers", ["0", "1"])


def test_no_blocks_no_grid():
    assert stacks([weight("a"), weight("b")]) == []


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.size(82_800_000), "82.8 MB"),
        (words.size(1_234_000_000), "1.23 GB"),
        (words.size(999), "999 B"),
        (words.size(5_120), "5.12 kB"),
        (words.number(0.08491), "0.0849"),
        (words.number(2.104e-5), "2.10e-5"),
        (words.number(12345.6), "12,346"),
        (words.number(0.0), "0"),
        (words.number(-0.5), "-0.500"),
        (words.number(float("inf")), "∞"),
        (words.number(float("nan")), "nan"),
        (words.tick(0.5), "0.5"),
        (words.tick(1e-6), "1e-6"),
        (words.tick(20000.0), "20000"),
        (words.duration(3.21), "3.2 s"),
        (words.duration(250), "4 min 10 s"),
        (words.duration(7500), "2 h 05 min"),
        (words.count(1, "weight"), "1 weight"),
        (words.count(2100, "weight"), "2,100 weights"),
        (words.millions(134_515_008), "134.5 million"),
        (words.millions(1_235_814_400), "1.24 billion"),
    ],
)
def test_numbers_are_written_for_people(written, expected):
    assert written == expected
