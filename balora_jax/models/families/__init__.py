"""Families of models, one file each: reads its ``config.json``, says its blocks and weight names.

``base`` says what a family is. Every file of this folder is imported with it, and those of families
register them: a new family is a new file. The other files hold what families of one group share.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
