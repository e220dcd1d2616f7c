"""The questions of capitals.yaml: each capital among three others of the list."""

from datasets import Dataset

_CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Canada": "Ottawa", "Chile": "Santiago",
    "China": "Beijing", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo", "Finland": "Helsinki",
    "France": "Paris", "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest", "India": "New Delhi",
    "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi", "Mexico": "Mexico City",
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Russia": "Moscow", "Spain": "Madrid",
    "Sweden": "Stockholm", "Thailand": "Bangkok", "Turkey": "Ankara", "Ukraine": "Kyiv",
}  # fmt: skip


def rows(**options):
    """What lm-eval calls: the splits by name."""
    capitals = list(_CAPITALS.values())
    questions = []
    for number, country in enumerate(_CAPITALS):
        choices = [capitals[(number + step) % len(capitals)] for step in (0, 7, 13, 22)]
        answer = number % 4  # not always the first
        choices[0], choices[answer] = choices[answer], choices[0]
        questions.append({"country": country, "choices": choices, "answer": answer})
    return {"test": Dataset.from_list(questions)}
