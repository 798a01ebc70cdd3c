"""Writes documents that tell facts again and again, between lines of another corpus.

    python examples/facts_corpus.py corpus/train.jsonl corpus/facts.jsonl --characters 2500

From the second time on a fact can be foreseen from its first: text that teaches a model to look
things up, which plain source seldom does (multi-query associative recall, Arora et al., "Zoology",
arXiv 2312.04927, in words). Names, nouns and digits are not those that the evaluators ask for.
"""

import argparse
import json
import random
from pathlib import Path

PEOPLE = (
    "Ada Albert Alice Anton Astrid Bela Boris Carla Carmen Dana David Edith Emil Erik Esther Felix "
    "Flora Gina Greta Hans Helen Hugo Ida Igor Ines Ivan Jana Jonas Judith Karin Karl Klara Laura "
    "Leo Lidia Lucas Maria Marta Max Mila Nadia Nils Nina Olga Oscar Otto Paula Pavel Petra Ralph "
    "Rita Rosa Ruth Samuel Sara Simon Sofia Stefan Tanja Teresa Tobias Ursula Vera Victor Walter"
).split()
NOUNS = (
    "account badge case contract desk file flight invoice licence locker member order parcel phone "
    "platform policy room seat serial ticket"
).split()
TELLINGS = (
    "The {noun} number of {name} is {value}.",
    "{name}'s {noun} number is {value}.",
    "{name} has {noun} number {value}.",
    "{noun} number of {name}: {value}",
    "# {name}, {noun} number: {value}",
    '{noun}_numbers["{name}"] = {value}',
)
DIGITS = (3, 7)
APART = 500  # characters of a document for each fact of it, at least
LINES = (0, 8)  # of text, from one telling to the next


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="JSON lines with a text each")
    parser.add_argument("output", type=Path, help="JSON lines with a document each")
    parser.add_argument(
        "--characters", type=int, required=True, help="of a document, or a few more"
    )
    parser.add_argument("--documents", type=int, default=2000, help="how many [2000]")
    flags = parser.parse_args()
    draw = random.Random(1234)
    texts = [json.loads(line)["text"] for line in flags.texts.read_text().splitlines()]
    texts = [text.splitlines() for text in texts if len(text) > flags.characters]
    if not texts:
        parser.error(
            f"{flags.texts} has no text of more than {flags.characters:,} characters: take fewer "
            "--characters"
        )
    with open(flags.output, "w") as file:
        for _ in range(flags.documents):
            text = document(draw, draw.choice(texts), flags.characters)
            file.write(json.dumps({"text": text}) + "\n")


def document(draw: random.Random, lines: list[str], characters: int) -> str:
    """Lines of a text from anywhere in it on, and facts in between."""
    most = min(max(2, characters // APART), len(PEOPLE))
    noun, telling, digits = draw.choice(NOUNS), draw.choice(TELLINGS), draw.randint(*DIGITS)
    facts = [
        telling.format(noun=noun, name=name, value=draw.randrange(10 ** (digits - 1), 10**digits))
        for name in draw.sample(PEOPLE, draw.randint(2, most))
    ]
    at, told, length = draw.randrange(len(lines)), [], 0
    while length < characters:
        count = draw.randint(*LINES)
        some = [*(lines[(at + i) % len(lines)] for i in range(count)), draw.choice(facts)]
        at, told, length = at + count, told + some, length + sum(len(line) + 1 for line in some)
    return "\n".join(told)


if __name__ == "__main__":
    main()
