"""Facts as passages, in the roles that an experiment on removing and relearning gives them, and what makes them."""

from relearn_lens.text.facts.countries import countries
from relearn_lens.text.facts.ioi import ioi
from relearn_lens.text.facts.ontology import ontology
from relearn_lens.text.facts.passages import (
    FORGET,
    REFUSALS,
    RETAIN,
    ROLES,
    TRAINED,
    Facts,
    Passage,
    alternatives,
    halves,
    refused,
)
from relearn_lens.text.facts.people import people
from relearn_lens.text.facts.reading import read_facts, read_passages
from relearn_lens.text.facts.words import from_concept, from_corpus

__all__ = [
    "FORGET", "REFUSALS", "RETAIN", "ROLES", "TRAINED", "Facts", "Passage", "alternatives", "countries", "from_concept",
    "from_corpus", "halves", "ioi", "ontology", "people", "read_facts", "read_passages", "refused",
]  # fmt: skip
