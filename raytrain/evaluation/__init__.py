"""What a trained network is worth: how much of a number is chance, and whether to believe it at all."""
