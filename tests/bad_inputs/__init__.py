"""Bad inputs over every field and every file, and what became of each.

``python -m tests.bad_inputs.run`` runs them and counts; the tests run a sixth of them.
"""

from tests import checked

checked.switch_on()  # before the package is imported: no value of a wrong type passes a door
