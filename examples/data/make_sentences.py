"""Makes the texts of `finetune_text.py` and `finetune_trainer.py`: short reviews with three kinds of labels.

    python examples/data/make_sentences.py

writes `sentences/train.jsonl` and `sentences/test.jsonl` next to this file, with the same bytes every time. A line has

    text    words and punctuation, separated by spaces
    topic   what is reviewed: restaurant, hotel, film, book, phone or train
    rating  the opinion in the sentence, from 1 to 5; null if the sentence only states a fact
    tags    one per word: persons (PER), towns (LOC) and names of what is reviewed (NAME) as B-, I- and O;
            null if the words are not annotated, which is the case for two sentences in five

The sentences are made from their labels, so the labels are correct: no model and no reader guessed them.
The rating is 3 plus the mean strength of the opinion words (from −2 to 2), each strengthened by "very", softened by
"fairly", or turned by "not". A third of the names, persons and towns occur in the test sentences only. A few sentences
are ambiguous ("The ending of the Blue Fox was wonderful"), so no model can classify all of them correctly.
"""

import json
import random
from pathlib import Path

FIRST = [
    "Anna", "Ben", "Clara", "David", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Lars", "Mina",
    "Noor", "Omar", "Petra", "Rosa", "Samir", "Tessa", "Yuki",
]  # fmt: skip
LAST = [
    "Abbott", "Berger", "Castillo", "Dubois", "Eriksen", "Fontaine", "Garcia", "Hoffman", "Ito", "Jansen",
    "Keller", "Lindqvist", "Moreau", "Novak", "Okafor",
]  # fmt: skip
TOWNS = [
    "Lisbon", "Ghent", "Bergen", "Turin", "Porto", "Leipzig", "Graz", "Malaga", "Utrecht", "Cork", "Tartu",
    "Zagreb", "Lyon", "Basel", "Gdansk", "Bath", "York", "Siena",
]  # fmt: skip
COLOURS = [
    "Blue", "Silver", "Old", "Golden", "Little", "Crooked", "Green", "White", "Red", "Quiet",
]  # fmt: skip
THINGS = [
    "Heron", "Lantern", "Mill", "Anchor", "Orchard", "Compass", "Fox", "Harbour", "Swan", "Bridge", "Garden",
    "Tower",
]  # fmt: skip
MODELS = [
    "Nova", "Pico", "Aria", "Vento", "Lumo", "Zephyr", "Orion", "Kite",
]  # fmt: skip

# What is reviewed, per topic. Some words belong to several topics, so that the whole sentence is needed.
ASPECTS = {
    "restaurant": ["soup", "service", "menu", "dessert", "wine list", "bread", "waiter", "kitchen"],
    "hotel": ["room", "service", "breakfast", "bed", "view", "reception", "bathroom", "lobby"],
    "film": ["ending", "plot", "camera", "cast", "music", "screenplay", "pacing", "first scene"],
    "book": ["ending", "plot", "prose", "first chapter", "translation", "cover", "narrator", "pacing"],
    "phone": ["camera", "battery", "screen", "speaker", "price", "menu", "charger", "keyboard"],
    "train": ["seat", "view", "service", "price", "timetable", "dining car", "heating", "carriage"],
}
VERBS = {
    "restaurant": ["had dinner at", "ate at", "booked a table at"],
    "hotel": ["stayed at", "spent two nights at", "slept at"],
    "film": ["watched", "saw", "went to see"],
    "book": ["read", "finished", "borrowed"],
    "phone": ["bought", "tried", "switched to"],
    "train": ["took", "rode", "booked"],
}
FACTS = {
    "restaurant": [
        "{name} in {town} opens at seven and closes at midnight .",
        "{name} has twelve tables near {town} station .",
    ],
    "hotel": ["{name} in {town} has forty rooms on three floors .", "Check-in at {name} begins at two ."],
    "film": ["{name} was shot near {town} in nine weeks .", "{person} directed {name} before moving to {town} ."],
    "book": ["{person} wrote {name} in {town} .", "{name} was translated by {person} last year ."],
    "phone": ["{name} comes in two sizes and three colours .", "{person} designed {name} in {town} ."],
    "train": ["{name} runs from {town} to {town2} twice a day .", "{name} stops in {town} for ten minutes ."],
}
STRENGTHS = {
    "superb": 2.0, "wonderful": 2.0, "excellent": 1.8, "lovely": 1.4, "good": 1.0, "pleasant": 0.9, "decent": 0.5,
    "average": 0.0, "ordinary": -0.2, "plain": -0.4, "weak": -1.0, "poor": -1.3, "dull": -1.2, "bad": -1.4,
    "dreadful": -1.9, "awful": -2.0,
}  # fmt: skip
GRADABLE = ["good", "pleasant", "ordinary", "plain", "weak", "poor", "dull", "bad"]
CAN_BE_TURNED = ["good", "pleasant", "weak", "dull", "bad"]
OPENINGS = ["{person} {verb} {name} in {town} :", "We {verb} {name} .", "Last week {person} {verb} {name} .", ""]
PLACES = {"restaurant": "at", "hotel": "at", "film": "of", "book": "of", "phone": "of", "train": "of"}
SIZES = {"train": 1200, "test": 350}


