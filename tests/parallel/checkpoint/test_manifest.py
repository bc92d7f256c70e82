import itertools
import json
import random
import re

import pytest

from moray.parallel.checkpoint.manifest import Manifest, StoredFile, StoredTensor
from moray.parallel.chunks import Grid, coverage_problem

MANIFEST = Manifest(
    step=100,
    created="2026-01-31T12:00:00+00:00",
    metadata={
        "layout": {"ep": 2},
        "position": 12345678901234567,
        "lr": 0.1,
        "note": "größer",
        "by_layer": {2: 1, 10: 2},
    },
    files={"rank-00000.safetensors": StoredFile(4096, "ab" * 32)},
    tensors={"w": StoredTensor((2, 3), "F32", Grid((((0, 0), (2, 3)),)), ("rank-00000.safetensors",))},
)


def test_reads_back_what_was_written() -> None:
    read = Manifest.from_json(MANIFEST.to_json())
    assert read.tensors == MANIFEST.tensors
    assert read.files == MANIFEST.files
    assert (read.step, read.created) == (MANIFEST.step, MANIFEST.created)
    assert read.metadata == {**MANIFEST.metadata, "by_layer": {"2": 1, "10": 2}}  # JSON's keys are strings


def test_is_plain_json_with_the_documented_fields() -> None:
    document = json.loads(MANIFEST.to_json())
    assert document["files"] == {"rank-00000.safetensors": {"size": 4096, "sha256": "ab" * 32}}
    assert document["tensors"] == {"w": {"shape": [2, 3], "dtype": "F32", "grid": 0, "holders": 0}}
    assert (document["grids"], document["holders"]) == ([[[[0, 0], [2, 3]]]], [[0]])


def test_every_changed_digit_is_noticed() -> None:
    text = MANIFEST.to_json()
    for place in (i for i, character in enumerate(text) if character.isdigit()):
        changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        with pytest.raises(ValueError, match=r"altered|not a manifest"):
            Manifest.from_json(changed)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "3", '{"sha256": "x"', b"\xff\xfe"])
def test_what_is_no_manifest_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"manifest|altered|codec"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("shape", "boxes", "problem"),
    [
        ((), [((), ())], None),
        ((), [], r"element \(\) of shape \(\) lies in 0 chunks"),
        ((), [((), ()), ((), ())], "in 2 chunks"),
        ((0, 4), [((0, 0), (0, 4))], None),
        ((0, 4), [], None),
        ((6,), [((0,), (4,)), ((4,), (2,))], None),
        ((6,), [((0,), (4,))], r"element \(4,\)"),
        ((6,), [((0,), (4,)), ((3,), (3,))], r"element \(3,\) of shape \(6,\) lies in 2 chunks"),
        ((6,), [((0,), (4,)), ((4,), (3,))], "sticks out"),
        ((6,), [((0, 0), (6, 1))], "sticks out"),
        # Volumes add up, and yet one corner is missing and another doubled.
        ((2, 2), [((0, 0), (1, 2)), ((0, 0), (1, 1)), ((1, 1), (1, 1))], r"element \(0, 0\).*2 chunks"),
        # A pinwheel: exact, though no axis is cut in the same places throughout.
        ((3, 3), [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))], None),
    ],
)
def test_coverage_by_hand(shape: tuple, boxes: list, problem: str | None) -> None:
    found = coverage_problem(shape, boxes)
    if problem is None:
        assert found is None
    else:
        assert re.search(problem, found or "")


def test_coverage_agrees_with_counting_every_element() -> None:
    dice = random.Random(0)
    verdicts = set()
    for _ in range(400):
        shape = tuple(dice.randint(1, 3) for _ in range(dice.randint(1, 3)))
        boxes = []
        for _ in range(dice.randint(1, 4)):
            offsets = tuple(dice.randint(0, n - 1) for n in shape)
            boxes.append((offsets, tuple(dice.randint(1, n - o) for n, o in zip(shape, offsets, strict=True))))
        count = dict.fromkeys(itertools.product(*map(range, shape)), 0)
        for offsets, sizes in boxes:
            for element in itertools.product(*(range(o, o + s) for o, s in zip(offsets, sizes, strict=True))):
                count[element] += 1
        exact = set(count.values()) == {1}
        verdicts.add(exact)
        assert (coverage_problem(shape, boxes) is None) == exact, (shape, boxes)
    assert verdicts == {True, False}
