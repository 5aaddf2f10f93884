"""Lessons as text, and losses against their formulas written out once more."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lighten.errors import BadInput, UnknownName, WrongUse
from lighten.lesson import Lesson, Seen


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alone(
    text: str, student: Seen, teacher: Seen | None = None, labels: Tensor | None = None
) -> float:
    lesson = Lesson.parse(text)
    return float(lesson(student, teacher, labels, lesson.start(student, teacher))[0].detach())


# as text


@pytest.mark.parametrize(
    ("text", "back"),
    [
        ("logits", "logits:1"),
        ("logits:1,hidden:0.1", "logits:1,hidden:0.1"),
        (" logits : 2 : temperature = 4 , labels:.5", "logits:2:temperature=4,labels:0.5"),
        ("logits:direction=reverse:1e-3", "logits:0.001:direction=reverse"),
        ("contrastive:1:width=32:on=outputs", "contrastive:1:width=32:on=outputs"),
        ("logits:1,hidden:0", "logits:1,hidden:0"),
    ],
)
def test_a_lesson_reads_and_writes_as_text(text: str, back: str) -> None:
    lesson = Lesson.parse(text)
    assert str(lesson) == back
    assert Lesson.parse(back) == lesson


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing to learn from"),
        ("logits:0", "nothing to learn from"),
        ("logits:nan", "finite"),
        ("logits:inf", "finite"),
        ("logits:1e999", "finite"),
        ("logits:-1", "at least 0"),
        ("logits:one", "finite"),
        ("logits:1:2", "2 weights"),
        ("logits:1,logits:2", "twice"),
        ("logits(temperature=4):1", "brackets"),
        ("logits:tempreature=4", "did you mean `temperature`"),
        ("logits:temperature=warm", "not a number"),
        ("logits:temperature=0", "temperature is 0"),
        ("logits:temperature=nan", "not a number"),
        ("logits:direction=revers", "did you mean `reverse`"),
        ("topk:k=2.5", "not a whole number"),
        ("topk:k=inf", "not a whole number"),
        ("topk:k=0", "k is 0"),
        ("labels:smoothing=1", "smoothing is 1"),
        ("blocks:temperature=1", "it has: none"),
    ],
)
def test_text_that_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises(WrongUse) as caught:
        Lesson.parse(text)
    assert says in str(caught.value)


def test_a_name_that_is_not_known_is_told_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean `logits`"):
        Lesson.parse("logit:1")


def test_a_temperature_is_for_those_that_have_one_and_do_not_say_it() -> None:
    lesson = Lesson.parse("logits:1,decoupled:1:temperature=2,hidden:1", temperature=3)
    assert str(lesson) == "logits:1:temperature=3,decoupled:1:temperature=2,hidden:1"


@pytest.mark.parametrize("text", ["labels", "topk:1,hidden:0.1", "outputs"])
def test_a_temperature_that_nothing_has_is_refused(text: str) -> None:
    with pytest.raises(WrongUse, match="a temperature of 4, and nothing in"):
        Lesson.parse(text, temperature=4)


def test_needs_are_those_of_losses_that_count() -> None:
    assert Lesson.parse("logits").needs == frozenset()
    assert Lesson.parse("logits,hidden:0,labels:1").needs == {"labels"}
    assert Lesson.parse("relations").needs == {"hidden"}
    assert Lesson.parse("relations:on=outputs").needs == frozenset()
    assert Lesson.parse("attention,attention_transfer").needs == {"attention", "hidden"}
    assert not Lesson.parse("labels,logits:0").taught


# together


def test_the_whole_is_the_weighted_sum() -> None:
    student, teacher = Seen(draw(4, 5)), Seen(draw(4, 5, seed=1))
    labels = torch.tensor([0, 4, 2, 2])
    total, values = Lesson.parse("logits:2,labels:0.5,topk:0")(student, teacher, labels)
    assert list(values) == ["logits", "labels"]
    assert torch.allclose(total, 2 * values["logits"] + 0.5 * values["labels"])


def test_without_a_teacher_only_labels_can_be_learned() -> None:
    student, labels = Seen(draw(4, 5)), torch.tensor([0, 4, 2, 2])
    expected = F.cross_entropy(student.outputs, labels)
    assert alone("labels", student, None, labels) == pytest.approx(float(expected))
    with pytest.raises(WrongUse, match="`logits` needs a teacher"):
        alone("logits", student, None, labels)
    with pytest.raises(WrongUse, match="`contrastive` needs a teacher"):
        alone("contrastive:on=outputs", student, None, labels)


def test_projections_are_the_same_for_a_seed_and_leave_the_dice_alone() -> None:
    student, teacher = Seen(draw(4, 5), {"a": draw(4, 6)}), Seen(draw(4, 5), {"a": draw(4, 9)})
    lesson = Lesson.parse("hidden:1,logits:1")
    before = torch.random.get_rng_state()
    first, again, other = (lesson.start(student, teacher, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    w = [next(p.parameters()) for p in (first, again, other)]
    assert torch.equal(w[0], w[1])
    assert not torch.equal(w[0], w[2])
    assert set(first.state_dict()) == {"hidden.0.weight"}
    assert torch.equal(lesson(student, teacher, None, first)[0], first(student, teacher)[0])


def test_a_projection_that_is_missing_is_said() -> None:
    student, teacher = Seen(draw(4, 5), {"a": draw(4, 6)}), Seen(draw(4, 5), {"a": draw(4, 9)})
    with pytest.raises(WrongUse, match="has to train a projection"):
        Lesson.parse("hidden")(student, teacher)


# mistakes


@pytest.mark.parametrize("text", ["labels", "decoupled"])
@pytest.mark.parametrize("value", [-1, 5, 99])
def test_labels_out_of_range_are_named_with_the_number_of_classes(text: str, value: int) -> None:
    seen = Seen(draw(4, 5))
    with pytest.raises(BadInput, match=f"a label is {value}, but the network has 5 classes"):
        alone(text, seen, seen, torch.tensor([0, value, 2, 2]))


@pytest.mark.parametrize(
    "labels", [None, torch.tensor([1, 2]), torch.rand(4), torch.zeros(4, 1, dtype=torch.int64)]
)
def test_labels_that_do_not_go_with_the_outputs_are_refused(labels: Tensor | None) -> None:
    with pytest.raises(WrongUse, match="labels"):
        alone("labels", Seen(draw(4, 5)), None, labels)


def test_what_has_no_label_is_left_out() -> None:
    student, teacher = Seen(draw(4, 5)), Seen(draw(4, 5, seed=1))
    some = torch.tensor([0, -100, 2, -100])
    kept = [Seen(s.outputs[::2]) for s in (student, teacher)]
    for text in ("labels", "labels:smoothing=0.2", "decoupled"):
        expected = alone(text, *kept, some[::2])
        assert alone(text, student, teacher, some) == pytest.approx(expected)
        assert alone(text, student, teacher, torch.full((4,), -100)) == 0


@pytest.mark.parametrize("text", ["logits", "topk", "decoupled"])
def test_outputs_that_cannot_match_are_named_by_shape(text: str) -> None:
    student, teacher = Seen(draw(4, 5)), Seen(draw(4, 6))
    with pytest.raises(WrongUse, match=r"outputs are \(4, 5\), the teacher's \(4, 6\)"):
        alone(text, student, teacher, torch.zeros(4, dtype=torch.int64))


def test_features_that_cannot_match_are_named_by_place_and_shape() -> None:
    def seen(hidden: Tensor) -> Seen:
        return Seen(draw(4, 5), {"layer1": hidden})

    with pytest.raises(WrongUse, match=r"`layer1` are \(4, 6, 3, 3\), the teacher's \(4, 6\)"):
        alone("hidden", seen(draw(4, 6, 3, 3)), seen(draw(4, 6)))
    with pytest.raises(WrongUse, match=r"block `layer1` gives \(4, 6\), the teacher's \(4, 7\)"):
        alone("blocks", seen(draw(4, 6)), seen(draw(4, 7)))
    with pytest.raises(WrongUse, match="no positions"):
        alone("attention_transfer", seen(draw(4, 6)), seen(draw(4, 7)))
    with pytest.raises(WrongUse, match="the teacher shows no hidden features"):
        alone("hidden", seen(draw(4, 6)), Seen(draw(4, 5)))
    with pytest.raises(WrongUse, match="3 examples, the teacher 4"):
        alone("relations", Seen(draw(3, 5), {"layer1": draw(3, 6)}), seen(draw(4, 6)))
    maps = Seen(draw(4, 5), attention={"a": torch.rand(4, 2, 3, 3)})
    other = Seen(draw(4, 5), attention={"a": torch.rand(4, 2, 5, 5)})
    with pytest.raises(WrongUse, match="same tokens"):
        alone("attention", maps, other)


# formulas


def test_logits_are_the_divergence_at_a_temperature() -> None:
    s, t = draw(6, 5), draw(6, 5, seed=1)
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    m = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> float:
        return float((a * (a / b).log()).sum(1).mean())

    expected = {"forward": kl(p, q), "reverse": kl(q, p), "js": (kl(p, m) + kl(q, m)) / 2}
    for direction, value in expected.items():
        text = f"logits:temperature=3:direction={direction}"
        assert alone(text, Seen(s), Seen(t)) == pytest.approx(9 * value, rel=1e-4)
    shaped = [Seen(x.view(2, 3, 5)) for x in (s, t)]
    assert alone("logits", *shaped) == pytest.approx(alone("logits", Seen(s), Seen(t)))


def test_decoupled_parts_add_up_to_the_divergence() -> None:
    """Zhao et al. 2022, section 3: KD = TCKD + (1 - p of the label) NCKD."""
    s, t, label = draw(1, 5), draw(1, 5, seed=1), torch.tensor([3])
    rest = 1 - float(t.softmax(1)[0, 3])
    text = f"decoupled:temperature=1:beta={rest:.9f}"
    both = alone(text, Seen(s), Seen(t), label)
    assert both == pytest.approx(alone("logits", Seen(s), Seen(t)), rel=1e-4)


def test_decoupled_by_the_teachers_class_asks_for_no_label() -> None:
    s, t = draw(3, 5), draw(3, 5, seed=1)
    assert Lesson.parse("decoupled:target=teacher").needs == frozenset()
    own = alone("decoupled:target=teacher", Seen(s), Seen(t))
    assert own == pytest.approx(alone("decoupled", Seen(s), Seen(t), t.argmax(1)), rel=1e-6)
    assert own != pytest.approx(alone("decoupled", Seen(s), Seen(t), s.argmax(1)), rel=1e-3)
    with pytest.raises(WrongUse, match="target"):
        Lesson.parse("decoupled:target=student")


def test_the_bucket_never_says_more_than_all_classes() -> None:
    s, t = Seen(draw(6, 50)), Seen(2 * draw(6, 50, seed=1))
    whole = alone("logits", s, t)
    some = [alone(f"topk:k={k}", s, t) for k in (1, 5, 20, 49, 50, 99)]
    assert some == sorted(some)
    assert 0 < some[0] < 0.9 * whole
    assert some[-3:] == pytest.approx([whole] * 3, rel=1e-4)


def test_a_stored_teacher_is_as_good_as_one_that_runs() -> None:
    s, t = draw(2, 3, 50), 2 * draw(2, 3, 50, seed=1)
    top = t.log_softmax(-1).topk(7)
    stored = Seen(top.values, indices=top.indices)
    expected = alone("topk:k=7", Seen(s), Seen(t))
    assert alone("topk", Seen(s), stored) == pytest.approx(expected, rel=1e-4)
    half = replace(stored, outputs=stored.outputs.half(), indices=top.indices.int())
    assert alone("topk", Seen(s), half) == pytest.approx(expected, rel=1e-2)
    with pytest.raises(WrongUse, match="its 7 likeliest classes only"):
        alone("logits", Seen(s), stored)
    with pytest.raises(BadInput, match="the student has 20"):
        alone("topk", Seen(s[..., :20]), stored)
    with pytest.raises(WrongUse, match="same inputs"):
        alone("topk", Seen(s[:1]), stored)


def test_a_certain_stored_teacher_that_sums_to_more_than_1_gives_a_number() -> None:
    stored = Seen(torch.tensor([[0.001, -9.0]]), indices=torch.tensor([[3, 1]]))
    assert math.isfinite(alone("topk", Seen(draw(1, 5)), stored))


def test_hidden_features_are_compared_by_direction() -> None:
    s, t = draw(3, 8, 4, 4), draw(3, 8, 4, 4, seed=1)
    expected = (2 - 2 * F.cosine_similarity(s, t, 1)).mean()
    pair = [Seen(draw(3, 5), {"a": x}) for x in (s, 7 * t)]
    assert alone("hidden", *pair) == pytest.approx(float(expected), rel=1e-3)


def test_a_least_squares_projection_finds_a_linear_relation() -> None:
    x = draw(8, 6, 5, 5)
    y = torch.einsum("oc,bchw->bohw", draw(9, 6, seed=1), x)
    pair = [Seen(draw(8, 5), {"a": h}) for h in (x, y)]
    assert alone("hidden:project=least_squares", *pair) < 1e-3
    assert alone("hidden", *pair) > 0.5
    lesson = Lesson.parse("hidden:project=least_squares")
    assert not any(p.requires_grad for p in lesson.start(*pair).parameters())


def test_sizes_in_space_that_differ_are_pooled_to_the_smaller() -> None:
    t = draw(3, 8, 4, 4)
    s = t.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for text in ("hidden", "attention_transfer"):
        pair = [Seen(draw(3, 5), {"a": x}) for x in (s, t)]
        assert alone(text, *pair) == pytest.approx(0, abs=1e-6)
        assert alone(text, *pair[::-1]) == pytest.approx(0, abs=1e-6)
    pair = [Seen(draw(3, 5), {"a": x}) for x in (draw(3, 6, 8), draw(3, 4, 8))]
    assert alone("hidden", *pair) > 0


def test_places_with_other_names_go_together_by_depth() -> None:
    a, b, c = (draw(3, 8, seed=i) for i in range(3))
    teacher = Seen(draw(3, 5), {"t0": a, "t1": b, "t2": c, "t3": a})
    assert alone("hidden", Seen(draw(3, 5), {"s0": b, "s1": a}), teacher) < 1e-6
    # those with the same names by name, in any order
    mixed = Seen(draw(3, 5), {"t3": a, "t1": b, "t0": a, "t2": c})
    assert alone("blocks", mixed, teacher) == 0


def test_attention_transfer_is_as_published() -> None:
    s, t = draw(3, 8, 4, 4), draw(3, 5, 4, 4, seed=1)
    q = [F.normalize(x.square().mean(1).flatten(1)) for x in (s, t)]
    expected = (q[0] - q[1]).square().sum(1).mean()
    pair = [Seen(draw(3, 5), {"a": x}) for x in (s, t)]
    assert alone("attention_transfer", *pair) == pytest.approx(float(expected), rel=1e-3)


def test_heads_that_differ_in_number_are_averaged() -> None:
    maps = draw(3, 4, 5, 5).softmax(-1)
    pair = [Seen(draw(3, 5), attention={"a": x}) for x in (maps.mean(1, keepdim=True), maps)]
    for metric in ("kl", "mse"):
        assert alone(f"attention:metric={metric}", *pair) == pytest.approx(0, abs=1e-6)
    other = draw(3, 4, 5, 5, seed=1).softmax(-1)
    pair = [Seen(draw(3, 5), attention={"a": x}) for x in (other, maps)]
    expected = float((maps * (maps / other).log()).sum(-1).mean())
    assert alone("attention", *pair) == pytest.approx(expected, rel=1e-4)


def test_relations_are_as_published() -> None:
    s, t = draw(4, 6), draw(4, 3, seed=1)
    n = len(s)

    def distances(x: Tensor) -> list[float]:
        found = [float((x[i] - x[j]).norm()) for i in range(n) for j in range(n) if i != j]
        return [d / (sum(found) / len(found)) for d in found]

    def angles(x: Tensor) -> list[float]:
        triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
        return [
            float(F.cosine_similarity(x[i] - x[j], x[k] - x[j], 0))
            for i, j, k in triples
            if len({i, j, k}) == 3
        ]

    pair = [Seen(draw(4, 5), {"a": x}) for x in (s, t)]
    for option, each in (("angle=0", distances), ("distance=0:angle=1", angles)):
        terms = [abs(a - b) for a, b in zip(each(s), each(t), strict=True)]
        huber = [0.5 * d * d if d < 1 else d - 0.5 for d in terms]
        expected = sum(huber) / len(huber)
        assert alone(f"relations:{option}", *pair) == pytest.approx(expected, rel=1e-2)
    # a turned, scaled and moved teacher has the same relations
    turned = 3 * s @ torch.linalg.qr(draw(6, 6, seed=2))[0] + 1
    assert alone("relations", pair[0], Seen(draw(4, 5), {"a": turned})) < 1e-5


def test_contrastive_is_least_for_one_with_its_own() -> None:
    x = torch.eye(6) * 10
    pair = Seen(draw(6, 5), {"a": x})
    turned = Seen(draw(6, 5), {"a": x.roll(1, 0)})
    assert alone("contrastive", pair, pair) < 0.5 * math.log(6)
    assert alone("contrastive", turned, pair) > 2 * math.log(6)
    assert alone("contrastive:tau=1000", turned, pair) == pytest.approx(math.log(6), rel=1e-2)


def test_blocks_count_alike_whatever_their_size() -> None:
    x = draw(3, 8, 4, 4)
    teacher = Seen(draw(3, 5), {"a": x, "b": 100 * x})
    student = Seen(draw(3, 5), {"a": 0 * x, "b": 100 * x})
    assert alone("blocks", student, teacher) == pytest.approx(0.5)


# the page


def test_the_pages_examples_run(repo_root: Path) -> None:
    text = (repo_root / "docs/concepts/losses.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "losses.md", "exec"), names)  # noqa: S102
        total = names["total"]
        assert isinstance(total, Tensor)
        assert float(total.detach()) > 0


def test_every_lesson_on_the_page_can_be_parsed(repo_root: Path) -> None:
    text = (repo_root / "docs/concepts/losses.md").read_text(encoding="utf-8")
    prose = text.partition("## Which one to take")[2].partition("## The formulas")[0]
    written = re.findall(r"`([a-z_]+(?:[:,][^`]*)?)`", prose)
    assert len(written) > 8
    for lesson in (*written, *re.findall(r"^    ([a-z_]+.*)$", text, re.MULTILINE)[:3]):
        assert Lesson.parse(lesson).terms