class Writer:
    """Writes the sentences of one split, whose name is the random seed."""

    def __init__(self, split: str):
        self.random = random.Random(f"sentences/{split}")
        self.split = split

    def one_of(self, words: list[str]) -> str:
        """Draws a name: in training from the first two thirds of the list, in testing from all of it."""
        return self.random.choice(words[: 2 * len(words) // 3] if self.split == "train" else words)

    def name(self, topic: str) -> str:
        """The name of what is reviewed."""
        if topic == "phone":
            return f"the {self.one_of(MODELS)} {self.random.randint(2, 9)}"
        if topic == "train":
            return f"the {self.one_of(THINGS)} Express"
        return f"the {self.one_of(COLOURS)} {self.one_of(THINGS)}"

    def opinion(self) -> tuple[str, float]:
        """Draws opinion words, and returns their strength."""
        word = self.random.choice(list(STRENGTHS))
        strength, chance = STRENGTHS[word], self.random.random()
        if chance < 0.2 and word in GRADABLE:
            return f"very {word}", max(-2.0, min(2.0, 1.4 * strength))
        if chance < 0.4 and word in GRADABLE:
            return f"fairly {word}", 0.6 * strength
        if chance < 0.7 and word in CAN_BE_TURNED:
            return f"not {word}", -0.6 * strength
        return word, strength

    def fill(self, pattern: str, topic: str, name: str) -> list[tuple[str, str]]:
        """Fills a pattern; returns its words with their tags."""
        person = self.one_of(FIRST) + (f" {self.one_of(LAST)}" if self.random.random() < 0.6 else "")
        town = self.one_of(TOWNS)
        town2 = self.one_of([other for other in TOWNS if other != town])
        slots = {"person": (person, "PER"), "town": (town, "LOC"), "town2": (town2, "LOC"), "name": (name, "NAME")}
        pairs = []
        for word in pattern.split():
            if word.strip("{}") in slots:
                value, kind = slots[word.strip("{}")]
                article, words = ["the"], value.split()
                if words[0] == "the":  # the article belongs to the sentence, not to the name
                    pairs += [(w, "O") for w in article]
                    words = words[1:]
                pairs += [(w, f"{'I' if i else 'B'}-{kind}") for i, w in enumerate(words)]
            else:
                value = self.random.choice(VERBS[topic]) if word == "{verb}" else word
                pairs += [(w, "O") for w in value.split()]
        return pairs

    def sentence(self) -> dict[str, object]:
        """Makes one line."""
        topic = self.random.choice(list(ASPECTS))
        name, rating = self.name(topic), None
        if self.random.random() < 0.3:
            pairs = self.fill(self.random.choice(FACTS[topic]), topic, name)
        else:
            opening = self.random.choice(OPENINGS)
            pairs = self.fill(opening, topic, name)
            aspects = self.random.sample(ASPECTS[topic], 2)
            opinions = [self.opinion() for _ in range(self.random.choice([1, 1, 2]))]
            whose = f"{PLACES[topic]} {{name}} " if not opening else ""
            article = "The" if opening.endswith(".") else "the"
            body = f"{article} {aspects[0]} {whose}was {opinions[0][0]}"
            if len(opinions) > 1:
                joint = "but" if opinions[0][1] * opinions[1][1] < 0 else "and"
                body += f" , {joint} the {aspects[1]} was {opinions[1][0]}"
            pairs += self.fill(f"{body} .", topic, name)
            rating = round(3 + sum(strength for _, strength in opinions) / len(opinions), 1)
        words, tags = zip(*pairs, strict=True)
        annotated = self.random.random() < 0.6
        text = " ".join(words)
        return {
            "text": text[0].upper() + text[1:],
            "topic": topic,
            "rating": rating,
            "tags": " ".join(tags) if annotated else None,
        }


def main() -> None:
    folder = Path(__file__).parent / "sentences"
    folder.mkdir(exist_ok=True)
    seen: set[object] = set()
    for split, size in SIZES.items():
        writer, lines = Writer(split), []
        while len(lines) < size:
            sentence = writer.sentence()
            if sentence["text"] not in seen:  # no sentence occurs twice or in both splits
                seen.add(sentence["text"])
                lines.append(json.dumps(sentence, ensure_ascii=False))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
