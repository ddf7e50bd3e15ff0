"""A little grammar: articles, plurals, numbers."""

import random


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
IRREGULAR = {
    "mouse": "mice",
    "tooth": "teeth",
    "foot": "feet",
    "leaf": "leaves",
    "knife": "knives",
    "wolf": "wolves",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "goose": "geese",
    "loaf": "loaves",
}
UNCOUNTED = {"bread", "rice", "sushi", "garlic", "broccoli", "cheese", "butter", "salt", "honey", "popcorn", "money"}


def with_article(name: str) -> str:
    """ "an apple", "a cat"; what is many or cannot be counted has none."""
    last = name.split()[-1]
    if last in UNCOUNTED or last.endswith("s") and not last.endswith(("ss", "us", "is")) or name.startswith("flag of"):
        return f"the {name}" if name.startswith("flag of") else name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'euro', 'one')) else 'a'} {name}"


def plural(name: str) -> str:
    *before, last = name.split()
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last = last if last.endswith("s") and not last.endswith("ss") else f"{last}es"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        last = f"{last[:-1]}ies"
    else:
        last = f"{last}s"
    return " ".join([*before, last])


def counted(number: int, name: str) -> str:
    """ "three cats", "one cat"."""
    return f"{NUMBERS[number]} {name if number == 1 else plural(name)}"


def listed(things: list[str]) -> str:
    """ "a, b and c"."""
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"


def misspelt(words: str, generator: random.Random) -> str:
    """With a slip of the keys in one of its longer words: two letters in the wrong order, one too few or too many."""
    places = [place for place in range(1, len(words) - 1) if words[place - 1 : place + 2].isalpha()]
    if not places:
        return words
    place = generator.choice(places)
    slips = (
        words[:place] + words[place + 1] + words[place] + words[place + 2 :],
        words[:place] + words[place + 1 :],
        words[:place] + 2 * words[place] + words[place + 1 :],
    )
    return generator.choice(slips)
