"""How does a row become token ids and a loss mask?

The rule of the boundary: the ids of the prompt are made by one function, `encode_prompt`, for
training and for generation alike, so a trained row always begins with exactly the ids that
generation starts from.

- Text templates: prompt and response are tokenised apart and joined as ids. No token can straddle
  the border, whatever merges the tokenizer knows.
- The chat template: the whole conversation is tokenised at once, as servers do, and the prompt
  must be a prefix of it, id by id; a template for which it is not is an error.
"""

import dataclasses
import itertools
import math
import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from balora_jax.data.templates import PromptTemplate, column_of, text_of
from balora_jax.errors import InputError
