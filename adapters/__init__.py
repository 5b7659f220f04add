"""Built-in adapters of tokentrim-hooks, one file per model family.

They come through the same entry points as anybody's and import public names only. Never import this package
directly: ask ``tokentrim_hooks.adapters()``.
"""

if __name__ == "adapters":  # found as a folder of the checkout: a second copy of every class
    raise ImportError("this folder installs as tokentrim_hooks_adapters; run `pip install -e .` and import that")
