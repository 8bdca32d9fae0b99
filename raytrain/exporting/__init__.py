"""A trained network as files that other programs read, and what must be known to trust it.

From the bottom up: `numbers` (what was measured), `subject` (what is exported), `check` (the same
logits?), one file per format, `model_card` and `card_metadata`. The folder as a whole is `commands.export`.
"""
