"""The two augmentations of BYOL for Audio (Niizumi et al., arXiv:2103.06695, section III-B): mixup and resized crop."""

from simsiam_dali.data.augment import Part
from simsiam_dali.data.dali import DataNode, fn, types


def mixup(mel: DataNode, share: DataNode | float, other: DataNode | int) -> DataNode:
    """`share` of another segment's mel power, and what is left of 1 of its own: `(F, n_mels)`.

    other: its place in the batch. Mixing powers is the paper's log-mixup-exp of log-mels: it is how sounds add up that
    have nothing to do with each other.
    """
    return mel * (1.0 - share) + fn.permute_batch(mel, indices=other) * share


def resized_crop(log_mel: DataNode, frames: Part, mels: Part, shape: tuple[int, int]) -> DataNode:
    """A part of `log_mel (F, n_mels)` interpolated to all of `shape`, which is `(F, n_mels)`.

    Linear, between the centres of the first and the last frame and mel bin of the part.
    """
    last_frame, last_mel = float(shape[0] - 1), float(shape[1] - 1)
    # Of an image: x, which is frequency, then y. DALI's pixel centres lie at +0.5: scaling about (0.5, 0.5) keeps the
    # first one in place.
    matrix = fn.transforms.scale(scale=fn.stack(mels[1], frames[1]), center=[0.5, 0.5])
    matrix = fn.transforms.translation(matrix, offset=fn.stack(mels[0] * last_mel, frames[0] * last_frame))
    image = fn.reshape(fn.expand_dims(log_mel, axes=[2]), layout="HWC")
    image = fn.warp_affine(image, matrix=matrix, size=shape, inverse_map=True, interp_type=types.INTERP_LINEAR)
    return fn.reshape(image, shape=list(shape), layout="")
