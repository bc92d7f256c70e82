"""How alike two near-duplicates are, against sets of Python's."""

import random

from moray.data.preparation.winners import jaccard


def by_hand(one: str, other: str) -> float:
    mine, theirs = (
        {tuple(words[n : n + 5]) for n in range(max(len(words) - 4, 1))} for words in (one.split(), other.split())
    )
    return len(mine & theirs) / len(mine | theirs)


def test_the_index_is_that_of_the_sets_of_shingles() -> None:
    chance = random.Random(0)
    for _ in range(200):
        words = chance.choices("abcdefgh", k=chance.randrange(1, 60))
        changed = [word if chance.random() < 0.9 else "z" for word in words]
        assert jaccard(" ".join(words), ", ".join(changed).upper()) == by_hand(" ".join(words), " ".join(changed))
    assert jaccard("", "") == 0
