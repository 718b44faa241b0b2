"""Which tensors share a file: every one in one, few hundred files, and what changes apart from what does not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stager.state.grouping import group, role

KIB, MIB = 1 << 10, 1 << 20


@given(
    tensors=st.lists(
        st.tuples(st.integers(0, 300).map(lambda n: f"role{n}"), st.sampled_from([64, KIB, 100 * KIB, MIB, 900 * MIB])),
        max_size=600,
    )
)
def test_every_tensor_is_in_one_file_and_there_are_few_hundred(tensors: list[tuple[str, int]]) -> None:
    files = group([name for name, _ in tensors], [nbytes for _, nbytes in tensors])
    assert sorted(position for file in files for position in file) == list(range(len(tensors)))
    assert all(files) and len(files) <= 400


def test_many_large_tensors_of_many_roles_are_few_hundred_files() -> None:
    for num_roles, num_tensors in ((1, 20_000), (1000, 20_000), (20_000, 20_000)):
        roles = [f"r{i % num_roles}" for i in range(num_tensors)]
        assert len(group(roles, [MIB] * num_tensors)) <= 400


def test_role_is_the_name_without_numbers() -> None:
    assert role("model.layers.12.mlp2.weight") == "model.layers.#.mlp#.weight"
    assert role("optimizer.state.3.exp_avg") == role("optimizer.state.40.exp_avg")


def test_adapters_between_frozen_weights_have_files_of_their_own() -> None:
    kinds = [("weight", 32 * MIB), ("norm", 16 * KIB), ("lora_A", 128 * KIB), ("lora_B", 256 * KIB)]
    names = [(f"layers.{i}.{kind}", nbytes) for i in range(64) for kind, nbytes in kinds]
    roles = [role(name) for name, _ in names]
    for file in group(roles, [nbytes for _, nbytes in names]):
        assert len({roles[position] for position in file}) == 1


def test_large_tensors_do_not_share_files_with_small_ones() -> None:
    sizes = [MIB, 500 * MIB, MIB, MIB]
    assert group(["weight"] * 4, sizes) == [[0], [1], [2, 3]]


def test_small_roles_share_a_file_behind_the_others() -> None:
    assert group(["step", "weight", "scale", "weight"], [64, MIB, 64, MIB]) == [[1, 3], [0, 2]]
