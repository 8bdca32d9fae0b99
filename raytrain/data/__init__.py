"""Data sets: reading them whole, holding back a validation split, visiting images in random order."""
