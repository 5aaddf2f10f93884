"""A teacher that looks at an image and at its mirror image."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lighten.course import ImageCourse
from lighten.errors import ChangedRequest, WrongUse
from lighten.lesson import Lesson
from lighten.mirrored import Mirrored, mirrors
from lighten.network import Network
from lighten.recover import recover, teaching
from lighten.showing import Showing
from lighten.training_data import training_data

X = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def classifier(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)
    )
    return Network.of(net.eval(), X[:2])


def blocks(seed: int = 0) -> Network:
    """Its places are 0 and 1."""
    torch.manual_seed(seed)
    stages = [nn.Sequential(nn.Conv2d(n, 6, 3, padding=1), nn.ReLU()) for n in (3, 6)]
    net = nn.Sequential(nn.Sequential(*stages), nn.Flatten(), nn.Linear(384, 5))
    return Network.of(net.eval(), X[:2])


class Attending(nn.Module):
    """Patches of 2 x 2 that attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.answers = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.where = nn.Parameter(torch.randn(16, 8))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.where
        found: Tensor = self.answers(x + self.attention(x, x, x)[0])[:, 0]
        return found


def attending(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network.of(Attending().eval(), X[:2])


def course(augment: str) -> ImageCourse:
    return ImageCourse(X, augment=augment)


@torch.no_grad()
def test_it_says_the_same_of_an_image_and_of_its_mirror_image() -> None:
    network = classifier()
    twice = Mirrored(network.module)
    assert torch.allclose(twice(X), twice(X.flip(-1)), atol=1e-6)
    assert not torch.allclose(network(X), network(X.flip(-1)), atol=1e-3)
    assert torch.allclose(twice(X), (network(X) + network(X.flip(-1))) / 2)


@torch.no_grad()
def test_of_images_beside_their_mirror_images_it_looks_at_each_once() -> None:
    network, seen = classifier(), list[int]()
    network.module.register_forward_hook(lambda _, inputs, found: seen.append(len(inputs[0])))
    twice = Mirrored(network.module)
    plain = twice(X)
    assert seen == [32, 32]
    seen.clear()
    both = twice(torch.cat([X, X.flip(-1)]))
    assert seen == [64]
    assert torch.allclose(both, torch.cat([plain, plain]), atol=1e-6)


def test_it_looks_twice_where_that_makes_sense() -> None:
    network, logits = classifier(), Lesson.parse("logits:1")
    assert mirrors(None, network, logits, course("flip"))
    assert mirrors(True, network, logits, course("crop+flip+cutmix"))
    assert mirrors(None, network, logits, course("crop+both"))
    assert not mirrors(False, network, logits, course("flip"))
    assert not mirrors(None, network, logits, course("none"))
    inside = Lesson.parse("logits:1,hidden:1")
    assert not mirrors(None, network, inside, course("flip"))
    assert mirrors(True, network, inside, course("flip"))
    assert not mirrors(None, network, Lesson.parse("labels"), course("flip"))


def test_it_looks_once_where_each_place_has_an_answer_of_its_own() -> None:
    torch.manual_seed(0)
    segments = Network.of(nn.Conv2d(3, 4, 3, padding=1).eval(), X[:2])
    assert not mirrors(None, segments, Lesson.parse("logits"), course("flip"))
    with pytest.raises(WrongUse, match="each place of an image"):
        mirrors(True, segments, Lesson.parse("logits"), course("flip"))


@pytest.mark.parametrize(
    ("lesson", "augment", "why"),
    [("logits", "none", "mirrors no image"), ("hidden", "flip", "looks only inside")],
)
def test_asked_for_where_it_cannot_be_it_is_refused(lesson: str, augment: str, why: str) -> None:
    with pytest.raises(WrongUse, match=why):
        mirrors(True, classifier(), Lesson.parse(lesson), course(augment))


@torch.no_grad()
def test_its_batch_norms_are_folded_as_those_of_any_teacher() -> None:
    network, lesson = classifier(), Lesson.parse("logits")
    module = teaching(network, lesson, mirrored=True)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    assert torch.allclose(module(X), Mirrored(network.module)(X), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "learn_from", "inside"),
    [(blocks, "logits:1,hidden:1", "hidden"), (attending, "logits:1,attention:1", "attention")],
)
def test_what_is_inside_is_of_the_image_as_it_is(
    make: Callable[..., Network], learn_from: str, inside: str
) -> None:
    network, lesson = make(), Lesson.parse(learn_from)
    taught = {}
    for mirrored in (True, False):
        teacher = teaching(network, lesson, mirrored)
        showing = Showing(make(1).module, teacher, lesson, X, nullcontext)
        taught[mirrored] = showing.taught(X)
        showing.close()
    twice, once = taught[True], taught[False]
    assert twice is not None
    assert once is not None
    assert list(getattr(twice, inside)) == list(getattr(once, inside)) != []
    for name, of_one in getattr(once, inside).items():
        assert torch.equal(getattr(twice, inside)[name], of_one)
    with torch.no_grad():
        wanted: Tensor = Mirrored(network.module)(X)
    assert torch.allclose(twice.outputs, wanted, atol=1e-6)
    assert not torch.allclose(once.outputs, wanted, atol=1e-3)


def test_recovery_learns_from_both_and_says_so() -> None:
    pytest.importorskip("lightning")
    teacher, student = classifier(), classifier(1)
    data = training_data(X, tested=True, augment="flip")
    found = {
        mirrored: recover(
            student, teacher, data, length="30steps", batch=16, rate=0.05, mirrored=mirrored
        )
        for mirrored in (None, False)
    }
    assert found[None].metrics["mirrored"] is True
    assert found[False].metrics["mirrored"] is False

    def away(network: Network) -> float:
        with torch.no_grad():
            wanted: Tensor = Mirrored(teacher.module)(X)
            return float((network(X) - wanted).square().mean())

    assert away(found[None].network) < away(student)
    assert away(found[None].network) != away(found[False].network)


def test_a_folder_goes_on_only_with_what_it_was_begun_with(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    small, teacher = classifier(1), classifier()

    def go(augment: str = "flip", mirrored: bool | None = None) -> None:
        data = training_data(X, tested=True, augment=augment)
        recover(small, teacher, data, length="2steps", batch=16, folder=tmp_path, mirrored=mirrored)

    go()
    go()
    with pytest.raises(ChangedRequest) as error:
        go(mirrored=False)
    assert "mirrored" in error.value.hint
    with pytest.raises(ChangedRequest) as error:
        go("crop+flip")
    assert "augment: flip -> crop+flip" in error.value.hint
