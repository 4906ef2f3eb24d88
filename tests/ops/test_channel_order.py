"""The remembered order of classes is the one that is stored now."""

import torch

from kvpack import ops


def packed(*classes: int) -> torch.Tensor:
    return ops.bits.pack(torch.tensor(classes, dtype=torch.uint8), 2)


def test_classes_come_one_after_another_and_channels_in_their_order() -> None:
    classes = packed(2, 0, 1, 0, 2, 1)
    assert ops.channel_order.stored(classes, 6).tolist() == [1, 3, 2, 5, 0, 4]
    assert ops.channel_order.places(classes, 6).tolist() == [4, 0, 2, 1, 5, 3]
    assert ops.channel_order.stored(classes, 6) is ops.channel_order.stored(classes, 6)


def test_new_contents_are_noticed() -> None:
    classes = packed(1, 0, 0, 0)
    assert ops.channel_order.stored(classes, 4).tolist() == [1, 2, 3, 0]
    classes.copy_(packed(0, 0, 1, 0))
    assert ops.channel_order.stored(classes, 4).tolist() == [0, 1, 3, 2]
    assert ops.channel_order.stored(classes, 3).tolist() == [0, 1, 2]


def test_tensors_that_do_not_count_their_changes_are_read_anew() -> None:
    with torch.inference_mode():
        classes = packed(1, 0, 0, 0)
        assert ops.channel_order.stored(classes, 4).tolist() == [1, 2, 3, 0]
        classes.copy_(packed(0, 0, 1, 0))
        assert ops.channel_order.stored(classes, 4).tolist() == [0, 1, 3, 2]
