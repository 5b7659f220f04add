"""TokenTrim for autoregressive video diffusion: prune drifting tokens from the context of any model, from outside.

>>> import tokentrim_hooks as tokentrim
>>> handle = tokentrim.patch(pipeline)  # doctest: +SKIP

The names are in ``__init__.pyi``; each is imported when it is first used.
"""

import logging
from importlib.metadata import version

import lazy_loader

__version__ = version("tokentrim-hooks")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# A library stays silent until its user asks for its log.
logging.getLogger(__name__).addHandler(logging.NullHandler())
