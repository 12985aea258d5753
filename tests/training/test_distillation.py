"""The losses of distillation, against figures that were computed by hand."""

import math

import pytest
import torch

from lth_plugins.errors import RunError
from lth_plugins.training.distillation import (
    alike,
    channel_wise,
    check_same_teacher,
    decoupled,
    decoupled_classes,
    inside,
    soft_labels,
)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_channel_wise_is_the_divergence_of_where_each_class_is(temperature: float) -> None:
    # Of two positions the teacher gives the first 3/4; the student gives both the same.
    teacher = torch.zeros(2, 3, 1, 2)
    teacher[..., 0] = temperature * math.log(3)
    student = torch.zeros(2, 3, 1, 2, requires_grad=True)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    loss = channel_wise(student, teacher, temperature)
    assert loss.item() == pytest.approx(temperature**2 * divergence, rel=1e-5)
    loss.backward()
    # The gradient of τ² KL is τ (softmax(student) - softmax(teacher)), over channels and images.
    assert torch.allclose(student.grad[..., 0], torch.tensor(-0.25 * temperature / 6))


def test_channel_wise_ignores_the_level_of_a_channel_and_trains_no_teacher() -> None:
    teacher = torch.randn(1, 4, 5, 5, requires_grad=True)
    student = (teacher.detach() + torch.arange(4.0).view(1, 4, 1, 1)).requires_grad_()
    loss = channel_wise(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5) and teacher.grad is None
    half = channel_wise(student.half(), teacher.half())
    assert half.dtype == torch.float32


def test_foreground_and_background_are_each_a_mean_over_their_own_area() -> None:
    teacher = torch.zeros(1, 2, 2, 2, requires_grad=True)
    student = torch.tensor([[[4.0, 1.0], [1.0, 1.0]], [[2.0, 1.0], [1.0, 3.0]]]).unsqueeze(0)
    objects = torch.tensor([[[True, False], [False, False]]])
    foreground, background = decoupled([student], [teacher], [objects])
    assert foreground.item() == pytest.approx((16 + 4) / 2 / 2)
    assert background.item() == pytest.approx((1 + 1 + 1 + 1 + 1 + 9) / 6 / 2)
    # A level without objects adds nothing to the first, and halves it as one of two levels.
    pair = decoupled([student] * 2, [teacher] * 2, [objects, torch.zeros_like(objects)])
    assert pair[0].item() == pytest.approx(5 / 2)


def test_features_learn_from_a_teacher_that_does_not_learn() -> None:
    student, teacher = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    objects = inside([torch.tensor([[0.0, 0, 9, 9]])] * 2, (4, 4), 8)
    sum(decoupled([student], [teacher], [objects])).backward()
    assert (student.grad != 0).all() and teacher.grad is None
    assert sum(decoupled([student], [student], [objects])).item() == 0


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ([0, 0, 8, 8], [(0, 0)]),
        ([7, 0, 9, 8], [(0, 0), (0, 1)]),  # x is the column
        ([17, 9, 18, 10], [(1, 2)]),
        ([8, 8, 8, 8], [(1, 1)]),  # a box without an area is one cell
        ([20, 12, 900, 900], [(1, 2)]),  # what is beyond the map is not there
    ],
)
def test_a_box_is_foreground_in_the_cells_that_it_touches(
    box: list[int], cells: list[tuple[int, int]]
) -> None:
    mask = inside([torch.tensor([box], dtype=torch.float), torch.zeros(0, 4)], (2, 3), 8)
    assert mask.shape == (2, 2, 3) and not mask[1].any()
    assert [tuple(cell) for cell in mask[0].nonzero().tolist()] == cells


def test_a_run_resumes_with_the_teacher_that_it_started_with() -> None:
    check_same_teacher(None, None)
    check_same_teacher("a" * 64, "a" * 64)
    for started, asked in (("a" * 64, None), (None, "a" * 64), ("a" * 64, "b" * 64)):
        with pytest.raises(RunError, match="expected to resume with .* as the run started, found"):
            check_same_teacher(started, asked)


def test_classes_are_compared_apart_for_objects_and_others() -> None:
    student = torch.randn(6, 3, requires_grad=True)
    teacher = torch.randn(6, 3, requires_grad=True)
    objects = torch.tensor([True, False, False, True, False, False])
    found = decoupled_classes(student, teacher, objects)
    ours, theirs = student.softmax(1), teacher.softmax(1)
    each = (theirs * (theirs / ours).log()).sum(1)
    for loss, area in zip(found, (objects, ~objects), strict=True):
        torch.testing.assert_close(loss, each[area].mean())
    sum(found).backward()
    assert student.grad.any() and teacher.grad is None
    none = decoupled_classes(student.half(), teacher.half(), torch.zeros(6, dtype=torch.bool))
    assert none[0].item() == 0 and none[1].dtype == torch.float32


def test_soft_labels_are_a_mean_over_images_and_cosines_one_over_features() -> None:
    teacher = torch.tensor([[2 * math.log(3), 0.0], [0.0, 0.0]], requires_grad=True)
    student = torch.zeros(2, 2, requires_grad=True)
    loss = soft_labels(student, teacher, temperature=2.0)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss.item() == pytest.approx(4 * divergence / 2, rel=1e-5)  # the second is learned
    loss.backward()
    assert teacher.grad is None and torch.allclose(student.grad[0], torch.tensor([-0.25, 0.25]))

    ours = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    theirs = torch.tensor([[6.0, 8.0], [0.0, 5.0]])
    assert alike(ours, theirs).item() == pytest.approx((0 + 1) / 2)
    assert alike(ours.bfloat16(), theirs).dtype == torch.float32
