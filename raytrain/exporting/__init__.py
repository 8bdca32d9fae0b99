"""A trained network as files that other programs read, and what must be known to trust it.

From the bottom up: `numbers` (what was measured), `subject` (what is exported), `check` (the same
logits?), one file per format, `card` and `front` (the model card), `leave` (the folder as a whole).
"""
