"""How people may ask for an emoji: the words of all tasks. HELD_OUT_DRAWING is never trained on."""

from emoji_table import Emoji


DRAWING = (
    "{}",
    "a {}",
    "the {}",
    "{} please",
    "an emoji of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "a small picture of {}",
    "{} emoji",
    "draw {}",
    "draw a {}",
    "please draw {}",
    "show me {}",
    "show me an emoji of {}",
    "make a picture of {}",
    "make an image of {}",
    "i want a picture of {}",
    "please show me a drawing of {}",
    "draw a small {} emoji",
)
# A tenth of the wordings: their words are known from others, they themselves are not.
HELD_OUT_DRAWING = DRAWING[-2:]
TRAINED_DRAWING = DRAWING[:-2]

NAMING = ("what is this?", "what do you see?", "name this emoji.", "which emoji is this?", "what is in the picture?")
SENTENCE = "{} from {}"  # how the adapter answers
CATEGORY = ("which category is it?", "what kind of emoji is this?")
IS_IT = "is it {}?"

TONING = ("change the skin tone to {}", "make the skin {}", "{} skin tone", "give it {} skin")
UNTONING = ("remove the skin tone", "make the skin yellow")
CHANGING = ("make it a {}", "change it to a {}", "turn it into a {}")
SETTING_CLOCK = ("set the clock to {}", "make it {}", "change the time to {}")
SETTING_MOON = ("make it a {}", "change it to the {}", "show the {}")
CHANGING_FLAG = ("change it to the {}", "make it the {}", "turn it into the {}")


def subjects(emoji: Emoji) -> list[str]:
    """What an emoji may be called in a wish: its name, and its keywords, with the tone in two forms."""
    called = [emoji.base, *emoji.keywords]
    if not emoji.tones:
        return sorted({*called, *emoji.names})
    tones = ", ".join(f"{tone} skin tone" for tone in emoji.tones)
    skins = " and ".join(emoji.tones)
    return [f"{name}: {tones}" for name in called] + [f"{name} with {skins} skin" for name in called]
