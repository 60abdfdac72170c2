"""What a model or a screen holds on to is its own: writing to the user's data changes nothing, and they may go."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graphs import by_hand, number, parsed
from made import net
from onnx import TensorProto, helper

import mcdrop

SOURCE = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
FORMS: dict[str, Callable[[], Any]] = {"array": SOURCE.copy, "tensor": lambda: torch.from_numpy(SOURCE.copy())}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("score", ["variance", "feature_distance"])
def test_a_screen_does_not_see_what_is_written_to_its_reference_rows(form: str, score: str) -> None:
    model = mcdrop.wrap(net(), example=SOURCE[:8], tuning={})
    given = FORMS[form]()
    fitted, other = (mcdrop.fit_screen(model, x, score=score, fpr=0.1, passes=8) for x in (given, SOURCE.copy()))
    given[:] = float("nan")
    found, expected = (mcdrop.predict(model, SOURCE[:5] * 3, passes=8, seed=1, screen=one) for one in (fitted, other))
    np.testing.assert_array_equal(found.p_value, expected.p_value)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_s_example_is_a_copy_of_few_rows_and_lets_the_data_set_go(form: str) -> None:
    given = FORMS[form]()
    model, watched = mcdrop.wrap(net(), example=given, tuning={}), weakref.ref(given)
    given[:] = float("nan")
    (leaf,) = model.example.leaves
    np.testing.assert_array_equal(np.asarray(leaf), SOURCE[:8])
    assert getattr(leaf, "base", None) is None  # no view of an array
    assert not isinstance(leaf, torch.Tensor) or leaf.untyped_storage().nbytes() == SOURCE[:8].nbytes
    del given
    gc.collect()
    assert watched() is None


def test_a_graph_s_example_is_a_copy_too() -> None:
    nodes = [helper.make_node("Dropout", ["x", "p", "yes"], ["y"])]
    graph = parsed(by_hand(nodes, initial=(number("p", 0.25), number("yes", True, TensorProto.BOOL))))
    for given in (np.ones((20, 6), np.float32), torch.ones(20, 6)):
        model = mcdrop.wrap(graph, example=given)
        given[:] = 0.0
        np.testing.assert_array_equal(np.asarray(model.example.leaves[0]), np.ones((8, 6)))


def test_results_and_fits_are_compared_as_objects_and_can_be_keys() -> None:
    """Equality of their arrays, number by number, would be no single truth value."""
    model = mcdrop.wrap(net(), example=SOURCE[:8], tuning={})
    screen = mcdrop.fit_screen(model, SOURCE, fpr=0.1, passes=8)
    result, calibration = (
        mcdrop.sample(model, SOURCE, mcdrop.PassPlan(4)),
        mcdrop.calibrate(model, SOURCE, SOURCE[:, 0]),
    )
    found = mcdrop.predict(model, SOURCE, passes=4)
    for record in (screen, result, calibration, found, mcdrop.screen(model, SOURCE, screen=screen)):
        other = copy.deepcopy(record)
        assert record == record != other
        assert len({record, other, record}) == 2
