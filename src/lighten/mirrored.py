"""A teacher that looks twice: at an image and at its mirror image.

Where images are mirrored at random, both mean the same, and the mean of what a network says of them
is right more often than what it says of either. Trained networks are far from saying the same of
both, even of images that they were trained on mirrored too. What is inside a network has a place,
which is another one in a mirror: that is of the image as it is, only outputs are of both.

*Source:* Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks",
section 4.1 (predictions averaged over mirror images); Bagherinezhad et al. 2018, "Label refinery"
(arXiv 1805.02641), section 3 (soft labels of the view that is learned from).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lighten.course import ImageCourse
from lighten.errors import WrongUse
from lighten.lesson import Lesson
from lighten.network import Network
from lighten.seen import INSIDE
from lighten.watch import every_output


class Mirrored(nn.Module):
    """images (batch, channels, h, w) -> logits (batch, classes), of both views the mean; of a
    network with several outputs a tuple of them. Places inside it are those of `teacher`; what is
    seen there last, which is what a watch keeps, is of the images as they are. A batch whose second
    half is the first in a mirror (`crop+both`) has both views, and is looked at once."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        if _beside_their_mirror_images(images):
            halves = [x.chunk(2) for x in every_output(self.teacher(images))]
            means = [(one + other) / 2 for one, other in halves]
            found = tuple(torch.cat([mean, mean]) for mean in means)
        else:
            seen = [every_output(self.teacher(x)) for x in (images.flip(-1), images)]
            found = tuple((one + other) / 2 for one, other in zip(*seen, strict=True))
        return found if len(found) > 1 else found[0]


def _beside_their_mirror_images(images: Tensor) -> bool:
    """Whether the second half of a batch is the first in a mirror: then both are looked at once."""
    if len(images) % 2:
        return False
    one, other = images.chunk(2)
    return torch.equal(one, other.flip(-1))


def looking(teacher: nn.Module) -> tuple[nn.Module, str]:
    """What looks, itself or the network in a `Mirrored`, and what its places' names begin with."""
    return (teacher.teacher, "teacher.") if isinstance(teacher, Mirrored) else (teacher, "")


def mirrors(asked: bool | None, teacher: Network, lesson: Lesson, course: ImageCourse) -> bool:
    """Whether the teacher looks twice. asked: None: where that makes sense.

    It does where images are mirrored, where its logits are of the whole image, and where the lesson
    looks at nothing inside, which is of one view. Numbers may be others in a mirror (an angle, a
    place): that it looks twice for those has to be asked for, and so where a lesson looks inside.
    Raises WrongUse where that was and does not hold.
    """
    if asked is False or not lesson.taught:
        return False
    if asked is None and (lesson.numbers or lesson.needs & INSIDE):
        return False
    why = ""
    if not course.mirrored:
        why = f"augment is `{course.augment}`, which mirrors no image"
    elif not lesson.compares:
        why = f"`{lesson}` looks only inside, where the teacher shows the image as it is"
    elif not _of_the_whole(teacher):
        why = "the teacher says something of each place of an image, not one thing of the whole"
    if why and asked:
        raise WrongUse(f"a teacher of mirror images cannot be: {why}", "leave `mirrored` out")
    return not why


@torch.no_grad()
def _of_the_whole(teacher: Network) -> bool:
    found = every_output(teacher(*(x[:1] for x in teacher.inputs)))
    return all(x.dim() == 2 for x in found)
