"""raytrain: adversarial training of image classifiers, distributed, tuned and compared."""
