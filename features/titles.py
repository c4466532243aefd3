"""Titles of the synthetic world: an adjective that means nothing, a noun that tells the genre, the part of a series."""

from __future__ import annotations

NOUNS: dict[str, tuple[str, ...]] = {
    "Western": ("Canyon", "Saddle", "Prairie", "Outlaw", "Stagecoach", "Ranch", "Sheriff", "Mustang"),
    "Space": ("Orbit", "Nebula", "Starship", "Comet", "Asteroid", "Galaxy", "Moonbase", "Wormhole"),
    "Crime": ("Alibi", "Heist", "Detective", "Verdict", "Ransom", "Forgery", "Witness", "Suspect"),
    "Romance": ("Kiss", "Wedding", "Valentine", "Sweetheart", "Bouquet", "Serenade", "Embrace", "Courtship"),
    "Horror": ("Crypt", "Phantom", "Werewolf", "Curse", "Graveyard", "Ghoul", "Seance", "Vampire"),
    "Cooking": ("Kitchen", "Recipe", "Banquet", "Bakery", "Saffron", "Orchard", "Supper", "Marmalade"),
    "Sea": ("Harbour", "Lighthouse", "Anchor", "Mermaid", "Tide", "Schooner", "Reef", "Captain"),
    "War": ("Trench", "Battalion", "Siege", "Bunker", "Armistice", "Regiment", "Cannon", "Frontline"),
    "Music": ("Melody", "Orchestra", "Violin", "Ballad", "Chorus", "Sonata", "Jukebox", "Rhythm"),
    "Sport": ("Marathon", "Stadium", "Champion", "Goalkeeper", "Relay", "Knockout", "Regatta", "Podium"),
    "Nature": ("Meadow", "Glacier", "Falcon", "Rainforest", "Otter", "Savanna", "Blossom", "Wilderness"),
    "Fantasy": ("Dragon", "Wizard", "Amulet", "Elf", "Spellbook", "Unicorn", "Goblin", "Prophecy"),
    "History": ("Dynasty", "Pharaoh", "Parchment", "Emperor", "Cathedral", "Viking", "Crusade", "Aqueduct"),
    "Spy": ("Cipher", "Agent", "Embassy", "Dossier", "Informant", "Defector", "Microfilm", "Codename"),
    "Comedy": ("Jester", "Mishap", "Prank", "Clown", "Pratfall", "Punchline", "Farce", "Sitcom"),
    "Family": ("Cradle", "Grandmother", "Treehouse", "Puppy", "Homework", "Playground", "Cousin", "Bedtime"),
}
"""The genres, each with eight nouns of its own."""
ADJECTIVES = (
    *("Silent", "Golden", "Hidden", "Broken", "Distant", "Crimson", "Frozen", "Gentle", "Hollow", "Lucky"),
    *("Midnight", "Northern", "Patient", "Quiet", "Restless", "Savage", "Tender", "Velvet", "Wandering", "Young"),
    *("Amber", "Bitter", "Clever", "Daring", "Electric", "Faded", "Grand", "Humble", "Iron", "Jagged"),
    *("Last", "Misty", "Noble", "Painted", "Royal", "Scarlet", "Twisted", "Unknown", "Wild", "Burning"),
)
PLACES = (
    *("Avalon", "Bergen", "Cadiz", "Dover", "Elba", "Florence", "Ghent", "Havana", "Iowa", "Java"),
    *("Kyoto", "Lima", "Madrid", "Naples", "Oslo", "Prague", "Quebec", "Riga", "Seville", "Tunis"),
)
STRIDE = 101
"""Step through the pairs of adjective and noun, prime to their number, so that neighbours share neither word."""


def make_title(genre: str, series: int, part: int) -> str:
    """Title of a part, counted from 1, of a series, counted from 0 within its genre; no two are the same.

    >>> make_title("Sea", 0, 1), make_title("Sea", 1, 2), make_title("Sea", 320, 1)
    ('Silent Harbour', 'Patient Schooner 2', 'Silent Harbour of Avalon')
    """
    nouns, names = NOUNS[genre], len(NOUNS[genre]) * len(ADJECTIVES)
    volume, place = divmod(series // names, len(PLACES) + 1)
    adjective, noun = divmod(STRIDE * series % names, len(nouns))
    words = [ADJECTIVES[adjective], nouns[noun]]
    if place:
        words += ["of", PLACES[place - 1]]
    if volume:
        words += ["Volume", f"{volume + 1}:"]
    return " ".join([*words, str(part)] if part > 1 or volume else words)
