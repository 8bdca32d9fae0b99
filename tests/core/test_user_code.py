"""What code of the user raises and changes: one sentence, and nothing left of it."""

from __future__ import annotations

import random
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raytrain.core.errors import ModelFailed, RequestError
from raytrain.core.user_code import user_code_errors
from raytrain.models import Classifier
from raytrain.models.classifier import Normalise


class Unspoken(Exception):
    """Its message cannot be read."""

    def __str__(self) -> NoReturn:
        raise ValueError("nothing to say")


class Raises(nn.Module):
    """Raises in every pass."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ZeroDivisionError("division by zero"), r"ZeroDivisionError \(division by zero\)"),
        (RuntimeError("first\n\n\tsecond\x1b"), r"RuntimeError \(first second\)"),
        (ValueError("ab" * 999), r"ValueError \((ab){150}\)"),
        (Unspoken(), "Unspoken"),
        (RuntimeError(), "RuntimeError"),
        (SystemExit(3), r"SystemExit \(3\)"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_any_error_is_one_sentence_with_the_line_of_the_user(
    error: BaseException, sentence: str
) -> None:
    with (
        pytest.raises(
            RequestError, match=rf"^model.name: it cannot be: {sentence} at {__file__}:\d+$"
        ) as caught,
        user_code_errors("it", "cannot be"),
    ):
        nn.Sequential(Raises(error))(torch.zeros(1))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RequestError("data: no")])
def test_an_interruption_and_a_finished_sentence_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, user_code_errors("it", "cannot be"):
        raise error
    assert caught.value is error


def test_generators_of_python_and_numpy_are_not_those_of_the_user() -> None:
    np.random.seed(5)
    wanted = np.random.rand()
    np.random.seed(5)
    with pytest.raises(RequestError), user_code_errors("it", "cannot be"):
        random.seed(1)
        np.random.seed(1)
        raise ValueError
    assert np.random.rand() == wanted
    assert random.random() != random.Random(1).random()


def test_an_error_of_a_pass_says_whose_it_is_and_on_what() -> None:
    error = ZeroDivisionError("of a step")
    model = Classifier(Normalise(1, [0.0], [1.0]), Raises(error), "nets:net")
    for images, many in (
        (torch.zeros(3, 1, 8, 8), "3 images"),
        (torch.zeros(1, 1, 8, 8), "1 image"),
    ):
        with pytest.raises(
            ModelFailed, match=rf"^model.name: nets:net cannot take {many}"
        ) as caught:
            model.eval()(images)
        assert "of 1x8x8 in evaluation mode: ZeroDivisionError (of a step)" in str(caught.value)
        assert str(caught.value).split(" at ")[-1].startswith(f"{__file__}:")
        assert caught.value.__cause__ is error
