"""Commands that run somebody's script: patched as its model is constructed, or both patched and unpatched."""
