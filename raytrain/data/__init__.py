"""Data sets: reading, the validation split, augmentation, and batches in random order."""
