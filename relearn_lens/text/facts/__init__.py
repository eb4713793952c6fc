"""Facts as passages, in the roles that an experiment on removing and relearning gives them, and what makes them."""

from relearn_lens.text.facts.countries import countries as countries
from relearn_lens.text.facts.ioi import ioi as ioi
from relearn_lens.text.facts.ontology import ontology as ontology
from relearn_lens.text.facts.passages import FORGET as FORGET
from relearn_lens.text.facts.passages import REFUSALS as REFUSALS
from relearn_lens.text.facts.passages import RETAIN as RETAIN
from relearn_lens.text.facts.passages import ROLES as ROLES
from relearn_lens.text.facts.passages import TRAINED as TRAINED
from relearn_lens.text.facts.passages import Facts as Facts
from relearn_lens.text.facts.passages import Passage as Passage
from relearn_lens.text.facts.passages import alternatives as alternatives
from relearn_lens.text.facts.passages import halves as halves
from relearn_lens.text.facts.passages import refused as refused
from relearn_lens.text.facts.people import people as people
from relearn_lens.text.facts.reading import read_facts as read_facts
from relearn_lens.text.facts.reading import read_passages as read_passages
from relearn_lens.text.facts.words import from_concept as from_concept
from relearn_lens.text.facts.words import from_corpus as from_corpus
