"""Pure functions on arrays: linear algebra, regularizers, losses, the chunked head, the objective."""
