"""Word lists that several tasks share, and generators of made-up words and names."""

from __future__ import annotations

import random


def listed(text: str, separator: str = " ") -> list[str]:
    """Return the words of a text that are separated by ``separator``."""
    return text.split(separator)


NAMES = listed(
    "Ada Adam Alex Alice Amy Ana Anna Ben Bob Carl Carla Clara Dan David Diego Ella Emil Emma Erik Eva Felix "
    "Finn Frank Grace Hana Hugo Ida Igor Ines Ivan Jack Jan Jane Jim John Jonas Julia Karin Kate Kim Lara "
    "Laura Lea Leo Lena Lily Lisa Liam Lucas Lucy Maria Mark Marta Mary Max Mia Mike Mila Mira Nina Noah "
    "Nora Olga Oscar Omar Paul Peter Petra Rosa Ruth Sam Sara Simon Sofia Tara Tim Tina Tom Vera Victor Will "
    "Yuki Zoe"
)
CITIES = listed(
    "Athens,Berlin,Bern,Boston,Cairo,Chicago,Delhi,Denver,Dublin,Geneva,Hamburg,Helsinki,Kyoto,Lima,Lisbon,"
    "London,Lyon,Madrid,Milan,Moscow,Munich,Nairobi,New York,Oslo,Paris,Porto,Prague,Quito,Riga,Rome,"
    "San Diego,Seattle,Seoul,Sydney,Tokyo,Toronto,Turin,Vienna,Warsaw,Zurich",
    ",",
)
COLOURS = listed("red blue green yellow orange purple pink black white brown grey gold")
PETS = listed("dog cat horse bird fish rabbit mouse hamster parrot turtle snake frog")
# The words of the lists in the task "reverse".
ITEMS = listed(
    "dog cat bird fish horse mouse cow pig red blue green black white sun moon star tree rose apple bread "
    "milk tea book pen door house car boat ship bag hat one two three four five big small old new hot cold "
    "day night rain snow"
)
# The subjects of questions in the task "unknown".
NOUNS = listed(
    "airport algebra anchor ant apricot armchair arrow artist atom axe bacon badger bakery balloon banana "
    "bandage bank barrel basket battery beach bean beard bed bee beetle bell belt bench bicycle blanket "
    "blood board bone bottle bowl brain branch brick bridge brush bucket bus butter button cabbage cable "
    "cactus cake camel camera candle cannon canoe carpet carrot castle cave cello chain chair chalk cheese "
    "chemistry cherry chess chicken chimney church cinema circle clay cliff clock cloud coal coat coffee "
    "coin comet compass computer cookie copper cotton couch crab crane crystal cup curtain dance dentist "
    "desert desk dessert diamond dictionary dinosaur doctor dolphin dragon drawer dress drum dust eagle "
    "earthquake economy electron elephant elevator energy engine eraser evolution factory feather fence "
    "ferry film finger flag flour flower flute fog football forest fork fossil fountain fridge fruit funeral "
    "galaxy garlic gas gene ghost giraffe glacier glass glove glue goat grammar grape grass gravity guitar "
    "hammer harbour harp heart helicopter helmet hill history hockey honey hospital hotel hurricane ice "
    "insect internet iron island jacket jam jelly jewel jungle kangaroo kettle key kitchen kite knife ladder "
    "lake lamp laptop law lawyer leaf leather lemon lettuce library light lightning lizard lobster lock "
    "logic lung machine magnet mango map market mathematics medicine melon metal microscope mirror money "
    "monkey mosquito motor mountain movie muscle museum mushroom music nail needle nest newspaper novel "
    "ocean octopus oil olive onion opera oven owl oxygen painting palace pancake paper parliament passport "
    "peach peanut pear pearl pencil penguin pepper phone photo physics piano pillow pilot pizza planet plate "
    "plumber pocket poem poet poetry politics pony potato president printer prison pump pumpkin puzzle "
    "pyramid queen quilt radio railway ring river road robot rocket roof rope rugby salad salt sand sandwich "
    "satellite sauce saw scarf school science scissors screw sea shadow shark shelf shirt shoe shop shovel "
    "silk silver singer skeleton ski sky soap sock soil soldier soup spoon spring stadium stairs stamp "
    "station statue steam steel stone storm stove strawberry subway sugar suitcase sweater sword table tank "
    "taxi teacher telescope tennis tent theatre thunder ticket tiger tire toaster tomato tooth tower towel "
    "toy tractor traffic train tram truck trumpet tunnel umbrella uniform universe vaccine valley vampire "
    "van vase vegetable violin virus volcano waiter wall wallet water wave weather wheat wheel whistle wind "
    "window wine winter wire witch wizard wood wool worm yacht yogurt zebra zoo"
)

ONSETS = listed("b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kr pl sh st th tr")
VOWELS = listed("a a a e e e i i i o o o u u ai ea ia oo")
CODAS = ("", "", "", "", "", *listed("n n r l s t m d k x ck nd rt sh ng"))


def made_up_word(rng: random.Random) -> str:
    """Return a pronounceable string of 1 to 3 syllables that is most likely not an English word."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
    if rng.random() < 0.15:
        syllables[0] = rng.choice("aeiou")
    return "".join(syllables) + rng.choice(CODAS)


def person(rng: random.Random, made_up_share: float = 0.45) -> str:
    """Return a first name, made up with probability ``made_up_share``."""
    return made_up_word(rng).capitalize() if rng.random() < made_up_share else rng.choice(NAMES)


def city(rng: random.Random, made_up_share: float = 0.45) -> str:
    """Return the name of a city, made up with probability ``made_up_share``."""
    return made_up_word(rng).capitalize() if rng.random() < made_up_share else rng.choice(CITIES)
