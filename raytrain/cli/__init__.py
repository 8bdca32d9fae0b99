"""What a person sees: progress on stderr, a live line on a terminal; results on stdout."""
