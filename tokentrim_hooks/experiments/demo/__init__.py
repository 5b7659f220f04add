"""``tokentrim demo``: what pruning does to a small trained video model, measured and shown. Needs the demo extra."""
