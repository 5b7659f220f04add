"""The mistakes that tools/mutants.py plants. Each text occurs exactly once in its file (tests/packaging says so)."""

from planted.mutant import Mutant as Mutant
from planted.others import OTHERS
from planted.survived import SURVIVED

MUTANTS = SURVIVED + OTHERS
